"""What the processes of tests/distributed.py are forked with: the imports that take seconds."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed looks for devices

import deepspeed  # noqa: F401

import megatron_zebra.training.loop  # noqa: F401
