#!/usr/bin/env bash
# A training on this machine: one CPU, one GPU or all its GPUs, with the arguments of slurm/pretrain_64node.sh.
#
#   launchers/local.sh configs/orion/shapes.yaml --stage warm_up [--run-dir DIR] [--resume auto|never|DIR] [KEY=VALUE]...
#
#   NPROC=N          ranks (the GPUs of this machine; 1 on a CPU)
#   MAX_RESTARTS=N   after a crash start again, at most N times in a row without a new checkpoint between (0)
#   RUNS=DIR         where runs go if --run-dir is not given: RUNS/NAME-OF-RECIPE-FILE (runs)
#   LOGS=DIR         a file of output for each rank (RUN_DIR/logs/STAGE/TIME)
# The environment is made in .venv unless there is one; see launchers/setup_env.sh.
#
# Exit codes are those of `unimm train`: 0 done, 2 needs a person, 75 stopped by a signal after saving: start it again.
# Ctrl-C ends it at once; SIGTERM and SIGUSR1 make it save and stop.
set -euo pipefail
cd "$(dirname "$0")/.."
source launchers/setup_env.sh
ensure_env .venv
# A port of its own, so that several trainings run beside each other.
MASTER_PORT="$(free_port)"
export MASTER_PORT NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 RUN_ID=$$
exec launchers/node.sh "$@"
