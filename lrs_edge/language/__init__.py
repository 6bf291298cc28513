"""The language model: prompt layout, sequences, KV cache, prefill, decoding, sampling."""
