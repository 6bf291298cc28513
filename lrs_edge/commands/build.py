"""`lrs-edge build`: a bundle's stages as engines of TensorRT or TensorRT-RTX."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from lrs_edge.commands.common import (
    BundlePath,
    debug_option,
    format_option,
    quiet_option,
    step_teller,
    write_json,
    write_result,
)

if TYPE_CHECKING:
    from lrs_edge.engines.tensorrt.building import OnProgress
    from lrs_edge.engines.tensorrt.stages import Built, Plan

#: How often progress is written where standard error is no terminal.
_SECONDS = 30.0


@click.command()
@click.argument("bundle", required=False, metavar="[BUNDLE]", type=BundlePath())
@click.option(
    "--device",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    help="What to build for; the one that is installed when left out, tensorrt before "
    "tensorrt-rtx.",
)
@click.option(
    "--for",
    "capability",
    metavar="sm_XX",
    help="Compute capability of the GPU, such as sm_86; the GPU of this machine when left out. "
    "tensorrt-rtx builds for any of its own without a GPU, tensorrt for the one that is there.",
)
@click.option(
    "--stage",
    "stages",
    multiple=True,
    type=click.Choice(["vision", "rfm", "llm"]),
    help="Build this stage only. May be given several times.",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Longest sequence, for which memory of the key/value buffers is set aside; the bundle's, "
    "and 8192 at most, when left out.",
)
@click.option(
    "--tiles",
    type=click.IntRange(1, 16),
    default=16,
    show_default=True,
    metavar="N",
    help="Most tiles that the vision stage encodes at once; fewer take less memory of the GPU.",
)
@click.option(
    "--workspace",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    metavar="MB",
    help="Memory of the GPU that the builder may use for trying kernels.",
)
@click.option("--masked", is_flag=True, help="Also what --policy reference runs.")
@click.option("--again", is_flag=True, help="Build what is in the cache already, too.")
@format_option("text", "json")
@quiet_option
@debug_option
def build(**values: Any) -> None:
    """Build TensorRT engines of a bundle's stages, for `--device tensorrt` or `tensorrt-rtx`.

    The embedded model is built when BUNDLE is left out. Engines lie in the cache of this user, one
    for each GPU, version and length; a build that is there is not repeated.
    """
    from lrs_edge.bundle.bundle import default_bundle_path, open_bundle
    from lrs_edge.engines.tensorrt.device import find_gpu, open_device
    from lrs_edge.engines.tensorrt.engine_cache import EngineCache
    from lrs_edge.engines.tensorrt.library import find_library, installed_library
    from lrs_edge.engines.tensorrt.stages import (
        Plan,
        build_stages,
        chosen_capacity,
        chosen_stages,
    )
    from lrs_edge.engines.tensorrt.targets import choose_target

    library = find_library(values["device"]) if values["device"] else installed_library()
    bundle = open_bundle(values["bundle"] or default_bundle_path())
    gpu, missing = find_gpu()
    plan = Plan(
        bundle=bundle,
        stages=chosen_stages(bundle, values["stages"]),
        target=choose_target(library, values["capability"], gpu, missing),
        capacity=chosen_capacity(bundle, values["context"]),
        workspace=values["workspace"] << 20,
        tiles=values["tiles"],
        masked=values["masked"],
        again=values["again"],
    )
    display = _Display(quiet=values["quiet"])
    display.tell(
        f"building {', '.join(plan.stages)} of {bundle.manifest.name} for {plan.target} with "
        f"{library.name} {library.version}"
    )
    cache, built = EngineCache(), []
    for found in build_stages(library, plan, cache, open_device() if gpu else None, display.begin):
        display.done(found)
        built.append(found)
    if values["output_format"] == "json":
        write_json({"engines": [_facts(found) for found in built]})
    else:
        write_result("".join(f"{found.engine.path}\n" for found in built), None)


def _facts(built: Built) -> dict[str, Any]:
    import msgspec

    facts: dict[str, Any] = msgspec.to_builtins(built.engine.record)
    more = {"path": str(built.engine.path), "seconds": round(built.seconds, 1)}
    return facts | more | {"in_cache": built.known}


class _Display:
    """What is built and how far it is, on standard error."""

    def __init__(self, *, quiet: bool) -> None:
        self.tell = step_teller(quiet=quiet)
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._shown = 0.0

    def begin(self, name: str, _plan: Plan) -> OnProgress | None:
        """Say that an engine is being built; gives what is told its steps."""
        from time import monotonic

        self.tell(f"{name}: building ...")
        if self._quiet:
            return None
        self._shown = monotonic()

        def step(phase: str, done: int, of: int) -> None:
            if monotonic() - self._shown < (0.2 if self._terminal else _SECONDS):
                return
            self._shown = monotonic()
            line = f"{name}: {phase.lower()}, {done} of {of}"
            click.echo(
                f"\r\x1b[K{line}" if self._terminal else line, err=True, nl=not self._terminal
            )

        return step

    def done(self, built: Built) -> None:
        """Say that an engine is there."""
        record = built.engine.record
        if self._terminal and not self._quiet:
            click.echo("\r\x1b[K", err=True, nl=False)
        how = "in the cache" if built.known else f"built in {built.seconds:.1f} s"
        self.tell(f"{record.stage} ({record.flavour}): {record.size / 1e6:.1f} MB, {how}")
