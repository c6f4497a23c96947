"""What the processes of tests/distributed.py are forked with: the imports that take seconds."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed looks for devices

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # DeepSpeed's first engine imports it, and with it Inductor

import megatron_zebra.training.loop  # noqa: F401
