#!/usr/bin/env bash
# Exports a finished stage to a Hugging Face folder, which from_pretrained loads. One process, no GPU, and the memory of the
# largest tensor.
#
#   sbatch slurm/export.sh runs/qwen2_5_vl_7b/sft exported                 # a run's, stage's or checkpoint's folder; the newest
#   sbatch --dependency=afterok:JOB-ID slurm/export.sh RUN_DIR/STAGE TO    # when slurm/submit_recipe.sh's last job is done
#   bash slurm/export.sh RUN_DIR/STAGE TO                                  # here and now
#
# UNIMM_VENV, CONTAINER_IMAGE and CONTAINER_MOUNTS as in slurm/pretrain_64node.sh.
#
#SBATCH --job-name=export
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=2:00:00
#SBATCH --output=logs/%x-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
if (($# != 2)); then
    echo "error: arguments: wanted a run's, stage's or checkpoint's folder and the folder to write" >&2
    exit 2
fi
start=()
if [[ -n "${CONTAINER_IMAGE:-}" ]]; then
    start=(srun --container-image="$CONTAINER_IMAGE" --container-workdir="$PWD")
    start+=(--container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
elif [[ -x "${UNIMM_VENV:-.venv}/bin/python" ]]; then
    PATH="$(cd "${UNIMM_VENV:-.venv}" && pwd)/bin:$PATH"
fi
exec "${start[@]}" python -m megatron_unimm.cli convert export --from "$1" --to "$2"
