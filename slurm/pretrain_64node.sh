#!/usr/bin/env bash
# One stage of a recipe on 64 nodes of 8 GPUs, from the queue to its last step without a person: it checks the nodes and
# leaves bad ones out, saves before the time limit and goes back into the queue, and starts again after crashes.
#
#   sbatch slurm/pretrain_64node.sh                                                    # ORION 7B, stage pretrain
#   sbatch slurm/pretrain_64node.sh configs/orion/qwen2_5_vl_7b.yaml --stage sft [KEY=VALUE]...
#   sbatch --nodes=8 --time=4:00:00 --partition=h100 slurm/pretrain_64node.sh ...      # sbatch's options beat the lines below
#   slurm/submit_recipe.sh RECIPE                                                      # all stages, one after the other
#
# To be submitted from the repository's folder, which all nodes must see, as they must see the run's.
#
# Arguments are those of launchers/local.sh: RECIPE [--stage S] [--run-dir DIR] [--resume auto|never|DIR] [KEY=VALUE]...
#
# Environment, all optional:
#   RUNS=DIR               runs go to RUNS/NAME-OF-RECIPE-FILE (runs)
#   UNIMM_VENV=DIR         virtual environment (.venv if there is one, else the Python on PATH)
#   CONTAINER_IMAGE=IMAGE  run in this container instead, by pyxis' srun --container-image: a .sqsh file or registry address
#   CONTAINER_MOUNTS=A:B   further mounts beside the repository: data, checkpoints, runs
#   NPROC=N                ranks per node (its GPUs)
#   HEAD_ADDR=HOST         where other nodes reach the first one (its address in SLURM)
#   MASTER_PORT=PORT       a free port there; the two after it are used as well (20000 and up, by job)
#   MAX_RESTARTS=N         crashes answered by starting again on the same nodes before others are asked for (1)
#   MAX_ATTEMPTS=N         starts from the same step before the job gives up: it crashes in a loop (4)
#   HEALTH=0               do not check the nodes
#   HEALTH_MEASURE=...     options of `unimm health measure`
#   HEALTH_LIMITS=...      options of `unimm health judge`: bandwidths, disk (below: for H100 nodes)
#   HEALTH_COMMAND=FILE    your own check, run on every node as well; a node where it fails is bad
#   MAX_EXCLUDED=N         nodes that may be left out before the job gives up: more often it is the limits (an eighth)
#
# What remains: RUN_DIR/STAGE (checkpoints, TensorBoard), RUN_DIR/logs/STAGE/JOB (a file for each rank and start, the nodes'
# reports), logs/JOB-NAME-JOB-ID.out (this script and rank 0). `unimm status RUN_DIR` tells where a run is.
#
#SBATCH --job-name=pretrain
#SBATCH --nodes=64
#SBATCH --gpus-per-node=8
# One task per node: torchrun, which starts a rank for each GPU.
#SBATCH --ntasks-per-node=1
# For decoding images and launching kernels; of 96 cores 12 per GPU. The task gets them all, and its ranks share them.
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=48:00:00
# 300 s before the limit this script (B:) is told; the ranks save, and the job goes back into the queue. SLURM may be
# a minute early. Give more if saving takes more than two minutes.
#SBATCH --signal=B:USR1@300
# After a node failure SLURM puts the job back into the queue by itself.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.out
# On a network with leaf switches, asking for few of them keeps rings short; the job waits for them for an hour at most:
#   sbatch --switches=2@1:00:00 ...
set -uo pipefail

cd "${SLURM_SUBMIT_DIR:?to be submitted with sbatch}" || exit 2
if [[ ! -f launchers/training.sh ]]; then
    echo "error: $PWD: not the repository's folder; cd there, then sbatch slurm/pretrain_64node.sh" >&2
    exit 2
fi
source launchers/training.sh
read_training "$@" || exit 2
recipe="${recipe:-configs/orion/qwen2_5_vl_7b.yaml}"
stage="${stage:-pretrain}"
run_dir="${run_dir:-${RUNS:-runs}/$(basename "$recipe" .yaml)}"
requeues="${SLURM_RESTART_COUNT:-0}"
logs="$run_dir/logs/$stage/$SLURM_JOB_ID"
history="$logs/history"  # a line for each start and each node left out; the job reads it after a requeue
mkdir -p "$logs" || exit 2
touch "$history" || exit 2

say() { printf '%s %s\n' "$(date '+%F %T')" "$*"; }

# ---------------------------------------------------------------------------------------- environment of the ranks

container=()
if [[ -n "${CONTAINER_IMAGE:-}" ]]; then
    container=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD")
    container+=(--container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
elif [[ -x "${UNIMM_VENV:-.venv}/bin/python" ]]; then
    PATH="$(cd "${UNIMM_VENV:-.venv}" && pwd)/bin:$PATH"
    export PATH
fi

# Each is left alone where the submitting shell has set it.
# Kernels of one device are issued in order: Megatron's overlap of tensor-parallel communication with compute relies on it.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Packed rows and pictures of many sizes fragment the GPU's memory; segments that can grow do not.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# Warnings name the peer and the network card of a broken connection; NCCL is silent by default.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# A link that is down for a moment (a switch that restarts, a flapping port) must not end a run of 512 GPUs:
# 4.096 us * 2^22 = 17 s for each of 7 tries, two minutes in all, instead of 4 s each.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}" NCCL_IB_RETRY_CNT="${NCCL_IB_RETRY_CNT:-7}"
# What the last collectives of each rank were, in a ring buffer that is written to a file when one of them times out.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$(realpath "$logs")/nccl_trace_rank_}"
# Not set here, as clusters differ, and NCCL most often finds them: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, the interface
# of the management network by which ranks meet (wrong where nodes have docker0 or several networks); NCCL_IB_HCA, the
# network cards that carry data (where one of them is for storage); NCCL_CROSS_NIC=0 on rails without a path between them.
#
# A node's tensor-parallel ranks talk through NVLink; between nodes go pipeline and data parallel. Node ranks follow the
# order of SLURM's node list (by its topology plugin where there is one), so that neighbours in rank are near each other.

# Since SLURM 22.05 srun does not take it over from sbatch.
[[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
ulimit -c 0  # 512 core files would fill the disk

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
node_list="$(IFS=,; echo "${nodes[*]}")"
gpus="${SLURM_GPUS_PER_NODE:-0}"
gpus="${gpus##*:}"  # of h100:8
NPROC="${NPROC:-$((gpus > 0 ? gpus : 1))}"
address="${HEAD_ADDR:-$(scontrol --oneliner show node "${nodes[0]}" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)}"
port="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 3000 * 3))}"
export NPROC MASTER_ADDR="$address"

# once COMMAND...: on the first node, in the environment of the ranks.
once() { srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" "${container[@]}" "$@"; }
unimm=(python -m megatron_unimm.cli)

# ---------------------------------------------------------------------------------------- signals, ends

step_pid="" stopping=0 cancelled=0
# Ranks that are still starting do not listen yet: ask until they have stopped.
ask_to_stop() {
    while [[ -n "$step_pid" ]] && kill -s USR1 "$step_pid" 2>/dev/null; do
        sleep 10
    done
}
on_usr1() {
    ((stopping)) || say "The time limit is near: the ranks save, then the job goes back into the queue"
    stopping=1
    ask_to_stop &
}
# SLURM itself tells the ranks; this script only has to wait for them.
on_term() { cancelled=1; }
trap on_usr1 USR1
trap on_term TERM

# wait_for PID: sets code. A signal ends bash's wait, not the process.
wait_for() {
    local now
    code=0
    wait "$1" || code=$?
    while kill -0 "$1" 2>/dev/null; do
        now=0
        wait "$1" || now=$?
        ((now == 127)) || code=$now
    done
}

# finish CODE WORDS...: the job ends; a page on the run goes into its log.
finish() {
    local code="$1"
    shift
    say "$*"
    if ((!cancelled)) && [[ -e "$run_dir/$stage/events.jsonl" ]]; then
        echo
        timeout --kill-after=10 120 srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" "${container[@]}" \
            "${unimm[@]}" status "$run_dir"
    fi
    echo
    echo "checkpoints and TensorBoard: $run_dir/$stage    ranks' output: $logs"
    exit "$code"
}

# requeue REASON [NODE...]: back into the queue, away from the nodes. Does not return.
requeue() {
    local reason="$1" excluded
    shift
    say "$reason: back into the queue${*:+, without $*}"
    # The requeue ends this script; within SLURM's KillWait it can still say what the next start must avoid. While
    # a job runs, its list of excluded nodes cannot be changed.
    trap '' TERM USR1
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        finish 75 "error: scontrol requeue: refused; submit it again with the same arguments and it goes on"
    fi
    if (($#)); then
        excluded="$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o 'ExcNodeList=[^ ]*' | cut -d= -f2)"
        [[ "$excluded" == "(null)" ]] && excluded=""
        excluded="$(IFS=,; echo "${excluded:+$excluded,}$*")"
        until scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded"; do sleep 0.2; done
    fi
    sleep 600
    exit 75
}

# ---------------------------------------------------------------------------------------- before the start

# Every node measures itself and its way to two others; bad ones are left out.
check_nodes() {
    local reports="$logs/health.$requeues.$starts" bad=() code measure limits
    # For H100 nodes: NVLink carries 450 GB/s in each direction, and eight network cards of 400 Gb/s 400. An all-reduce of 256 MiB
    # does not reach that; below these something is broken. Whatever the hardware, who has half of the others' median is bad.
    # shellcheck disable=SC2206  # options are words
    measure=(--nodes "$node_list" --address "$address" --port $((port + 2)) --ranks "$NPROC" --folder "$run_dir" --folder /tmp
        ${HEALTH_MEASURE:-})
    # shellcheck disable=SC2206
    limits=(${HEALTH_LIMITS:---gpus $gpus --min-inside 200 --min-between 100})
    say "Checking ${#nodes[@]} nodes"
    # The measurements have limits of their own, 8 minutes in all; this is for nodes where not even Python starts.
    timeout --kill-after=30 600 srun --kill-on-bad-exit=0 --wait=0 "${container[@]}" "${unimm[@]}" health measure "${measure[@]}" \
        >"$reports" &
    step_pid=$!
    wait_for "$step_pid"
    if ((stopping || cancelled)); then return; fi
    # A node that hangs keeps its part of the step; the next one must not wait for it.
    ((code == 0)) || scancel --signal=KILL "$SLURM_JOB_ID"
    code=0
    once "${unimm[@]}" health judge "$reports" --nodes "$node_list" "${limits[@]}" >"$reports.bad" || code=$?
    ((code < 2)) || finish 2 "error: health: the reports in $reports cannot be judged (exit code $code); HEALTH=0 goes without"
    mapfile -t bad <"$reports.bad"
    own_check
    ((${#bad[@]} == 0)) || leave_out "${bad[@]}"
}

# The cluster's own check; adds to bad.
own_check() {
    local node
    [[ -n "${HEALTH_COMMAND:-}" ]] || return 0
    # shellcheck disable=SC2016  # expanded on the node
    timeout --kill-after=30 600 srun --kill-on-bad-exit=0 --wait=0 bash -c '"$1" >&2 && echo "$SLURMD_NODENAME"' _ "$HEALTH_COMMAND" \
        >"$logs/passed.$requeues.$starts"
    for node in "${nodes[@]}"; do
        if ! grep -qx "$node" "$logs/passed.$requeues.$starts"; then
            echo "$node: BAD  $HEALTH_COMMAND failed there"
            bad+=("$node")
        fi
    done
}

leave_out() {
    local most="${MAX_EXCLUDED:-$(((${#nodes[@]} + 7) / 8))}" node
    for node in "$@"; do echo "excluded $node" >>"$history"; done
    if (($(grep -c '^excluded ' "$history") > most)); then
        finish 1 "error: nodes: $(grep '^excluded ' "$history" | cut -d' ' -f2 | paste -sd' ') have failed the check, more than MAX_EXCLUDED=$most; set HEALTH_LIMITS if the limits do not fit this cluster, or submit with --exclude=NODES"
    fi
    requeue "Bad nodes" "$@"
}

# ---------------------------------------------------------------------------------------- the training

# run_ranks: one start of all ranks; sets code as `unimm train` has it, 1 for crashes of any kind.
run_ranks() {
    local folder="$logs/start.$requeues.$starts" codes
    mkdir -p "$folder"
    # Each node notes the code of its ranks. Only a crash is one for srun, which then ends the others: after a save
    # nodes leave one by one, and the last may still be writing.
    # shellcheck disable=SC2016  # expanded on the node
    LOGS="$folder" NNODES="${#nodes[@]}" MASTER_PORT="$port" UNIMM_RESTARTS="$starts" MAX_RESTARTS=0 \
        srun --kill-on-bad-exit=1 --wait=0 "${container[@]}" bash -c '
            trap "" USR1
            NODE_RANK=$SLURM_NODEID launchers/node.sh "${@:2}"
            code=$?
            echo "$code" >"$1/node_$SLURM_NODEID.code"
            ((code == 75)) && exit 0
            exit "$code"' _ "$folder" "$recipe" --stage "$stage" --run-dir "$run_dir" "${settings[@]}" &
    step_pid=$!
    wait_for "$step_pid"
    step_pid=""
    codes="$(cat "$folder"/node_*.code 2>/dev/null | sort -n | uniq -c | awk '{print $2 ":" $1}' | paste -sd' ')"
    case " $codes " in
        *" 2:"*) code=2 ;;
        *" 75:"*) code=75 ;;
        " 0:${#nodes[@]} ") code=0 ;;
        *) code=1 ;;
    esac
}

say "Job $SLURM_JOB_ID, requeued $requeues times: $recipe, stage $stage, into $run_dir; ${#nodes[@]} nodes ($SLURM_JOB_NODELIST), $NPROC ranks each"
for ((starts = 0; ; starts++)); do
    step="$(last_step "$run_dir" "$stage")"
    if (($(grep -c "^start .* $step\$" "$history") >= ${MAX_ATTEMPTS:-4})); then
        finish 1 "error: $run_dir: ${MAX_ATTEMPTS:-4} starts from step $step ended without a new checkpoint; the reason is in $logs"
    fi
    if (($(grep -c "^start $requeues .* $step\$" "$history") > ${MAX_RESTARTS:-1})); then
        requeue "The ranks crash on these nodes"
    fi
    [[ "${HEALTH:-1}" == 0 ]] || check_nodes
    if ((!stopping && !cancelled)); then
        echo "start $requeues $starts $step" >>"$history"
        run_ranks
        case "$code" in
            0) finish 0 "Stage $stage is done" ;;
            2) finish 2 "error: $stage: the training needs a person; its last lines above and in $logs say why" ;;
        esac
    fi
    if ((cancelled)); then
        finish 143 "Cancelled; submit it again with the same arguments and it goes on"
    elif ((stopping || code == 75)); then
        requeue "Saved at step $(last_step "$run_dir" "$stage")"
    fi
    say "The ranks crashed; last checkpoint: step $(last_step "$run_dir" "$stage"); their output: $logs/start.$requeues.$starts"
done
