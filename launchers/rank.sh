#!/usr/bin/env bash
# One rank of a training: its output goes into a file of its own, and the first rank's to the terminal as well.
# torchrun runs it as `rank.sh FOLDER COMMAND...`; the file is FOLDER/rank_00000.log.
set -euo pipefail
folder="$1"
shift
mkdir -p "$folder"
printf -v log '%s/rank_%05d.log' "$folder" "$RANK"
# SIGUSR1 asks a training to save and stop. Until it listens there is nothing to save, and the signal must not kill it.
trap '' USR1
if [[ "$RANK" == 0 ]]; then
    # tee outlives the signals that end the rank: it has to write what the rank says last.
    exec "$@" > >(trap '' USR1 TERM INT HUP; exec tee -a "$log") 2>&1
fi
exec "$@" >>"$log" 2>&1
