"""The clock of one question."""

from __future__ import annotations

from lrs_edge.budget import SEARCH_SHARE, Clock


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_search_gets_a_share_of_the_time() -> None:
    time = Time()
    clock = Clock(10, time)
    time.now += 10 * SEARCH_SHARE - 0.1
    assert not clock.search_expired()
    time.now += 0.2
    assert clock.search_expired()
    assert not clock.expired()
    time.now += 10
    assert clock.expired()


def test_no_limit_never_expires() -> None:
    time = Time()
    clock = Clock(None, time)
    time.now += 1e9
    assert not clock.expired()
    assert not clock.search_expired()


def test_stages_add_up_even_when_they_fail() -> None:
    time = Time()
    clock = Clock(None, time)
    for _ in range(2):
        try:
            with clock.stage("read"):
                time.now += 2
                raise OSError
        except OSError:
            pass
    assert clock.seconds("read") == 4
    assert clock.seconds("encode") == 0
    assert clock.elapsed == 4
