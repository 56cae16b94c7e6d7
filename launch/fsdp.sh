#!/usr/bin/env bash
# Starts this node's ranks of a run with a sharded model: ddp.sh, and its variables, with
# --parallel fsdp2. One such line on each machine:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/fsdp.sh --preset 7m --gather block8
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/fsdp.sh --parallel hsdp --hierarchy 8
# Arguments are those of `commrt train`; --hierarchy is the number of ranks a machine.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/ddp.sh" --parallel fsdp2 "$@"
