#!/usr/bin/env bash
# Train by torchrun: on one node, or the same command on each of several.
#
#   bash launch/torchrun.sh --nproc-per-node 8 --config FILE [--section.key VALUE ...]
#   bash launch/torchrun.sh --nnodes 2 --rdzv-endpoint HOST --max-restarts 3 --config FILE [...]      # on both; HOST is one of them
#
# Options stand before --config (--help lists them), overrides of the configuration after it. docs/launching.md tells of
# the check of the nodes, signals, logs and exit codes.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/node.sh
source "$root/launch/node.sh"
exec python -m megatron_zebra.launching.with_torchrun "$@"
