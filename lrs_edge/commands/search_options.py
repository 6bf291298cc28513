"""Options that the commands which run a model share: the engine's, and those of a question.

`ask` and `eval` answer questions with the same options; each is declared here once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar, get_args

import click

from lrs_edge.commands.common import (
    BundlePath,
    bands_option,
    crs_option,
    number_list,
    view_options,
)
from lrs_edge.engines.cores import available_cores
from lrs_edge.engines.devices import AUTO, backend_options
from lrs_edge.errors import UsageError
from lrs_edge.requests.options import AskOptions, Policy, Prune, Resampling, SearchMode

Decorated = TypeVar("Decorated", bound=Callable[..., object])

_AT_LEAST_ONE = click.IntRange(min=1)


def layer_list(text: str) -> tuple[int, ...]:
    """A click type: layers separated by commas, such as `8,16,24`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of layers such as 8,16,24") from error


def _choices(literal: object) -> click.Choice[str]:
    return click.Choice(list(get_args(literal)))


_ASK_OPTIONS = (
    click.option(
        "--policy",
        type=_choices(Policy),
        default=AskOptions.policy,
        show_default=True,
        help="full searches to the original resolution; reference does what the authors' code "
        "does.",
    ),
    click.option(
        "--search",
        type=_choices(SearchMode),
        default=AskOptions.search,
        show_default=True,
        help="pyramid looks at the best tiles of each level; exhaustive at every tile of the "
        "finest one.",
    ),
    click.option(
        "--prune",
        type=_choices(Prune),
        default=AskOptions.prune,
        show_default=True,
        help="How vision tokens are chosen; the others are there for comparison with rfm.",
    ),
    click.option(
        "--prune-ratio",
        type=float,
        metavar="SHARE",
        help="Share of the vision tokens that fastv and pdrop drop at each cut (default: 1/2), and "
        "visionzip (8/9) and prumerge (as each tile's outliers ask) in each tile.",
    ),
    click.option(
        "--prune-layers",
        type=layer_list,
        metavar="K[,K...]",
        help="Where fastv and pdrop cut, among the bundle's --attention-layers; default: fastv at "
        "the first, pdrop at all.",
    ),
    click.option(
        "--resampling",
        type=_choices(Resampling),
        default=AskOptions.resampling,
        show_default=True,
        help="area averages through overviews; reference is bilinear without antialiasing; "
        "processor resizes as the image processor of the model's family does.",
    ),
    click.option(
        "--max-tiles",
        type=click.IntRange(min=0),
        metavar="N",
        help="Most tiles looked at; 0 leaves the global view alone.",
    ),
    click.option(
        "--tiles-per-level",
        type=_AT_LEAST_ONE,
        default=AskOptions.tiles_per_level,
        show_default=True,
        metavar="N",
        help="Most tiles looked at in one level finer than the base.",
    ),
    click.option(
        "--max-vision-tokens",
        type=_AT_LEAST_ONE,
        metavar="N",
        help="Most vision tokens given to the language model.",
    ),
    click.option(
        "--kv-budget",
        type=_AT_LEAST_ONE,
        metavar="N",
        help="Most tokens left in the language model's KV cache after prefill.",
    ),
    click.option(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="Cut the answer short after this time; exit code 6 where that happens.",
    ),
    click.option(
        "--max-tokens",
        type=_AT_LEAST_ONE,
        default=AskOptions.max_tokens,
        show_default=True,
        metavar="N",
        help="Most tokens generated.",
    ),
    click.option(
        "--temperature",
        type=float,
        default=AskOptions.temperature,
        show_default=True,
        metavar="T",
        help="0 for greedy decoding.",
    ),
    click.option(
        "--top-p",
        type=float,
        default=AskOptions.top_p,
        show_default=True,
        metavar="P",
        help="Nucleus of sampled decoding.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=AskOptions.seed,
        show_default=True,
        metavar="N",
        help="Seed of sampled decoding, and of --prune random.",
    ),
    click.option(
        "--end-str",
        default=AskOptions.end_str,
        metavar="TEXT",
        help="Instruction put on a line after the question.",
    ),
)


def threads_callback(ctx: click.Context, _param: click.Parameter, value: int | None) -> int | None:
    """Threads cut down to the cores there are, and said so: more of them stall each other."""
    used = None if value is None else min(value, available_cores())
    if used != value and not ctx.params.get("quiet"):  # --quiet is eager, so it is known.
        click.echo(
            f"--threads {value}: this process may use {used} core{'s' * (used != 1)}; taking that",
            err=True,
        )
    return used


def device_name(text: str) -> str:
    """A click type: where stages run, as `backend_options` reads it."""
    try:
        backend_options(text)
    except UsageError as error:
        raise click.BadParameter(str(error)) from error
    return text


device_name.__name__ = "device"  # What click calls the type.

#: Decorator that adds `--device`, and its older name `--provider`.
device_option = click.option(
    "--device",
    "--provider",
    "device",
    type=device_name,
    default=AUTO,
    show_default=True,
    metavar="DEVICE",
    help="Where the stages run: auto, cpu, cuda, tensorrt, tensorrt-rtx, onnxruntime:PROVIDER, or "
    "one each, such as vision=cuda,llm=cpu. A stage that cannot run there is an error; auto takes "
    "what works.",
)

_ENGINE_OPTIONS = (
    device_option,
    click.option(
        "--threads",
        type=_AT_LEAST_ONE,
        callback=threads_callback,
        metavar="N",
        help="Threads of one operation, at most one per core that may be used; default: one per "
        "physical core.",
    ),
    click.option(
        "--kv-cache",
        type=click.Choice(["float", "int8"]),
        default="float",
        show_default=True,
        help="Type of the language model's KV cache. int8 takes a quarter of the memory, needs a "
        "bundle exported with --int8-kv, and on a CPU makes prefill 3 to 4 times as slow.",
    ),
    click.option(
        "--no-verify",
        "verify",
        flag_value=False,
        default=True,
        type=bool,
        help="Skip the hashes of the bundle's large files.",
    ),
)

_IMAGE_OPTIONS = (
    bands_option,
    click.option(
        "--range",
        "value_range",
        type=number_list(float, (2,)),
        metavar="LO,HI",
        help="Pixel values shown as black and white, in place of the 2 % stretch.",
    ),
    crs_option,
    *view_options,
)

#: Decorator that adds `-m/--model`; the value is called `bundle`.
model_option = click.option(
    "-m",
    "--model",
    "bundle",
    type=BundlePath(),
    metavar="BUNDLE",
    help="Bundle directory, or a name of `lrs-edge models list`; the embedded model when left out.",
)


def _decorate(command: Decorated, options: tuple[Callable[[Any], Any], ...]) -> Decorated:
    for option in reversed(options):
        command = option(command)
    return command


def ask_options(command: Decorated) -> Decorated:
    """Decorator that adds one option per field of `AskOptions`; see `take_ask_options`."""
    return _decorate(command, _ASK_OPTIONS)


def image_options(command: Decorated) -> Decorated:
    """Decorator that adds `--bands`, `--range` (`value_range`), `--crs` and `view_options`."""
    return _decorate(command, _IMAGE_OPTIONS)


def engine_options(command: Decorated) -> Decorated:
    """Decorator that adds `--device`, `--threads`, `--kv-cache` and `--no-verify` (`verify`)."""
    return _decorate(command, _ENGINE_OPTIONS)


def take_ask_options(values: dict[str, Any]) -> AskOptions:
    """Remove the options of a question from a command's values and check them.

    Raises:
        UsageError: A value is not valid.
    """
    return AskOptions(**{field.name: values.pop(field.name) for field in fields(AskOptions)})


def check_value_range(value_range: tuple[float, ...] | None) -> None:
    """Check `--range`.

    Raises:
        UsageError: The numbers are not finite, or not in ascending order.
    """
    if value_range is not None and not -math.inf < value_range[0] < value_range[1] < math.inf:
        raise UsageError("--range takes two numbers, the lower one first, such as 0,3000")
