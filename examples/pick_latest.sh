#!/usr/bin/env bash
# Resume from the latest complete checkpoint, or start afresh where there is none:
#
#     examples/pick_latest.sh out python train.py
#
# An interrupted save is never picked, and a broken run directory stops the script.
set -euo pipefail

run_dir=$1
shift

checkpoint=$(dcpconv runs resolve "$run_dir" auto)
if [[ -n $checkpoint ]]; then
  arguments=(--resume_from_checkpoint "$checkpoint")
else
  echo "fresh start in $run_dir"
  arguments=()
fi

# Without a command, say what would be run.
if [[ $# -eq 0 ]]; then
  set -- echo python train.py
fi
exec "$@" ${arguments[@]+"${arguments[@]}"}
