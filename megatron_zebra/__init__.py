"""Megatron-Zebra: distributed training of long-context language models with grouped local-global attention."""

__version__ = "0.1.0"
