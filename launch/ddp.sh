#!/usr/bin/env bash
# Starts this node's ranks of a run over several machines: one such line on each of them, where
# NODE_RANK counts up from 0 on the machine that MASTER_ADDR names.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/ddp.sh --preset 7m --codec loco4 --out runs/a
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/ddp.sh -- script.py ARGUMENTS
# Arguments are those of `commrt train`; after -- they are a script or -m MODULE, and its own.
#
#   NNODES          number of machines, 1 by default
#   NODE_RANK       0 on the machine of MASTER_ADDR, where they all meet; SLURM_NODEID in a Slurm
#                   job. Ranks are numbered by the machines' addresses, not by this
#   MASTER_ADDR     name or address of that machine, 127.0.0.1 for a single one
#   MASTER_PORT     a port that is free there, 29400 by default
#   NPROC_PER_NODE  ranks on this machine: one a GPU by default, one without any
#   IFNAME          network interface of gloo and NCCL, such as eth0. Needed where a machine's own
#                   name leads to 127.0.0.1 or 127.0.1.1
#   NODE_ADDR       this machine's address, that of IFNAME by default
#   MAX_RESTARTS    times that all ranks are started anew after one failed, 0 by default
#   RUN_ID          of two runs on one MASTER_PORT, commrt by default
#   COMMRT_VENV     virtual environment where python3 has no torch, .venv by default
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "ddp.sh: $*" >&2
    exit 2
}

nnodes=${NNODES:-1}
node_rank=${NODE_RANK:-${SLURM_NODEID:-}}
[[ $nnodes =~ ^[1-9][0-9]*$ ]] || fail "NNODES is $nnodes: it must be a number from 1"
if [[ $nnodes == 1 ]]; then
    node_rank=${node_rank:-0} MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
fi
[[ -n ${MASTER_ADDR:-} ]] || fail "MASTER_ADDR is not set: it must be the address of node 0"
[[ $node_rank =~ ^[0-9]+$ ]] && ((node_rank < nnodes)) ||
    fail "NODE_RANK is '$node_rank': it must be a number from 0 to $((nnodes - 1))"

python=python3
if ! "$python" -c 'import importlib.util as i; raise SystemExit(not i.find_spec("torch"))'; then
    python=$(cd "$root" && realpath --canonicalize-missing "${COMMRT_VENV:-.venv}")/bin/python
    [[ -x $python ]] || fail "python3 has no torch and $python is not there: run launch/test first"
fi

if [[ -n ${IFNAME:-} ]]; then
    export GLOO_SOCKET_IFNAME=$IFNAME NCCL_SOCKET_IFNAME=$IFNAME
    address=$(ip -4 -oneline address show dev "$IFNAME" | grep -oPm1 'inet \K[^/ ]+') ||
        fail "IFNAME is $IFNAME: it must be a network interface with an IPv4 address"
    NODE_ADDR=${NODE_ADDR:-$address}
fi
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
# A store that outlives a restart hands gloo the addresses of the ranks before it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}

command=(-m commrt train "$@")
if [[ ${1:-} == -- ]]; then
    command=("${@:2}")
fi
exec "$python" -m torch.distributed.run \
    --nnodes "$nnodes" \
    --nproc-per-node "${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}" \
    --max-restarts "${MAX_RESTARTS:-0}" \
    --rdzv-backend c10d \
    --rdzv-id "${RUN_ID:-commrt}" \
    --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}" \
    --rdzv-conf "is_host=$((node_rank == 0))" \
    ${NODE_ADDR:+--local-addr "$NODE_ADDR"} \
    "${command[@]}"
