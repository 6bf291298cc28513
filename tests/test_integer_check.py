"""Loading a bundle asks the processor for a known integer product."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from lrs_edge.bundle.bundle import default_bundle_path, open_bundle
from lrs_edge.bundle.manifest import Manifest
from lrs_edge.commands import checks as doctor
from lrs_edge.engines import integer_check
from lrs_edge.engines.integer_check import integer_products, integer_warnings
from lrs_edge.errors import BackendError
from tests.integer_cpu import saturating_product


class Session:
    """An engine on a processor without VNNI, which cuts sums off at 16 bits; or a worse one."""

    def __init__(self, broken: bool) -> None:
        self._broken = broken
        self._weight = np.zeros((0, 0), np.int8)

    def __call__(self, *_: object, **__: object) -> Session:
        return self

    def take(self, weight: np.ndarray) -> None:
        self._weight = weight

    def run(self, _: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        x = feeds["x"]
        if self._broken:
            x = np.minimum(x, 127)
        return [saturating_product(x, self._weight, 0)]


def pretend(monkeypatch: pytest.MonkeyPatch, *, broken: bool = False) -> None:
    session = Session(broken)
    real = integer_check.one_node_model

    def model(operator: str, inputs: list[str], types: dict, constants: dict) -> bytes:
        session.take(constants["weight"])
        return real(operator, inputs, types, constants)

    monkeypatch.setattr(integer_check, "one_node_model", model)
    monkeypatch.setattr(integer_check.ort, "InferenceSession", session)


#: Stages on the CPU.
ALL = ("vision", "rfm", "llm")


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return open_bundle(default_bundle_path()).manifest


def test_this_processor_is_right_for_bundles(manifest: Manifest) -> None:
    assert integer_products() in ("exact", "narrow")
    written_now = msgspec.structs.replace(manifest, exact_integers=True)
    assert integer_warnings(written_now, ALL) == ()


def test_a_processor_without_vnni_is_right_for_new_bundles_only(
    monkeypatch: pytest.MonkeyPatch, manifest: Manifest
) -> None:
    pretend(monkeypatch)
    assert integer_products() == "narrow"
    new, old = (msgspec.structs.replace(manifest, exact_integers=flag) for flag in (True, False))
    assert integer_warnings(new, ALL) == ()
    (warning,) = integer_warnings(old, ALL)
    assert "wrong on this processor" in warning
    assert "export it again" in warning
    # Nothing of it is computed in integers on a GPU, or in floats.
    assert integer_warnings(old, ()) == ()
    parts = {
        name: msgspec.structs.replace(getattr(old, name), precision="int8-weight")
        for name in ("vision", "rfm", "llm")
    }
    assert integer_warnings(msgspec.structs.replace(old, **parts), ALL) == ()
    assert doctor._integers().status == "ok"


def test_a_processor_that_is_always_wrong_is_refused(
    monkeypatch: pytest.MonkeyPatch, manifest: Manifest
) -> None:
    pretend(monkeypatch, broken=True)
    assert integer_products() == "wrong"
    with pytest.raises(BackendError, match="int8-weight"):
        integer_warnings(manifest, ALL)
    check = doctor._integers()
    assert (check.status, check.exit_code) == ("missing", BackendError.exit_code)
    assert check.advice
