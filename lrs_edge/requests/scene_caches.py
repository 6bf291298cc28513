"""The KV caches of one scene: what they keep between its questions, and what they give back."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import suppress

from lrs_edge.errors import BackendError
from lrs_edge.language.kv_cache import KVCache
from lrs_edge.requests.cache_pool import CachePool
from lrs_edge.requests.options import Resampling
from lrs_edge.search.scorers import MAX_KEPT_BYTES, ScoringCaches


class SceneCaches:
    """KV caches of the RFM and the LLM of one scene, kept between its questions.

    Args:
        rfm: Cache of the RFM; None where the model has none.
        llm: Cache of the LLM.
        resampling: How the global view in their prefix was read.
        pool: Counts them between questions.
    """

    def __init__(
        self, rfm: KVCache | None, llm: KVCache, resampling: Resampling, pool: CachePool
    ) -> None:
        self.rfm = rfm
        self.llm = llm
        self.resampling = resampling
        self._prefix = 0
        self._pool = pool

    @property
    def scoring(self) -> ScoringCaches | None:
        """What the RFM works with; None where there is none."""
        return None if self.rfm is None else ScoringCaches(self.rfm, self.llm)

    def take(self) -> None:
        """Work with the caches: they must not leave while a question does."""
        for name in ("rfm", "llm"):
            self._pool.forget(self, name)

    def expect(self, prefix: int) -> None:
        """Say how many tokens at the start are the same for every question."""
        self._prefix = prefix

    def release(self) -> None:
        """Give back the memory of what no later question can use.

        Kept are the RFM's base level and the language model's prompt without the answer; of caches
        that would be too large, the prefix alone. Never fails: an answer that is finished must not
        be lost because there is no memory to tidy up after it.
        """
        for name, cache in (("rfm", self.rfm), ("llm", self.llm)):
            if cache is None:
                continue
            length = cache.known
            if length * cache.bytes_per_token > MAX_KEPT_BYTES:
                length = min(length, self._prefix)
            # A cache that cannot be moved is left empty.
            with suppress(BackendError, MemoryError):
                cache.release(length)
            if not self._pool.hold(self, name, cache.buffers.nbytes):
                self.drop(name)

    def drop(self, key: Hashable) -> None:
        """Empty one of the caches; the pool asks for it."""
        cache = self.rfm if key == "rfm" else self.llm
        if cache is not None:
            with suppress(BackendError, MemoryError):
                cache.release(0)

    def close(self) -> None:
        """Count no longer."""
        self.take()
