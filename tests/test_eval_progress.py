"""The bar of an evaluation."""

from __future__ import annotations

import pytest

from lrs_edge.commands.eval_progress import EvalProgress


def test_it_keeps_the_accuracy_so_far(capsys: pytest.CaptureFixture[str]) -> None:
    with EvalProgress(4, enabled=False) as progress:
        assert progress.summary == "accuracy 0.0%"
        for correct in (True, True, False):
            progress.add(correct=correct, failed=False)
        assert progress.summary == "accuracy 66.7%"
        progress.add(correct=False, failed=True)
        assert progress.summary == "accuracy 50.0%, 1 failed"
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_it_shows_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with EvalProgress(2, enabled=True) as progress:
        progress.add(correct=True, failed=False)
    shown = capsys.readouterr().err
    assert "1/2" in shown
    assert "accuracy 100.0%" in shown
