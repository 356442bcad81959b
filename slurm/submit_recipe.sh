#!/usr/bin/env bash
# All stages of a recipe as a chain of jobs: each is slurm/pretrain_64node.sh, and starts when the stage that it builds on
# is done. A stage that fails cancels those behind it. Prints a line for each job: its id, and its stage.
#
#   slurm/submit_recipe.sh RECIPE [--run-dir DIR] [KEY=VALUE]... [-- SBATCH-OPTION...]
#   slurm/submit_recipe.sh configs/orion/qwen2_5_vl_7b.yaml -- --partition=h100 --account=vision
#   slurm/submit_recipe.sh configs/orion/qwen2_5_vl_7b.yaml stages.sft.train.epochs=2 -- --nodes=8
#
#   STAGES="A B"     only these, one after the other (all of the recipe, as their `after` says; asks the Python on PATH)
#   AFTER=JOB-ID     the first starts when this job is done
# and the variables of slurm/pretrain_64node.sh, which see.
set -euo pipefail
cd "$(dirname "$0")/.."
source launchers/training.sh

arguments=() options=()
while (($#)) && [[ "$1" != -- ]]; do
    arguments+=("$1")
    shift
done
[[ $# == 0 ]] || options=("${@:2}")
read_training "${arguments[@]}"
if [[ -z "$recipe" || -n "$stage" ]]; then
    echo "error: arguments: wanted RECIPE [--run-dir DIR] [KEY=VALUE]... [-- SBATCH-OPTION...]; name stages with STAGES=\"A B\"" >&2
    exit 2
fi

# Lines of a stage and the one that it builds on.
if [[ -n "${STAGES:-}" ]]; then
    lines="" before=""
    for name in $STAGES; do
        lines+="$name $before"$'\n'
        before="$name"
    done
else
    PATH="${UNIMM_VENV:-.venv}/bin:$PATH"
    lines="$(python -m megatron_unimm.cli train "$recipe" --list-stages "${settings[@]}")"
fi

mkdir -p logs
declare -A job_of
while read -r name before; do
    [[ -n "$name" ]] || continue
    depends="${before:+${job_of[$before]:-}}"
    depends="${depends:-${AFTER:-}}"
    # Without the second option a job whose dependency has failed waits for ever.
    wait_for=(${depends:+--dependency="afterok:$depends" --kill-on-invalid-dep=yes})
    job_of[$name]="$(sbatch --parsable --job-name="$(basename "$recipe" .yaml)-$name" "${wait_for[@]}" "${options[@]}" \
        slurm/pretrain_64node.sh "${arguments[@]}" --stage "$name")"
    job_of[$name]="${job_of[$name]%%;*}"  # JOB;CLUSTER where there are several
    echo "${job_of[$name]} $name"
done <<<"$lines"
