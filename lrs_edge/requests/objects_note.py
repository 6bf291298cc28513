"""What the detector found for one question, and how the language model is told."""

from __future__ import annotations

from lrs_edge.answer.answer import ObjectReport
from lrs_edge.answer.evidence import object_reports
from lrs_edge.answer.trace import Trace
from lrs_edge.engines.rows import Embeds
from lrs_edge.objects.detections import no_detections
from lrs_edge.objects.merge import merge
from lrs_edge.objects.note import describe, longest
from lrs_edge.pyramid.levels import TileIndex
from lrs_edge.search.context import SearchContext
from lrs_edge.search.result import SearchResult
from lrs_edge.search.search import room_by_length, trim
from lrs_edge.stages import Stages


class ObjectsNote:
    """Objects on the tiles that were looked at for one question, and the text that says them.

    Empty until `read`, and for good where the bundle has no detector.

    Args:
        stages: The model.
        question: What is asked.

    Attributes:
        embeds: float32 [m, D], embeddings of the text as it stands in the prompt, or None.
    """

    def __init__(self, stages: Stages, question: str) -> None:
        self._stages = stages
        self._question = question
        self._spec = stages.manifest.vision.objects
        self._found = no_detections()
        self.embeds: Embeds | None = None

    def most_tokens(self) -> int:
        """Tokens that a note may have, before it is known."""
        if self._spec is None:
            return 0
        return len(self._stages.prompt.note(longest(self._spec)))

    def read(self, context: SearchContext, result: SearchResult, trace: Trace | None) -> None:
        """Join what was found on the global view and the tiles of the search, and say it.

        Local tokens that no longer fit the model's length are left out, the lowest-scored first.
        The note itself is left out, with a warning, where not even it fits.

        Args:
            context: The question and the image; its budget learns how long the note is.
            result: Of the search; its tokens and warnings may change.
            trace: Gets the text.
        """
        if self._spec is None:
            return
        view, tiles = context.pyramid.global_view, context.tiles
        levels = [(view, tiles.objects(view, [TileIndex(0, 0)], "global"))]
        levels += [(seen.level, tiles.objects(seen.level, seen.tiles)) for seen in result.passes]
        self._found = merge(levels)
        text = describe(self._found, self._spec, self._question)
        ids = self._stages.prompt.note(text)
        # The reference policy cuts the end of the whole sequence instead.
        if context.options.policy != "reference":
            room = room_by_length(context) - len(ids)
            if room < 0:
                context.budget.noted(0)
                result.warnings.append(
                    f"the {len(ids)} tokens on the objects found did not fit the model's length "
                    "and were left out"
                )
                return
            trim(result, room, "the model's length", "max_vision_tokens")
        self.embeds = self._stages.sequences.text(ids)
        context.budget.noted(len(ids))
        if trace is not None:
            trace.add_note(text, ids)

    def reports(self, width: int, height: int) -> tuple[ObjectReport, ...]:
        """The best objects, in pixels of an image of this size."""
        if self._spec is None:
            return ()
        return object_reports(self._found, self._spec, width, height)
