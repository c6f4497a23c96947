"""The Zebra decoder: layer pattern, RoPE, attention layer, MLP, block, loss."""
