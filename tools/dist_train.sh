#!/usr/bin/env bash
# Usage: tools/dist_train.sh CONFIG PROCESSES [train.py arguments]
# PROCESSES on this machine: one for each GPU, or on CPUs as many as you like.
# For several nodes set NNODES, NODE_RANK, MASTER_ADDR and PORT.
set -euo pipefail
USAGE='Usage: dist_train.sh CONFIG PROCESSES [train.py arguments]'
CONFIG=${1:?$USAGE}
PROCESSES=${2:?$USAGE}
if [ "${NNODES:-1}" = 1 ] && [ -z "${PORT:-}" ]; then
    MEETING=(--standalone)  # on a free port
else
    MEETING=(--nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}"
             --master_addr="${MASTER_ADDR:-127.0.0.1}"
             --master_port="${PORT:-29500}")
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${MEETING[@]}" \
    --nproc_per_node="$PROCESSES" \
    "$(dirname "$0")/train.py" "$CONFIG" --launcher pytorch "${@:3}"
