"""The engines TensorRT and TensorRT-RTX: stages as engines that were built for one GPU.

One package serves both, whose Python interfaces are nearly the same: `tensorrt` on Jetson, data
centre and workstation GPUs, `tensorrt-rtx` on RTX GPUs. Neither is imported before it is needed.
**Engines are built here, and in CI with the real builder; they have never run on a card**: what
runs them is tested over a simulated device (`tests/fake_tensorrt.py`).

Read in this order: `library.py` imports the library, `stages.py` goes through a bundle's stages,
`building.py` makes an engine of a graph, for a `targets.py`, in the memory that `room.py` allows;
`engine_cache.py` keeps engines and says which may run here. `loading.py` finds the engine of a
stage, `device.py` is the GPU's memory, `execution.py` runs an engine over it, `graph.py` gives that
the contract of all graphs, `buffers.py` holds its keys and values, `rows.py` puts embeddings
together, `small.py` has the small graphs around it. For users: docs/tensorrt.md.
"""
