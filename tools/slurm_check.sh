#!/usr/bin/env bash
# Shows on a real SLURM, started on this machine for it, that slurm/pretrain_64node.sh does what it says, shrunk by sbatch's
# options alone: it trains on two nodes; it saves, requeues and resumes at the time limit; it survives a killed node; it leaves
# a bad node out; it gives up a crash loop; slurm/submit_recipe.sh runs three stages in their order; and the full 64 x 8 header
# is accepted. Wants root and, unless SLURM is installed, apt. Takes about six minutes on two cores.
#
#   tools/slurm_check.sh                     all, with the jobs' logs
#   tools/slurm_check.sh -k killed_node      one; any options of pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source launchers/setup_env.sh
ensure_env .venv-test test
exec python -m pytest -m slow tests/slurm -v -s -rs "$@"
