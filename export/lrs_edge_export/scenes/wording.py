"""How questions are worded: templates of each kind, and the grammar of the names in them.

In a template, `{focus}` is what the question looks for, `{a}` its article where it has one; `{is}`
and `{does}` agree with it in number. Operators write in many ways: politely, tersely, in lower
case, without a question mark; so do these.
"""

from __future__ import annotations

import random
import re

#: Labels without an article: they are not one thing.
_MASS = frozenset({"bare land", "farmland"})
_IRREGULAR_ENDS = ("s", "x", "z", "ch", "sh")

PRESENCE = (
    "{Is} there {a}{focus} in this image?",
    "{Is} there {a}{focus} in the scene?",
    "{Is} there {a}{focus}?",
    "{Is} there {a}{focus} anywhere in the image?",
    "Does the image show {a}{focus}?",
    "Does this scene contain {a}{focus}?",
    "Can you see {a}{focus}?",
    "Can you find {a}{focus} in the picture?",
    "Do you see {a}{focus} in this satellite image?",
    "{Is} {a}{focus} visible?",
    "{Is} {a}{focus} visible anywhere in the picture?",
    "Could you check whether there {is} {a}{focus}?",
    "Please tell me if there {is} {a}{focus} in the image.",
    "Tell me whether the image has {a}{focus}.",
    "{is} there {a}{focus} here",
    "any {focus}?",
    "{focus}, yes or no?",
    "Check for {a}{focus}.",
)
#: The same for several: the focus is the plural.
PRESENCE_PLURAL = (
    "Are there any {focus}?",
    "Are there any {focus} in this image?",
    "Are there {focus} in the scene?",
    "Are there {focus} anywhere in the picture?",
    "Can you see any {focus}?",
    "Do you see any {focus} here?",
    "Does the image show any {focus}?",
    "any {focus} here",
)
COUNT = (
    "How many {focus} are there?",
    "How many {focus} are there in this image?",
    "How many {focus} are in the scene?",
    "How many {focus} can you see?",
    "How many {focus} can be seen in the picture?",
    "How many {focus} does the image show?",
    "Count the {focus}.",
    "Count the {focus} in this image.",
    "What is the number of {focus}?",
    "What is the number of {focus} in the image?",
    "Please count the {focus} in the scene.",
    "Could you tell me how many {focus} there are?",
    "Give the number of {focus}.",
    "number of {focus}?",
    "how many {focus}",
)
CATEGORY = (
    "What is in the {focus} of the image?",
    "What is in the {focus} of the scene?",
    "What is in the {focus} part of the image?",
    "What can be seen in the {focus} part of the picture?",
    "What kind of place is in the {focus} of the image?",
    "What kind of place lies in the {focus} part of the scene?",
    "Which place is in the {focus} of the image?",
    "What stands out in the {focus} part of the image?",
    "What is the place in the {focus} part?",
    "Name the place in the {focus} of the image.",
    "Please name the place in the {focus} part of the image.",
    "Could you tell me what is in the {focus} of the picture?",
    "what's in the {focus}",
    "{focus}: what is there?",
    "what place is in the {focus} part",
)
POSITION = (
    "Where {is} the {focus}?",
    "Where {is} the {focus} in the image?",
    "Where in the image {is} the {focus}?",
    "Where {does} the {focus} lie?",
    "Where can the {focus} be found?",
    "In which part of the image {is} the {focus}?",
    "Which part of the image shows the {focus}?",
    "In what part of the scene {is} the {focus}?",
    "What is the position of the {focus}?",
    "Find the {focus}.",
    "Locate the {focus}.",
    "Locate the {focus} in the image.",
    "Please tell me where the {focus} {is}.",
    "Could you point out where the {focus} {is}?",
    "where {is} the {focus}",
    "{focus}, where?",
)
RURAL_URBAN = (
    "Is this area rural or urban?",
    "Is this a rural or an urban area?",
    "Is the scene rural or urban?",
    "Is the image of a rural or an urban area?",
    "Does the image show a rural or an urban area?",
    "Is it mostly rural or urban here?",
    "Would you call this area urban or rural?",
    "Is the surrounding area urban or rural?",
    "Rural or urban?",
    "Urban or rural?",
    "What is the setting, rural or urban?",
    "Please say whether the area is rural or urban.",
    "Tell me if this is urban or rural.",
    "rural or urban area",
)
#: Fit where the nearest place is at hand.
BESIDE = (
    "What is next to the {focus}?",
    "What is beside the {focus}?",
    "What lies right next to the {focus}?",
    "What lies beside the {focus}?",
    "What is directly beside the {focus}?",
    "What {does} the {focus} lie beside?",
    "Which place is next to the {focus}?",
    "Which place borders the {focus}?",
    "What kind of place is adjacent to the {focus}?",
    "What {is} the {focus} next to?",
    "Please name the place beside the {focus}.",
    "what's next to the {focus}",
    "beside the {focus}?",
)
#: Fit wherever one place is clearly the nearest.
CLOSEST = (
    "What is closest to the {focus}?",
    "What is nearest to the {focus}?",
    "Which place is closest to the {focus}?",
    "Which place is nearest to the {focus}?",
    "What kind of place is closest to the {focus}?",
    "What is the nearest place to the {focus}?",
    "What other place is closest to the {focus}?",
    "Name the place closest to the {focus}.",
    "Please tell me which place is nearest to the {focus}.",
    "What {does} the {focus} lie closest to?",
    "closest place to the {focus}?",
    "what's near the {focus}",
)


def article(name: str) -> str:
    """The indefinite article and a space: "an " for "airport"; nothing for "bare land"."""
    if name in _MASS or name == plural(name):
        return ""
    return "an " if name[0] in "aeiou" else "a "


def plural(name: str) -> str:
    """The plural of a name, or the name where it is not a single thing or plural already."""
    last = name.rsplit(" ", maxsplit=1)[-1]
    if name in _MASS or (last.endswith("s") and not last.endswith(("ss", "us"))):
        return name
    if re.search(r"[^aeiou]y$", last):
        return f"{name[:-1]}ies"
    return f"{name}es" if last.endswith(_IRREGULAR_ENDS) else f"{name}s"


def fill(template: str, focus: str) -> str:
    """One template with its words, as written.

    Args:
        template: One of those above.
        focus: What to look for: a name, the plural of one, a ninth of the image, or "".
    """
    several = focus not in _MASS and focus != "" and focus == plural(focus)
    verb = "are" if several else "is"
    words = {"is": verb, "Is": verb.capitalize(), "does": "do" if several else "does"}
    return template.format(focus=focus, a=article(focus) if focus else "", **words)


def vary(text: str, focus: str, draw: random.Random) -> tuple[str, str]:
    """Now and then other case or punctuation, as people type.

    Args:
        text: A filled template.
        focus: Words that occur in it, or "".
        draw: Source of every choice.

    Returns:
        (text, focus), the focus as it now occurs in the text.
    """
    roll = draw.random()
    if roll < 0.08:
        return text.lower(), focus.lower()
    if roll < 0.10:
        return text.upper(), focus.upper()
    if roll < 0.18:
        return text.rstrip("?."), focus
    if roll < 0.21:
        return text.rstrip("?.") + draw.choice(("??", " ?", "...", "!", "?!")), focus
    if text[0].islower() and roll < 0.5:
        # A question that begins with its focus, such as "Beach, where?".
        changed = focus.capitalize() if text.startswith(focus) and focus else focus
        return text[0].upper() + text[1:], changed
    return text, focus
