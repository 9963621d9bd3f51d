# shellcheck shell=bash
# What dist_*.sh and slurm_*.sh share: how processes of a tool are started.
TOOLS=$(dirname "${BASH_SOURCE[0]}")

# start_by_torchrun PROCESSES TOOL [arguments]: on this machine, or on this one
# of several nodes.
start_by_torchrun() {
    local meeting
    if [ "${NNODES:-1}" = 1 ] && [ -z "${PORT:-}" ]; then
        meeting=(--standalone)  # on a free port
    else
        meeting=(--nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}"
                 --master_addr="${MASTER_ADDR:-127.0.0.1}"
                 --master_port="${PORT:-29500}")
    fi
    exec "${PYTHON:-python}" -m torch.distributed.run "${meeting[@]}" \
        --nproc_per_node="$1" "$TOOLS/$2" "${@:3}"
}

# start_by_srun PARTITION JOB_NAME TOOL [arguments]
start_by_srun() {
    local gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8} gres
    # A small job fits one node.
    per_node=$((gpus < per_node ? gpus : per_node))
    gres=${GRES-gpu:$per_node}
    export MASTER_PORT=${PORT:-${MASTER_PORT:-29500}}
    # shellcheck disable=SC2086
    exec srun -p "$1" --job-name="$2" \
        ${gres:+--gres="$gres"} --ntasks="$gpus" \
        --ntasks-per-node="$per_node" \
        --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
        ${SRUN_ARGS:-} \
        "${PYTHON:-python}" -u "$TOOLS/$3" "${@:4}"
}
