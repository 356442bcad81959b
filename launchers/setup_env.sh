# shellcheck shell=bash
# Sourced by other launchers: a Python environment with this package in it.
#
#   ensure_env FOLDER [EXTRAS]    makes or completes the virtual environment FOLDER and puts it first on PATH
#   free_port                     prints a port that nobody on this machine listens at
#
# What the caller can set:
#   UNIMM_VENV=DIR         use the environment DIR in place of FOLDER
#   UNIMM_ACTIVE_ENV=1     use the Python that is on PATH as it is (conda, an NGC container); installs nothing
#   PYTHON=python3.12      the Python that makes the environment
#   UNIMM_TORCH_INDEX=URL  where torch comes from, e.g. https://download.pytorch.org/whl/cpu (small) or .../whl/cu130

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [[ -n "$candidate" ]] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: python: no Python 3.11 or newer on PATH; install one, or name it with PYTHON=" >&2
    return 2
}

install_torch() {
    local index=()
    [[ -n "${UNIMM_TORCH_INDEX:-}" ]] && index=(--index-url "$UNIMM_TORCH_INDEX")
    if command -v nvidia-smi >/dev/null; then
        python -m pip install --quiet "${index[@]}" "torch>=2.6"
    else
        # One version for all machines without a GPU, so that test results compare. PyPI serves for Linux a build with CUDA,
        # which also runs on CPU but is some GB larger; UNIMM_TORCH_INDEX=https://download.pytorch.org/whl/cpu avoids it.
        python -m pip install --quiet "${index[@]}" "torch==2.13.0"
    fi
}

ensure_env() {
    local folder="${UNIMM_VENV:-$1}" extras="${2:+[$2]}" python stamp
    if [[ "${UNIMM_ACTIVE_ENV:-0}" == 1 ]]; then
        return
    fi
    if [[ ! -x "$folder/bin/python" ]]; then
        python="$(find_python)" || return 2
        echo "Making the environment $folder (once, some minutes)"
        "$python" -m venv "$folder" || return 2
    fi
    folder="$(cd "$folder" && pwd)"
    export PATH="$folder/bin:$PATH"
    # Installed already from this very pyproject.toml? Then there is nothing to do.
    stamp="$folder/.unimm-${2:-plain}"
    if [[ -f "$stamp" ]] && cmp --silent pyproject.toml "$stamp"; then
        return
    fi
    python -c 'import torch' 2>/dev/null || install_torch || return 2
    python -m pip install --quiet -e ".$extras" || return 2
    cp pyproject.toml "$stamp"
}

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
