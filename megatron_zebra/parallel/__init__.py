"""Who computes what: the process grid and DeepSpeed ZeRO as the sharded optimizer."""
