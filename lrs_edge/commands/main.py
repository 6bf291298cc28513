"""The `lrs-edge` command: finds its subcommands lazily, and turns every error into one line.

`lrs-edge --help` imports nothing heavier than click: a subcommand's module is imported when the
subcommand is used, and imports the engine, rasterio or torch only when it runs.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import IO, NoReturn

import click

from lrs_edge import __version__
from lrs_edge.commands.common import DEBUG_KEY, OWNS_PROCESS_KEY, one_line
from lrs_edge.errors import BackendError, LrsEdgeError, OutOfMemoryError, out_of_memory
from lrs_edge.requests.memory import means_no_memory

#: Exit codes beside those of `errors.py`: a bug, Ctrl-C, and nobody reads what is written.
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

PROGRAM = "lrs-edge"


#: Every command and what it is for; command `x` is `x` in `lrs_edge.commands.x`.
COMMANDS = {
    "ask": "Ask a question about an image.",
    "watch": "Ask every product that lands in a folder.",
    "eval": "Run a bundle over a question file and score its answers.",
    "calibrate": "Fit how sure a bundle's answers are, and write it into a copy.",
    "info": "Show facts about an image or a bundle, and what a model takes in memory.",
    "doctor": "Check what this machine can run, and say what to do.",
    "bench": "Measure each stage on this machine, against its floor.",
    "models": "Fetch, list, verify, pack and remove model bundles, and list recipes.",
    "export": "Turn a checkpoint into a bundle.",
    "build": "Build TensorRT engines of a bundle.",
    "scenes": "Make large question-answer scenes from labelled tiles.",
    "distill": "Train the region focus module of a checkpoint.",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names of all commands, in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command itself, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"lrs_edge.commands.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands with the help kept in `COMMANDS`."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _show_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"{PROGRAM} {__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Ask questions about very large satellite and aerial images, where the image is.

    Exit codes: 0 ok, 1 failure, 2 usage, 3 unreadable image, 4 bundle refused, 5 backend or memory,
    6 timed out with a partial answer, 7 products in quarantine (watch).
    """


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    end_in_order()
    sys.exit(run(owns_process=True))


def end_in_order() -> None:
    """Let SIGTERM end this process as an exception, so that temporary folders are removed."""

    def end(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    # Python runs handlers in the main thread, and lets no other set them.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def run(arguments: Sequence[str] | None = None, *, owns_process: bool = False) -> int:
    """Run one command line.

    Args:
        arguments: Without the program's name; None for those of the process.
        owns_process: Whether the process ends with the command, so that GDAL may be restricted
            in all of it.

    Returns:
        The exit code. Refusals and failures are one line on stderr.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    # A terminal that cannot show a character gets a replacement, never a traceback.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    meta: dict[str, bool] = {DEBUG_KEY: False, OWNS_PROCESS_KEY: owns_process}
    try:
        with cli.make_context(PROGRAM, argv, obj=meta) as context:
            cli.invoke(context)
    except click.exceptions.Exit as finished:
        return finished.exit_code
    except BaseException as error:
        return _report(error, debug=meta[DEBUG_KEY])
    return 0


def _report(error: BaseException, *, debug: bool) -> int:
    """Tell the user about an error on one line of stderr, and choose the exit code."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        _silence(sys.stdout)
        return EXIT_BROKEN_PIPE
    if debug:
        traceback.print_exception(error)
    message, code = _describe(error)
    click.echo(f"{PROGRAM}: error: {one_line(message)}", err=True)
    return code


def _describe(error: BaseException) -> tuple[str, int]:
    """What to say about an error, and the exit code."""
    match error:
        case KeyboardInterrupt() | click.Abort():
            described = "interrupted", EXIT_INTERRUPTED
        case click.UsageError(ctx=click.Context() as context):
            hint = f"(see `{context.command_path} --help`)"
            described = f"{error.format_message()} {hint}", error.exit_code
        case click.ClickException():
            described = error.format_message(), error.exit_code
        case OutOfMemoryError():
            described = str(error), error.exit_code
        case LrsEdgeError() if not means_no_memory(error.__cause__):
            described = str(error), error.exit_code
        case Exception() if means_no_memory(error):
            failed = out_of_memory("the command cannot go on", error)
            described = str(failed), failed.exit_code
        case ModuleNotFoundError(name=str() as package) if not package.startswith("lrs_edge"):
            extras, code = (
                ("cpu", BackendError.exit_code)
                if package == "onnxruntime"
                else ("cpu,export", EXIT_FAILURE)
            )
            advice = f"run, where lrs-edge was installed from: pip install '.[{extras}]'"
            described = f"the package {package} is needed and not installed; {advice}", code
        case OSError(filename=file, strerror=str() as reason):
            described = f"{file or 'standard output'}: {reason}", EXIT_FAILURE
        case Exception():
            what = f"{type(error).__name__}: {error}"
            described = f"this is a bug in lrs-edge: {what} (--debug shows where)", EXIT_FAILURE
        case _:
            raise error
    return described


def _silence(stream: IO[str]) -> None:
    """Send what is still buffered nowhere, so that the interpreter's last flush cannot fail."""
    try:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
    except OSError:
        return


if __name__ == "__main__":
    main()
