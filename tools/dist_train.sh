#!/usr/bin/env bash
# Usage: tools/dist_train.sh CONFIG PROCESSES [train.py arguments]
# PROCESSES on this machine: one for each GPU, or on CPUs as many as you like.
# For several nodes set NNODES, NODE_RANK, MASTER_ADDR and PORT.
set -euo pipefail
USAGE='Usage: dist_train.sh CONFIG PROCESSES [train.py arguments]'
CONFIG=${1:?$USAGE}
PROCESSES=${2:?$USAGE}
source "$(dirname "$0")/_launch.sh"
start_by_torchrun "$PROCESSES" train.py "$CONFIG" --launcher pytorch "${@:3}"
