#!/usr/bin/env bash
# Usage: tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [test.py arguments]
# PROCESSES on this machine: one for each GPU, or on CPUs as many as you like.
# For several nodes set NNODES, NODE_RANK, MASTER_ADDR and PORT.
set -euo pipefail
USAGE='Usage: dist_test.sh CONFIG CHECKPOINT PROCESSES [test.py arguments]'
CONFIG=${1:?$USAGE}
CHECKPOINT=${2:?$USAGE}
PROCESSES=${3:?$USAGE}
source "$(dirname "$0")/_launch.sh"
start_by_torchrun "$PROCESSES" test.py "$CONFIG" "$CHECKPOINT" \
    --launcher pytorch "${@:4}"
