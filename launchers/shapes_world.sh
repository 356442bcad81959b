# shellcheck shell=bash
# Sourced by launchers that take a recipe through the Shapes world: what they have in common, in the order of use. Each part
# that is done already is passed over.

step() { printf '\n== %s\n' "$*"; }

# settings_of WORD...: those that are KEY=VALUE, a line each; beside them there may be options of `unimm train`.
settings_of() {
    local word
    for word in "$@"; do
        [[ "$word" != [!-]*=* ]] || printf '%s\n' "$word"
    done
}

# read_plan RECIPE [KEY=VALUE]...: sets recipe, run (the folder that the recipe's imported models lie in), base, generator,
# kinds of data, stages, steps of each, and which of them learn from cached conditions.
read_plan() {
    local plan line settings
    recipe="$1" base="" generator="" kinds=() stages=()
    declare -gA steps=() cached=()
    mapfile -t settings < <(settings_of "${@:2}")
    plan="$(python tools/shapes_plan.py "$recipe" "${settings[@]}")" || return
    while read -ra line; do
        case "${line[0]}" in
            base) base="${line[1]}" ;;
            generator) generator="${line[1]}" ;;
            data) kinds=("${line[@]:1}") ;;
            stage) stages+=("${line[1]}") steps[${line[1]}]="${line[2]}" ;;
            cached) cached[${line[1]}]=1 ;;
        esac
    done <<<"$plan"
    run="$(dirname "$base")"
}

# Whether the recipe reads a kind of data.
reads() { [[ " ${kinds[*]} " == *" $1 "* ]]; }

# make_world: the data in DATA, which conversations of several pictures are part of where the recipe reads them.
make_world() {
    local kind mix=()
    if [[ ! -f "$DATA/eval/retrieval.jsonl" ]]; then
        step "Making the Shapes world in $DATA"
        if reads interleaved; then
            mix=(--mix "understanding=0.25,text_to_image=0.25,editing=0.3,interleaved=0.2")
        fi
        unimm data shapes --to "$DATA" --count "$([[ "${FULL:-0}" == 1 ]] && echo 30000 || echo 12000)" "${mix[@]}"
    fi
    for kind in "${kinds[@]}"; do
        if [[ ! -f "$DATA/train/$kind.jsonl" ]]; then
            echo "error: $DATA: has no train/$kind.jsonl, which $recipe reads; name another folder with DATA=" >&2
            return 2
        fi
    done
}

# import_models VLM PIPELINE: the Hugging Face model and the diffusers pipeline that the recipe starts from.
import_models() {
    if [[ ! -f "$base/COMMITTED" ]]; then
        step "Importing the Hugging Face model $1"
        unimm convert import --from "$1" --to "$base"
    fi
    if [[ -n "$generator" && ! -f "$generator/COMMITTED" ]]; then
        step "Importing the diffusers pipeline $2"
        unimm convert import --from "$2" --to "$generator"
    fi
}

# train_stages [KEY=VALUE]...: all stages on two ranks (on a single GPU: one), for `short` steps of each (a quarter of the
# recipe's where that says nothing), or with FULL=1 for as long as the recipe says. `layout` has settings of a stage's ranks.
train_stages() {
    local ranks=2 stage settings
    if command -v nvidia-smi >/dev/null && [[ "$(nvidia-smi --list-gpus | wc -l)" == 1 ]]; then
        ranks=1
        layout=()
    fi
    for stage in "${stages[@]}"; do
        step "Stage $stage on $ranks ranks"
        settings=()
        if [[ -n "${cached[$stage]:-}" ]]; then
            make_cache "$stage" "$ranks" "$@"
            settings+=("data.condition_cache=$run/cache/conditions" "data.latent_cache=$run/cache/latents")
        fi
        [[ "${FULL:-0}" == 1 ]] || settings+=("train.steps=${short[$stage]:-$(((steps[$stage] + 3) / 4))}")
        # shellcheck disable=SC2206  # settings are words
        settings+=(${layout[$stage]:-})
        NPROC="$ranks" launchers/local.sh "$recipe" --stage "$stage" --run-dir "$run" "${settings[@]}" "$@"
    done
}

# make_cache STAGE RANKS [KEY=VALUE]...: what the frozen VLM says of each conversation, and latents of the pictures.
make_cache() {
    local port settings
    [[ ! -f "$run/cache/conditions/visual/meta.json" || ! -f "$run/cache/latents/meta.json" ]] || return 0
    step "Computing once what the frozen VLM says"
    port="$(free_port)"
    mapfile -t settings < <(settings_of "${@:3}")
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m megatron_unimm.cli.torchrun --nproc-per-node "$2" \
        --master-port "$port" -m megatron_unimm.cli data cache "$recipe" "${settings[@]}" --stage "$1" --to "$run/cache" \
        --run-dir "$run"
}

# draw_and_score SUITE...: samples.png, and SUITE.json of each.
draw_and_score() {
    local suite prompts=("a red circle left of a blue square" "three green triangles" "a purple cross"
        "a yellow square above a pink circle" "two orange circles" "a black triangle and a red cross" "a blue circle"
        "a green square right of an orange triangle")
    step "Drawing"
    unimm generate --model "$run" "${prompts[@]/#/--prompt=}" --to "$run/samples.png"
    for suite in "$@"; do
        unimm evaluate --model "$run" --suite "$suite" --data "$DATA/eval" --to "$run/$suite.json"
    done
}

# summarize SUITE...: what came of it.
summarize() {
    local suite look="$run/samples.png"
    python tools/summarize_run.py "$run"
    for suite in "$@"; do
        [[ ! -f "$run/$suite.png" ]] || look+=", $run/$suite.png"
    done
    echo "Look: $look    Curves: tensorboard --logdir $run    Talk to it: unimm chat --model $run"
}
