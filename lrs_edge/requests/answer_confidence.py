"""How sure the answer to one question is: its tokens are chosen here, and remembered."""

from __future__ import annotations

from collections.abc import Iterable

from lrs_edge.answer.confidence import Certainty, certainty, confidence
from lrs_edge.answer.domain import domain_warnings
from lrs_edge.answer.trace import Trace
from lrs_edge.language.prompt import PromptTokens
from lrs_edge.language.sampling import Sampler, TokenChooser
from lrs_edge.requests.options import AskOptions
from lrs_edge.stages import Stages
from lrs_edge.vision.colours import Colours


class AnswerConfidence:
    """Chooses the tokens of one answer, and says how sure it is.

    What was fitted holds for greedy decoding, and the authors' code knows no such thing: otherwise
    tokens are the sampler's, and there is no confidence.

    Args:
        stages: The model.
        options: Of the question.
        prompt: Tokens of the question's prompt.

    Attributes:
        chooser: Chooses tokens.
    """

    def __init__(self, stages: Stages, options: AskOptions, prompt: PromptTokens) -> None:
        manifest = stages.manifest
        seen = stages.prompt.seen(prompt) if manifest.penalise_prompt else ()
        greedy = options.temperature == 0
        self._domain = None if manifest.calibration is None else manifest.calibration.domain
        self._fitted = manifest.calibration if greedy and options.policy == "full" else None
        sampler = Sampler(
            options.temperature,
            options.top_p,
            options.seed,
            manifest.repetition_penalty,
            (*manifest.penalised_ids, *seen),
        )
        yes_no = None if self._fitted is None else self._fitted.yes_no
        self.chooser = TokenChooser(
            sampler,
            stages.yes_no if greedy else None,
            None if yes_no is None else yes_no.threshold,
        )

    def certainty(self, tokens: int) -> Certainty:
        """What decoding says, of an answer of so many tokens."""
        return certainty(self.chooser.margin, self.chooser.log_probabilities[:tokens])

    def value(self, tokens: int) -> float | None:
        """Probability 0..1 that an answer of so many tokens is right; None where not known."""
        return None if self._fitted is None else confidence(self._fitted, self.certainty(tokens))

    def warnings(self, gsd: float | None, colours: Colours | None) -> Iterable[str]:
        """See `domain_warnings`; none where the bundle does not say what it was trained on."""
        return () if self._domain is None else domain_warnings(self._domain, gsd, colours)

    def add_to(self, trace: Trace, tokens: int) -> None:
        """Add confidence, margin and log-probabilities to a trace, with a calibration only."""
        if self._fitted is not None:
            trace.add_confidence(self.certainty(tokens), self.value(tokens))
