"""Using a model: the KV cache, prefill in chunks, sampling, generation."""
