"""`lrs-edge doctor`: what this machine can run."""

from __future__ import annotations

from dataclasses import asdict

import click

from lrs_edge.commands.check import Check
from lrs_edge.commands.checks import exit_code, run_checks
from lrs_edge.commands.common import debug_option, format_option, one_line, write_json, write_result


@click.command()
@format_option("text", "json")
@debug_option
@click.pass_context
def doctor(ctx: click.Context, output_format: str) -> None:
    """Check versions, providers, GPU, memory and the embedded model, and say what to do.

    Exit code 0 where `lrs-edge ask` can work, 5 where an engine is missing, 4 where the model is.
    """
    checks = run_checks()
    code = exit_code(checks)
    if output_format == "json":
        facts = {"ready": code == 0, "checks": [asdict(check) for check in checks]}
        write_json(facts)
    else:
        write_result(_text(checks, code), None)
    ctx.exit(code)


def _text(checks: list[Check], code: int) -> str:
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<8} {check.name:<{width}}  {one_line(check.detail)}")
        if check.advice:
            lines.append(f"{'':<8} {'':<{width}}  -> {check.advice}")
    verdict = "`lrs-edge ask` can work." if code == 0 else "`lrs-edge ask` cannot work yet."
    return "\n".join([*lines, verdict]) + "\n"
