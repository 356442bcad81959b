#!/usr/bin/env bash
# Any recipe of the Shapes world end to end, as quickstart.sh does it for ORION: makes the environment, the data and the base
# checkpoints, trains all stages of the recipe on two ranks, draws, and prints what came of it. What a frozen VLM says is
# computed once, into cache/ of the run. Needs no GPU.
#
#   launchers/shapes.sh configs/mmcore/shapes.yaml                   into runs/mmcore; started again, it goes on where it was
#   launchers/shapes.sh configs/mmcore/shapes.yaml train.steps=20    any recipe setting, for all stages
#
#   RUNS=DIR       where runs go (runs)
#   DATA=DIR       where the Shapes data go (data/shapes; data/shapes_sessions for recipes that read conversations of several
#                  pictures)
#   FULL=1         train every stage for as long as the recipe says, instead of a quarter of it
#   SUITES="A B"   what to score (shapes, shapes_qa, and shapes_sessions where the recipe reads such conversations)
# More variables: launchers/setup_env.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source launchers/setup_env.sh
source launchers/shapes_world.sh
if [[ $# == 0 || "$1" == -* ]]; then
    echo "error: recipe: none given; for example: $0 configs/mmcore/shapes.yaml" >&2
    exit 2
fi
ensure_env .venv

export RUNS="${RUNS:-runs}"
read_plan "$@"
suites="shapes shapes_qa" data=data/shapes
if reads interleaved; then
    suites+=" shapes_sessions" data+=_sessions
fi
export DATA="${DATA:-$data}"
declare -A layout=() short=()

make_world
import_models tools/base_models/shapes_vlm tools/base_models/shapes_mmdit
train_stages "${@:2}"
read -ra suites <<<"${SUITES:-$suites}"
draw_and_score "${suites[@]}"
summarize "${suites[@]}"
