"""What a configuration costs: FLOPs and memory. Pure."""
