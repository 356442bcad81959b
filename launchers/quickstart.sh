#!/usr/bin/env bash
# ORION end to end in the Shapes world, on a machine with nothing but Python 3.11 and a package index: makes its environment,
# the data and the base checkpoints, trains the paper's three stages and its image decoder on two ranks (tensor and sequence
# parallel, then data parallel), draws, and prints what came of it. Needs no GPU and uses those that are there.
#
#   launchers/quickstart.sh                    into runs/quickstart; started again, it goes on where it was
#   launchers/quickstart.sh train.steps=20     any recipe setting, for all three stages
#
#   RUNS=DIR   where runs go (runs)            DATA=DIR   where the Shapes data go (data/shapes)
#   FULL=1         train every stage for as long as the recipe says
#   BUILD_BASE=1   train the base model anew instead of taking tools/base_models/shapes_vlm (about an hour)
# More variables: launchers/setup_env.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source launchers/setup_env.sh
source launchers/shapes_world.sh
ensure_env .venv

export RUNS="${RUNS:-runs}" DATA="${DATA:-data/shapes}"
read_plan configs/orion/shapes.yaml
base_model=tools/base_models/shapes_vlm

if [[ "${BUILD_BASE:-0}" == 1 ]]; then
    base_model="$RUNS/shapes_vlm"
    step "Training the base model into $base_model"
    [[ -f "$base_model/model.safetensors" ]] || python tools/build_tiny_models.py --to "$base_model"
fi

make_world
import_models "$base_model" tools/base_models/shapes_mmdit

# The stages take layouts of their own, and hand over whatever these are: tensor and sequence parallel, or data parallel with
# half as long a row on each of two ranks.
# shellcheck disable=SC2034  # read by train_stages
declare -A layout=(
    [warm_up]="system.parallel.tensor=2 system.parallel.sequence=true"
    [pretrain]="data.sequence_length=2304"
    [sft]="data.sequence_length=2304"
)
# A fraction of the recipe's steps; FULL=1 takes all of them.
# shellcheck disable=SC2034
declare -A short=([warm_up]=50 [pretrain]=600 [sft]=100 [decoder]=350)
train_stages "$@"
draw_and_score shapes

step "Exporting to Hugging Face, and asking plain transformers the same questions"
rm -rf "$run/exported"
unimm convert export --from "$run/sft" --to "$run/exported"
python tools/compare_with_transformers.py "$run" "$run/exported"

summarize shapes
