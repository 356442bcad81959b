# shellcheck shell=bash disable=SC2034
# Sourced by the other launchers and by slurm/: their common arguments, and the rules by which a training is started again.
#
# Exit codes of a training: 0 done, 2 needs a person (config, data), 75 stopped by a signal after saving (start it again),
# anything else a crash or a hang that was cut short (start it again as long as that helps).

# read_training ARGUMENTS...: sets recipe, stage, run_dir, and settings (all else, for `unimm train`).
read_training() {
    recipe="" stage="" run_dir="" settings=()
    while (($#)); do
        case "$1" in
            --stage | --run-dir)
                (($# > 1)) || { echo "error: $1: needs a value" >&2; return 2; }
                [[ "$1" == --stage ]] && stage="$2" || run_dir="$2"
                shift
                ;;
            --stage=*) stage="${1#*=}" ;;
            --run-dir=*) run_dir="${1#*=}" ;;
            --resume)
                (($# > 1)) || { echo "error: $1: needs a value" >&2; return 2; }
                settings+=("$1" "$2")
                shift
                ;;
            -*) settings+=("$1") ;;
            *) if [[ -z "$recipe" ]]; then recipe="$1"; else settings+=("$1"); fi ;;
        esac
        shift
    done
}

# last_step RUN_DIR STAGE: the step of the last finished checkpoint, 0 without one. An empty STAGE stands for all of the run.
last_step() {
    local marker markers name last=0
    markers=("$1/$2"/checkpoints/step_*/COMMITTED)
    [[ -n "$2" ]] || markers=("$1"/*/checkpoints/step_*/COMMITTED)
    for marker in "${markers[@]}"; do
        name="${marker%/COMMITTED}"
        name="${name##*/step_}"
        if [[ -e "$marker" && "$name" =~ ^[0-9]+$ ]] && ((10#$name > last)); then
            last=$((10#$name))
        fi
    done
    echo "$last"
}

# Sets train, the array of the command that starts a rank, from what read_training has set.
train_command() {
    train=(python -m megatron_unimm.cli train "$recipe" --run-dir "$run_dir")
    [[ -z "$stage" ]] || train+=(--stage "$stage")
    train+=("${settings[@]}")
}
