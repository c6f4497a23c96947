#!/usr/bin/env bash
# Train by DeepSpeed's launcher, which starts the processes of all nodes from this one, over ssh (pdsh).
#
#   bash launch/deepspeed/train.sh --hostfile hostfile --max-restarts 3 --config FILE [--section.key VALUE ...]
#   bash launch/deepspeed/train.sh --num_gpus 8 --config FILE [...]                                   # this node alone
#
# Options stand before --config (--help lists them), overrides of the configuration after it. docs/launching.md tells of
# the check of the nodes, signals, logs and exit codes.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=launch/node.sh
source "$root/launch/node.sh"
exec python -m megatron_zebra.launching.with_deepspeed "$@"
