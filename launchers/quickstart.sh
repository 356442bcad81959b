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
ensure_env .venv

export RUNS="${RUNS:-runs}" DATA="${DATA:-data/shapes}"
run="$RUNS/quickstart"
base_model=tools/base_models/shapes_vlm
generator=tools/base_models/shapes_mmdit

step() { printf '\n== %s\n' "$*"; }

if [[ "${BUILD_BASE:-0}" == 1 ]]; then
    base_model="$RUNS/shapes_vlm"
    step "Training the base model into $base_model"
    [[ -f "$base_model/model.safetensors" ]] || python tools/build_tiny_models.py --to "$base_model"
fi

if [[ ! -f "$DATA/eval/retrieval.jsonl" ]]; then
    step "Making the Shapes world in $DATA"
    unimm data shapes --to "$DATA" --count "$([[ "${FULL:-0}" == 1 ]] && echo 30000 || echo 12000)"
fi

if [[ ! -f "$run/base/COMMITTED" ]]; then
    step "Importing the Hugging Face model $base_model"
    unimm convert import --from "$base_model" --to "$run/base"
fi

if [[ ! -f "$run/generator_base/COMMITTED" ]]; then
    step "Importing the diffusers pipeline $generator"
    unimm convert import --from "$generator" --to "$run/generator_base"
fi

# The stages take layouts of their own, and hand over whatever these are: tensor and sequence parallel, or data parallel with
# half as long a row on each of two ranks.
ranks=2
declare -A layout=(
    [warm_up]="system.parallel.tensor=2 system.parallel.sequence=true"
    [pretrain]="data.sequence_length=2304"
    [sft]="data.sequence_length=2304"
    [decoder]=""
)
if command -v nvidia-smi >/dev/null && [[ "$(nvidia-smi --list-gpus | wc -l)" == 1 ]]; then
    ranks=1
    layout=()
fi
# A fraction of the recipe's steps; FULL=1 takes all of them.
declare -A steps=([warm_up]=50 [pretrain]=600 [sft]=100 [decoder]=350)
for stage in warm_up pretrain sft decoder; do
    step "Stage $stage on $ranks ranks"
    settings=()
    [[ "${FULL:-0}" == 1 ]] || settings=("train.steps=${steps[$stage]}")
    # shellcheck disable=SC2206  # settings are words
    settings+=(${layout[$stage]:-})
    NPROC="$ranks" launchers/local.sh configs/orion/shapes.yaml --stage "$stage" --run-dir "$run" "${settings[@]}" "$@"
done

step "Drawing"
prompts=("a red circle left of a blue square" "three green triangles" "a purple cross" "a yellow square above a pink circle"
    "two orange circles" "a black triangle and a red cross" "a blue circle" "a green square right of an orange triangle")
unimm generate --model "$run" "${prompts[@]/#/--prompt=}" --to "$run/samples.png"
unimm evaluate --model "$run" --suite shapes --data "$DATA/eval" --num-samples 20 --to "$run/shapes.json"

step "Exporting to Hugging Face, and asking plain transformers the same questions"
rm -rf "$run/exported"
unimm convert export --from "$run/sft" --to "$run/exported"
python tools/compare_with_transformers.py "$run" "$run/exported"

python tools/summarize_run.py "$run"
echo "Look: $run/samples.png, $run/shapes.png    Curves: tensorboard --logdir $run    Talk to it: unimm chat --model $run"
