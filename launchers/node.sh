#!/usr/bin/env bash
# One node of a training on several: torchrun with all ranks of this machine. Run it on every node, with the same arguments
# and another NODE_RANK. slurm/pretrain_64node.sh does so by srun; here is the same for clusters without SLURM.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launchers/node.sh configs/orion/qwen2_5_vl_7b.yaml --stage pretrain \
#       --run-dir runs/orion_7b [KEY=VALUE]...
#
#   NNODES=N NODE_RANK=K   how many nodes there are, and which this is, from 0 (1 and 0)
#   MASTER_ADDR=HOST       where the others reach node 0 (127.0.0.1 for one node)
#   MASTER_PORT=PORT       a free port there (29500)
#   RUN_ID=WORD            the same on all nodes, another for each start: tells starts apart in the run's events (MASTER_PORT)
#   NPROC=N                ranks on this node (its GPUs; 1 on a CPU)
#   MAX_RESTARTS=N         after a crash start again, at most N times in a row without a new checkpoint between (0). All
#                          nodes need the same: each waits for the others.
#   LOGS=DIR               a file of output for each rank (RUN_DIR/logs/STAGE/TIME)
#
# Exit codes are those of `unimm train`: 0 done, 2 needs a person, 75 stopped by a signal after saving: start it again.
# SIGTERM and SIGUSR1 make it save and stop.
set -euo pipefail
trap '' USR1  # until there is somebody to hand it to
cd "$(dirname "$0")/.."
source launchers/training.sh
read_training "$@"
if [[ -z "$recipe" ]]; then
    echo "error: recipe: none given; for example: $0 configs/orion/shapes.yaml --stage warm_up" >&2
    exit 2
fi
run_dir="${run_dir:-${RUNS:-runs}/$(basename "$recipe" .yaml)}"
logs="${LOGS:-$run_dir/logs/${stage:-train}/$(date +%Y%m%d_%H%M%S)}"
max_restarts="${MAX_RESTARTS:-0}" port="${MASTER_PORT:-29500}"
train_command

if [[ -z "${NPROC:-}" ]]; then
    NPROC="$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')"
fi
# Ranks share the cores; without this each takes all of them.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) > NPROC ? $(nproc) / NPROC : 1))}"

# start_ranks ATTEMPT: torchrun in the background; sets pid. Nodes are told their rank, as torchrun's own rendezvous sorts
# them by host name: n1, n10, n11, n2. Neighbours in rank are meant to be neighbours in the network.
start_ranks() {
    local where=(--nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}")
    where+=(--master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$port" --rdzv-id "${RUN_ID:-$port}")
    # torchrun restarts the ranks of one node, whatever they ended with; we restart all or none, below or in SLURM's script.
    UNIMM_RESTARTS="${UNIMM_RESTARTS:-$1}" python -m megatron_unimm.cli.torchrun "${where[@]}" \
        --nproc-per-node "$NPROC" --max-restarts 0 --no-python launchers/rank.sh "$logs" "${train[@]}" &
    pid=$!
}

handed=0 stopping=0
hand_on() {
    handed=1 stopping=1
    kill -s "$1" "$pid" 2>/dev/null || true
}

without_progress=0
for ((attempt = 0; ; attempt++)); do
    before="$(last_step "$run_dir" "$stage")"
    start_ranks "$attempt"
    trap 'hand_on USR1' USR1
    trap 'hand_on TERM' TERM
    code=0
    wait "$pid" || code=$?
    while ((handed)); do  # a signal has ended the wait, not the ranks
        handed=0 now=0
        wait "$pid" || now=$?
        ((now == 127)) || code=$now  # 127: the wait before had seen the end
    done
    if ((code == 0 || code == 2 || code == 75 || code == 130 || stopping)); then
        exit "$code"
    fi
    step="$(last_step "$run_dir" "$stage")"
    without_progress=$((step > before ? 1 : without_progress + 1))
    if ((without_progress > max_restarts)); then
        ((max_restarts == 0)) || echo "error: $run_dir: $without_progress crashes in a row at step $step; see $logs" >&2
        exit "$code"
    fi
    echo "The ranks ended with code $code; starting again from step $step ($without_progress of $max_restarts restarts here)"
done
