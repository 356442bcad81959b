#!/usr/bin/env bash
# Lint, types, and all tests, on a bare machine with Python 3.11 and a package index. Needs no GPU.
#
#   launchers/test.sh                      in .venv-test, made when absent
#   UNIMM_ACTIVE_ENV=1 launchers/test.sh   in the Python on PATH, nothing installed
#   launchers/test.sh tests/config         only some tests
#
# More variables: launchers/setup_env.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source launchers/setup_env.sh
ensure_env .venv-test test

ruff check megatron_unimm tests tools
basedpyright --pythonpath "$(command -v python)" megatron_unimm

# Ranks of a layout test share the cores; more threads than that only wait for one another.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

run_group() {
    local status=0
    python -m pytest "$@" || status=$?
    # 5: no test of this group where the caller chose some tests.
    [[ $status == 5 ]] || return "$status"
}

# Tests of a file share what they make; slow ones have several processes of their own.
run_group -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
run_group -m slow "$@"
