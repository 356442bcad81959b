#!/usr/bin/env bash
# All checks that need a GPU, in one go: tests/gpu, then errors and speed of bf16 and FP8 layers in one table. Under 8 minutes on one Hopper GPU.
# NOT YET RUN ON A GPU.
#
#   tools/gpu_checks.sh            the checks
#   tools/gpu_checks.sh --smoke    any machine: that the scripts work, at tiny shapes
#
# Takes the Python on PATH (or PYTHON=...) with torch, megatron-core and this package's other dependencies; without Transformer Engine its rows
# say "not installed". Tests write to gpu_checks.log; the numbers also go to tools/bench/results/ as JSON. Exit code 0: everything that could
# run passed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# Megatron-Core asks for it when tensor-parallel communication is to overlap; harmless on one GPU.
export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"
log=gpu_checks.log

# Without pyproject.toml's pytest settings, which need the plugin pytest-timeout.
timeout 200 "$PYTHON" -m pytest -c /dev/null --rootdir "$PWD" -p no:cacheprovider tests/gpu -q -rsf >"$log" 2>&1
tests=$?
"$PYTHON" tools/bench/gpu_layers.py "$@"
layers=$?
echo "tests/gpu: $(tail -n 1 "$log") (details: $log)"
# 5: pytest found nothing to run.
[[ ($tests == 0 || $tests == 5) && $layers == 0 ]]
