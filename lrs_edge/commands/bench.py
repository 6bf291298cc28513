"""`lrs-edge bench`: how fast each stage is on this machine, and how far from its limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from lrs_edge.commands.common import (
    check_output,
    debug_option,
    format_option,
    printable,
    step_teller,
    write_result,
)
from lrs_edge.commands.search_options import engine_options, model_option

_STAGES = ("load", "read", "encode", "rfm", "prefill", "decode")
#: Numbers beyond these would only run out of memory.
_MOST_TOKENS, _MOST_TILES, _MOST_REPETITIONS = 1 << 20, 1 << 12, 1 << 12


def _numbers(least: int) -> Callable[[str], tuple[int, ...]]:
    """A click type: numbers of tokens separated by commas, such as `128,512`."""

    def convert(text: str) -> tuple[int, ...]:
        try:
            numbers = tuple(int(part) for part in text.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(least <= number <= _MOST_TOKENS for number in numbers):
            raise click.BadParameter(
                f"{text!r} is not a list of whole numbers of {least}..{_MOST_TOKENS} such as "
                "128,512"
            )
        return tuple(dict.fromkeys(numbers))

    return convert


def _stage_names(text: str) -> tuple[str, ...]:
    """A click type: names of stages separated by commas."""
    names = text.split(",")
    for name in names:
        if name not in _STAGES:
            raise click.BadParameter(f"{name!r} is not a stage; choose from {','.join(_STAGES)}")
    return tuple(name for name in _STAGES if name in names)


@click.command()
@model_option
@click.option(
    "-p",
    "--n-prompt",
    "prompts",
    type=_numbers(1),
    default="512",
    show_default=True,
    metavar="N[,N...]",
    help="Tokens of the prompts that prefill is measured with.",
)
@click.option(
    "-n",
    "--n-gen",
    "generated",
    type=_numbers(1),
    default="64",
    show_default=True,
    metavar="N[,N...]",
    help="Tokens that are decoded.",
)
@click.option(
    "-d",
    "--n-depth",
    "depths",
    type=_numbers(0),
    default="512",
    show_default=True,
    metavar="N[,N...]",
    help="Tokens in the KV cache before decoding.",
)
@click.option(
    "-r",
    "--repetitions",
    type=click.IntRange(1, _MOST_REPETITIONS),
    default=5,
    show_default=True,
    metavar="N",
    help="Times that each stage is measured.",
)
@click.option("--no-warmup", "warmup", flag_value=False, default=True, type=bool,
              help="Measure the first run of each stage too.")  # fmt: skip
@click.option(
    "--tiles",
    type=click.IntRange(1, _MOST_TILES),
    default=16,
    show_default=True,
    metavar="N",
    help="Tiles that are read, encoded, and scored as one level by the RFM.",
)
@click.option(
    "--image",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Image to read tiles from; a synthetic GeoTIFF when left out.",
)
@click.option(
    "--stages",
    type=_stage_names,
    default=",".join(_STAGES),
    show_default=True,
    metavar="NAME[,NAME...]",
    help="What is measured.",
)
@engine_options
@format_option("md", "csv", "json")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write there instead of to standard output.",
)
@click.option("-q", "--quiet", is_flag=True, is_eager=True, help="No progress on standard error.")
@debug_option
def bench(
    bundle: Path | None,
    prompts: tuple[int, ...],
    generated: tuple[int, ...],
    depths: tuple[int, ...],
    repetitions: int,
    warmup: bool,
    tiles: int,
    image: Path | None,
    stages: tuple[str, ...],
    device: str,
    threads: int | None,
    kv_cache: str,
    verify: bool,
    output_format: str,
    output: Path | None,
    quiet: bool,
) -> None:
    """Measure each stage of a bundle on this machine, like llama-bench.

    Every row has its time, its floor (the least time that this machine could take, from operations
    and bytes and from peaks that are measured too), memory, and bytes read. docs/bench.md says how
    to read it.
    """
    check_output(output, *([] if image is None else [image]))
    from lrs_edge.benchmarking import tables
    from lrs_edge.benchmarking.run import BenchOptions, run_bench

    options = BenchOptions(
        stages=stages,
        prompts=prompts,
        generated=generated,
        depths=depths,
        tiles=tiles,
        repetitions=repetitions,
        warmup=warmup,
        image=image,
        device=device,
        threads=threads,
        kv_cache=kv_cache,
        verify=verify,
    )
    found = run_bench(bundle, options, step_teller(quiet=quiet))
    writers = {"md": tables.to_markdown, "csv": tables.to_csv, "json": tables.to_json}
    write_result(printable(writers[output_format](found)), output)
