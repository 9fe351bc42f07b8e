#!/usr/bin/env bash
# The ranks of one node; run by srun, once per node, as job.sh asks:
#
#   node.sh PORT CODES NUM_NODES NODE... SCRIPT ARGUMENTS...
#
# PORT and the next one are free on the first node; CODES is a folder for the ranks' exit codes.
set -euo pipefail

port=$1
export HELIXPIPE_EXIT_CODES=$2
num_nodes=$3
shift 3
nodes=("${@:1:num_nodes}")
shift "$num_nodes"

fail() {
    printf 'slurm/node.sh: %s: error: %s\n' "${nodes[SLURM_NODEID]}" "$1" >&2
    exit 2
}

[ -n "${SLURM_GPUS_ON_NODE:-}" ] || fail "the job has no GPUs; add --gpus-per-node N"
. examples/environment.sh
threads=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

asked_to_stop='' interrupted='' launcher=''
# SLURM signals this process alone. torchrun would die of it: only the ranks know what to do.
ask_to_stop() {
    asked_to_stop=1 interrupted=1
    [ -z "$launcher" ] || pkill -USR1 -P "$launcher" || true
}
trap ask_to_stop USR1
end() {
    interrupted=1
    [ -z "$launcher" ] || kill -TERM "$launcher" 2>/dev/null || true
}
trap end TERM

# Runs torchrun to its end; its exit code.
launch() {
    local status
    # Ignored until a rank listens to it: one that has nothing to save yet goes on to where it has.
    (
        trap '' USR1
        exec torchrun --nproc-per-node "$SLURM_GPUS_ON_NODE" "$@"
    ) &
    launcher=$!
    while :; do
        interrupted='' status=0
        wait "$launcher" || status=$?
        [ -n "$interrupted" ] || break
    done
    launcher=''
    return "$status"
}

if [ "${PREFLIGHT:-1}" != 0 ]; then
    # Each node for itself, as torchrun cannot say which node has not come.
    launch --standalone -m helixpipe preflight --node-rank "$SLURM_NODEID" --port "$port" \
        "${nodes[@]/#/--host=}" --job "${@:2}"
fi
if [ -n "$asked_to_stop" ]; then
    echo 75 >"$HELIXPIPE_EXIT_CODES/rank_of_node_$SLURM_NODEID"
    exit 75
fi
launch --nnodes "$num_nodes" --node-rank "$SLURM_NODEID" \
    --master-addr "${nodes[0]}" --master-port "$((port + 1))" "$@"
