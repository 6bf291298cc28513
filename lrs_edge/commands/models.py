"""`lrs-edge models`: list and verify bundles."""

from __future__ import annotations

from pathlib import Path

import click

from lrs_edge.commands.common import debug_option, printable, write_result
from lrs_edge.errors import BundleError


@click.group()
def models() -> None:
    """List and verify model bundles."""


@models.command("list")
@debug_option
def list_models() -> None:
    """Show the model that comes with this installation."""
    from lrs_edge.bundle.bundle import default_bundle_path, read_manifest

    path = default_bundle_path()
    manifest = read_manifest(path)
    size = sum(entry.size for entry in manifest.files.values())
    write_result(
        printable(f"{manifest.name}  {size / 1e6:.0f} MB  {manifest.licence}  {path}\n"), None
    )


@models.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@debug_option
def verify(bundle: Path | None) -> None:
    """Check the size and SHA-256 of every file of BUNDLE (the embedded model when left out).

    Exit code 4 where a file is not what the manifest says.
    """
    from lrs_edge.bundle.bundle import default_bundle_path, verify_bundle

    path = default_bundle_path() if bundle is None else bundle
    checks = verify_bundle(path)
    width = max((len(check.path) for check in checks), default=0)
    lines = [
        f"{'BAD' if check.problem else 'ok':<4} {check.path:<{width}} {check.size:>13,}"
        + (f"  {check.problem}" if check.problem else "")
        for check in checks
    ]
    write_result(printable("\n".join(lines)) + "\n", None)
    failed = [f"{check.path} ({check.problem})" for check in checks if check.problem]
    if failed:
        raise BundleError(
            f"{path}: {len(failed)} of {len(checks)} files are not as the manifest says: "
            f"{', '.join(failed)}; copy or export the bundle again"
        )
