"""One bound in bytes for everything that an engine keeps between questions.

Tokens of tiles and KV caches of all open scenes share it; what was used longest ago leaves first,
whichever scene it belongs to. What the question under way works with is not counted: it is counted
when the question is over and its caches are kept for the next one.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Protocol


class CacheOwner(Protocol):
    """Holds what a pool counts."""

    def drop(self, key: Hashable) -> None:
        """Let go of what is held under a key; the pool has forgotten it already."""
        ...


class CachePool:
    """Counts what its owners hold, and tells them to drop what was used longest ago.

    An owner that is no longer referred to needs no farewell. May be used from several threads.

    Args:
        max_bytes: Most bytes held together; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.RLock()
        self._bytes = 0
        self._sizes: OrderedDict[tuple[int, Hashable], int] = OrderedDict()
        self._owners: dict[int, weakref.ref[CacheOwner]] = {}
        # Of owners that are gone: the garbage collector may tell in the middle of anything.
        self._gone: deque[int] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        with self._lock:
            self._bury()
            return self._bytes

    def hold(self, owner: CacheOwner, key: Hashable, nbytes: int) -> bool:
        """Count something as held, the most recently used; older things leave for it.

        Args:
            owner: Who holds it; its `drop` is called when it has to leave.
            key: Its name with this owner. What was counted under it before no longer is.
            nbytes: Its size.

        Returns:
            False where it does not fit even alone: it is not counted, and not to be held.
        """
        with self._lock:
            self._bury()
            self._uncount((id(owner), key))
            if nbytes > self.max_bytes:
                return False
            if id(owner) not in self._owners:
                self._owners[id(owner)] = weakref.ref(owner, self._farewell(id(owner)))
            self._sizes[id(owner), key] = nbytes
            self._bytes += nbytes
            self.shrink(self.max_bytes)
            return True

    def touch(self, owner: CacheOwner, key: Hashable) -> None:
        """Something held was used just now."""
        with self._lock:
            if (id(owner), key) in self._sizes:
                self._sizes.move_to_end((id(owner), key))

    def forget(self, owner: CacheOwner, key: Hashable) -> None:
        """Something is no longer held, or is being worked with; unknown keys do no harm."""
        with self._lock:
            self._uncount((id(owner), key))

    def shrink(self, nbytes: int) -> None:
        """Drop what was used longest ago until at most so many bytes are held."""
        with self._lock:
            self._bury()
            while self._bytes > nbytes:
                (number, key), size = self._sizes.popitem(last=False)
                self._bytes -= size
                owner = self._owners[number]()
                if owner is not None:
                    owner.drop(key)

    def _farewell(self, number: int) -> _Farewell:
        return _Farewell(self._gone, number)

    def _uncount(self, name: tuple[int, Hashable]) -> None:
        self._bytes -= self._sizes.pop(name, 0)

    def _bury(self) -> None:
        while self._gone:
            number = self._gone.popleft()
            self._owners.pop(number, None)
            for name in [name for name in self._sizes if name[0] == number]:
                self._uncount(name)


class _Farewell:
    """Notes the number of an owner that is gone; refers to no pool, which may be gone as well."""

    def __init__(self, gone: deque[int], number: int) -> None:
        self._gone = gone
        self._number = number

    def __call__(self, _: object) -> None:
        self._gone.append(self._number)
