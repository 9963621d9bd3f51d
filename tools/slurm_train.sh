#!/usr/bin/env bash
# Usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG [train.py arguments]
# GPUS (8) processes in all, GPUS_PER_NODE (8), CPUS_PER_TASK (5), SRUN_ARGS
# and PORT are read from the environment; GRES= (empty) asks for no GPUs.
set -euo pipefail
USAGE='Usage: slurm_train.sh PARTITION JOB_NAME CONFIG [train.py arguments]'
PARTITION=${1:?$USAGE}
JOB_NAME=${2:?$USAGE}
CONFIG=${3:?$USAGE}
GPUS=${GPUS:-8}
PER_NODE=${GPUS_PER_NODE:-8}
# A small job fits one node.
PER_NODE=$((GPUS < PER_NODE ? GPUS : PER_NODE))
GRES=${GRES-gpu:$PER_NODE}
export MASTER_PORT=${PORT:-${MASTER_PORT:-29500}}
# shellcheck disable=SC2086
exec srun -p "$PARTITION" --job-name="$JOB_NAME" \
    ${GRES:+--gres="$GRES"} --ntasks="$GPUS" \
    --ntasks-per-node="$PER_NODE" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$CONFIG" \
    --launcher slurm "${@:4}"
