#!/usr/bin/env bash
# Usage: tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT
# [test.py arguments]
# GPUS (8) processes in all, GPUS_PER_NODE (8), CPUS_PER_TASK (5), SRUN_ARGS
# and PORT are read from the environment; GRES= (empty) asks for no GPUs.
set -euo pipefail
USAGE='Usage: slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments]'
PARTITION=${1:?$USAGE}
JOB_NAME=${2:?$USAGE}
CONFIG=${3:?$USAGE}
CHECKPOINT=${4:?$USAGE}
source "$(dirname "$0")/_launch.sh"
start_by_srun "$PARTITION" "$JOB_NAME" test.py "$CONFIG" "$CHECKPOINT" \
    --launcher slurm "${@:5}"
