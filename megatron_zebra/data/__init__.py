"""From text to batches: indexed files, tokenizers, packing, order, blends."""
