"""Running a command for every result: a program with arguments, never a shell's line."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from lrs_edge.errors import UsageError

#: What stands for a result in a command.
PLACES = ("json", "geojson", "product", "question_id")

_PLACE = re.compile(rf"\{{({'|'.join(PLACES)})\}}")

#: Exit codes, as shells give them: the time limit was over, the program cannot be started.
TIMED_OUT = 124
NOT_STARTED = 127


@dataclass(frozen=True)
class Hook:
    """A command per result.

    Attributes:
        arguments: The program and its arguments; `{json}`, `{geojson}`, `{product}` and
            `{question_id}` stand for the result's.
        seconds: It is ended after this time.
    """

    arguments: tuple[str, ...]
    seconds: float

    def command(self, values: Mapping[str, str]) -> list[str]:
        """The arguments for one result; where none has a place, its JSON file is appended."""
        found = [_filled(argument, values) for argument in self.arguments]
        return found if found != list(self.arguments) else [*found, values["json"]]

    def run(self, values: Mapping[str, str]) -> int:
        """Run it and wait; returns its exit code. What it prints goes to standard error.

        Args:
            values: What stands in the places of `PLACES`.
        """
        try:
            process = subprocess.Popen(  # noqa: S603
                self.command(values),
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__ if sys.__stderr__ is not None else subprocess.DEVNULL,
                # A group of its own, so that it ends with all that it started.
                start_new_session=True,
            )
        except (OSError, ValueError):
            return NOT_STARTED
        try:
            return process.wait(self.seconds)
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            if process.returncode is None:
                _end(process)


def read_hook(text: str, seconds: float) -> Hook:
    """A hook from what the user typed, split as a shell splits words and in no other way like one.

    Raises:
        UsageError: It is empty, has a quote without an end, or its program is not there.
    """
    try:
        arguments = tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"--hook {text!r} cannot be split into words ({error})") from error
    if not arguments:
        raise UsageError("--hook is empty; name a program")
    if shutil.which(arguments[0]) is None:
        raise UsageError(f"--hook: there is no program {arguments[0]!r}; name one that is there")
    return Hook(arguments, seconds)


def _filled(argument: str, values: Mapping[str, str]) -> str:
    """One argument with values in its places; values are not looked at for places again."""
    return _PLACE.sub(lambda found: values[found[1]], argument)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
