"""The one place that imports onnxruntime, after its telemetry has been turned off.

Without that, current versions of onnxruntime write a device id and a database under the user's home
folder, on Linux too, and after a minute look up their vendor's host to send events there.
`ORT_DISABLE_TELEMETRY` is read when onnxruntime is loaded, so it has to be set before the import;
child processes inherit it. This is the one exception to the rule that importing lrs-edge changes
nothing global: neither an image nor the fact that one was asked about may leave the machine.

A program that imports onnxruntime before lrs-edge has to set the variable itself.
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort

__all__ = ["ort"]
