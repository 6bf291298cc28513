"""Which tiles are looked at, which tokens matter; `coarse_to_fine.py` is the paper's loop."""
