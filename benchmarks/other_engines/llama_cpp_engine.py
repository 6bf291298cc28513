"""llama.cpp through the C functions that llama-cpp-python binds, as llama-bench uses them."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import llama_cpp

#: llama.cpp's own names of the file types that `quantize` writes.
FILE_TYPES = {
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}


class LlamaCppEngine:
    """A worker's engine over one context.

    Args:
        path: GGUF file.
        threads: Threads of both prefill and decode.
        places: Tokens that the context must hold.

    Raises:
        RuntimeError: The file cannot be loaded.
    """

    def __init__(self, path: Path, threads: int, places: int) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = places
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        if path.stem == "F32":
            # The default is a half-precision cache; float32 is compared with float32.
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        context = llama_cpp.llama_init_from_model(model, params) if model else None
        if not context:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._context = context
        self._memory = llama_cpp.llama_get_memory(context)
        self._greedy = llama_cpp.llama_sampler_init_greedy()
        # llama.cpp keeps a pointer to a batch's tokens.
        self._held: object = None

    def start(self) -> None:
        """Forget all tokens."""
        llama_cpp.llama_memory_clear(self._memory, True)

    def prefill(self, ids: list[int]) -> None:
        """Run a prompt through the model in batches of 512; logits of its last token only."""
        for start in range(0, len(ids), 512):
            self._run(ids[start : start + 512])

    def decode(self, steps: int) -> list[int]:
        """Decode greedily."""
        chosen = [self._choose()]
        for _ in range(steps):
            self._run(chosen[-1:])
            chosen.append(self._choose())
        return chosen

    def _run(self, ids: list[int]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        self._held = tokens
        code = llama_cpp.llama_decode(
            self._context, llama_cpp.llama_batch_get_one(tokens, len(ids))
        )
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code}")

    def _choose(self) -> int:
        return int(llama_cpp.llama_sampler_sample(self._greedy, self._context, -1))


def load(path: Path, threads: int, places: int) -> LlamaCppEngine:
    """Load the engine."""
    return LlamaCppEngine(path, threads, places)


def version() -> str:
    """Of the bindings, and what llama.cpp was compiled for."""
    features = llama_cpp.llama_print_system_info().decode().strip()
    return f"llama-cpp-python {llama_cpp.__version__}; {features}"


def quantize(source: Path, target: Path) -> None:
    """Write a GGUF file at the precision that its name says.

    Raises:
        RuntimeError: llama.cpp refuses.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[target.stem]
    part = target.with_suffix(".part")
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(part).encode(), ctypes.byref(params)
    )
    if code != 0:
        raise RuntimeError(f"llama_model_quantize gave {code} for {target}")
    part.rename(target)


if __name__ == "__main__":
    quantize(Path(sys.argv[1]), Path(sys.argv[2]))
