"""Whether every package that lrs-edge needs on a Jetson has a wheel there: asks the package index.

    python scripts/jetson_wheels.py [--jetpack 6.2]

Nothing is installed: pip resolves for another machine (`--dry-run --platform`). TensorRT is not
asked for: its Python package comes with JetPack.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
OF_JETPACK = frozenset({"tensorrt"})
"""Packages that JetPack brings."""


@dataclass(frozen=True)
class JetPack:
    """What a release of JetPack has.

    Attributes:
        python: Of its Ubuntu, such as `3.10`.
        glibc: Of its Ubuntu: the newest manylinux that runs is `manylinux_2_<glibc>`.
    """

    python: str
    glibc: int


JETPACKS = {"6.2": JetPack("3.10", 35), "7.2": JetPack("3.12", 39)}


def requirements(extras: tuple[str, ...], jetpack: JetPack) -> list[str]:
    """Names and versions that the runtime and its extras need there, without markers.

    pip looks at markers with the values of the machine that it runs on, so they are resolved here.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    there = {
        "python_version": jetpack.python,
        "python_full_version": f"{jetpack.python}.0",
        "platform_machine": "aarch64",
        "sys_platform": "linux",
        "platform_system": "Linux",
    }
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    found = []
    for line in lines:
        needed = Requirement(line)
        if needed.name in OF_JETPACK or (needed.marker and not needed.marker.evaluate(there)):
            continue
        needed.marker = None
        found.append(str(needed))
    return found


def resolve(needed: list[str], jetpack: JetPack) -> list[tuple[str, str, str]]:
    """Name, version and wheel of everything that pip would install there.

    Raises:
        RuntimeError: Something has no wheel; pip's message says what.
    """
    newest_first = (f"manylinux_2_{minor}_aarch64" for minor in range(jetpack.glibc, 16, -1))
    platforms = [
        part for tag in (*newest_first, "manylinux2014_aarch64") for part in ("--platform", tag)
    ]
    command = [
        sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet",
        "--report", "-", "--only-binary", ":all:", "--target", "unused",
        "--implementation", "cp", "--python-version", jetpack.python, *platforms, *needed,
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return sorted(
        (
            item["metadata"]["name"],
            item["metadata"]["version"],
            item["download_info"]["url"].rsplit("/", 1)[-1],
        )
        for item in json.loads(done.stdout)["install"]
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jetpack", choices=JETPACKS, action="append", help="default: all")
    parser.add_argument("--extra", action="append", help="default: cpu and tensorrt")
    options = parser.parse_args()
    missing = False
    for version in options.jetpack or JETPACKS:
        jetpack = JETPACKS[version]
        print(f"JetPack {version}: Python {jetpack.python}, glibc 2.{jetpack.glibc}, aarch64")
        needed = requirements(tuple(options.extra or ("cpu", "tensorrt")), jetpack)
        try:
            for name, found, wheel in resolve(needed, jetpack):
                print(f"  {name:24} {found:14} {wheel}")
        except RuntimeError as error:
            missing = True
            print(error, file=sys.stderr)
    return int(missing)


if __name__ == "__main__":
    sys.exit(main())
