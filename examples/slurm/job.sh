#!/usr/bin/env bash
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# Train on every node of a SLURM job, and queue the job again when its time is over. Submit it from the checkout,
#
#   sbatch --nodes 2 --gpus-per-node 8 --cpus-per-task 64 examples/slurm/job.sh pretrain_gpt.py ARGUMENTS...
#
# or let a batch script of your own end with: exec bash examples/slurm/job.sh pretrain_gpt.py ARGUMENTS...
#
#   PREFLIGHT      0 trains without `helixpipe preflight` (default: 1)
#   --dry-run      among the arguments: print layout, plan, memory, predicted time and the command; needs no SLURM,
#                  but NODES and GPUS_PER_NODE where the job has none
#   MAX_RESTARTS   how often the job may have been queued again when a rank is lost or hangs (default: 3)
#
# The exit code is that of the ranks, see docs/slurm.md: srun and torchrun would make it 1.
set -euo pipefail

fail() {
    printf 'slurm/job.sh: error: %s\n' "$1" >&2
    exit 2
}

# By what says most: ranks that were only held up end with 4 or 75, whatever the cause.
code_of_ranks() {
    local code
    for code in 7 6 3 2 8 1 130 5 4 75; do
        if grep -qsx -- "$code" "$codes"/rank_*; then
            echo "$code"
            return
        fi
    done
    echo "$1"
}

ask_to_stop() {
    asked_to_stop=1 interrupted=1
    [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true
}

[ $# -gt 0 ] || fail "no training script; usage: sbatch examples/slurm/job.sh pretrain_gpt.py ARGUMENTS..."
for word in "$@"; do
    case $word in
        --dry-run | --dry-run=*)
            nodes=${SLURM_NNODES:-${NODES:-}} gpus=${SLURM_GPUS_ON_NODE:-${GPUS_PER_NODE:-}}
            if [ -z "$nodes" ] || [ -z "$gpus" ]; then
                fail "--dry-run needs NODES and GPUS_PER_NODE"
            fi
            exec "${PYTHON:-python3}" -m helixpipe train --nnodes "$nodes" --nproc-per-node "$gpus" "${@:2}"
            ;;
    esac
done
[ -n "${SLURM_JOB_ID:-}" ] || fail "this is no SLURM job; submit it with sbatch"
[ -n "${SLURM_CPUS_PER_TASK:-}" ] || fail "srun would give all ranks of a node one core; add --cpus-per-task N"
cd "$SLURM_SUBMIT_DIR"
[ -f examples/slurm/node.sh ] || fail "there is no examples/slurm/node.sh in $PWD; submit from the checkout"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[ "${#nodes[@]}" -eq "$SLURM_NNODES" ] ||
    fail "scontrol names ${#nodes[@]} hosts in $SLURM_JOB_NODELIST, the job has $SLURM_NNODES nodes"
# Jobs that share a head node need different ports; these are below those that systems hand out by themselves.
port=$((15000 + 2 * (SLURM_JOB_ID % 8000)))
# Where every node can write: torchrun ends with 1 whatever its ranks end with, so that they leave their codes here.
codes=$(mktemp -d "$PWD/.exit-codes.$SLURM_JOB_ID.XXXXXX")
trap 'rm -rf -- "$codes"' EXIT

asked_to_stop='' cancelled='' interrupted='' step='' status=0
trap ask_to_stop USR1
# SLURM sends it to the ranks, too; who cancels a job does not want it back.
trap 'cancelled=1 interrupted=1' TERM
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    bash examples/slurm/node.sh "$port" "$codes" "${#nodes[@]}" "${nodes[@]}" "$@" &
step=$!
[ -z "$asked_to_stop" ] || ask_to_stop
# A signal ends the wait, not the step.
while :; do
    interrupted='' status=0
    wait "$step" || status=$?
    [ -n "$interrupted" ] || break
done

code=$status
[ "$status" -eq 0 ] || code=$(code_of_ranks "$status")
restarts=${SLURM_RESTART_COUNT:-0}
why=''
case $code in
    75) [ -z "$asked_to_stop" ] || why="its time is over" ;;
    4 | 5) [ "$restarts" -ge "${MAX_RESTARTS:-3}" ] || why="a rank was lost or hung" ;;
esac
if [ -n "$why" ] && [ -z "$cancelled" ]; then
    echo "slurm/job.sh: job $SLURM_JOB_ID is queued again: $why (restarts so far: $restarts)"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
