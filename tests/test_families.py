"""The list of families, what it refuses, and what the documentation says of both."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exporting needs the `export` extra")

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.families.refusals import REFUSED
from lrs_edge_export.families.registry import FAMILIES, find_family
from tests import transformers_parity as parity
from tests.checkpoints import write_json, write_nano, write_qwen

DOCS = (Path(__file__).resolve().parent.parent / "docs" / "families.md").read_text("utf-8")


def test_every_family_has_a_row_and_a_section() -> None:
    sections = set(re.findall(r"^## (\S+)$", DOCS, re.MULTILINE))
    for family in FAMILIES:
        assert f"[`{family.name}`]" in DOCS
        assert family.name in sections
        for architecture in family.architectures:
            assert architecture in DOCS


def test_names_are_one_each() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)


def test_layouts_of_models_trained_with_this_method(tmp_path: Path) -> None:
    parity.assert_documented(write_qwen(tmp_path / "qwen"))
    parity.assert_documented(write_nano(tmp_path / "nano"))


@pytest.mark.parametrize("architecture", sorted(REFUSED))
def test_refusals_say_why_and_what_is_taken(tmp_path: Path, architecture: str) -> None:
    assert not any(architecture in family.architectures for family in FAMILIES)
    write_json(tmp_path / "config.json", {"architectures": [architecture]})
    with pytest.raises(ExportError) as error:
        find_family(find_checkpoint(str(tmp_path)))
    said = str(error.value)
    assert architecture in said
    assert REFUSED[architecture] in said
    assert all(name in said for family in FAMILIES for name in family.architectures)
