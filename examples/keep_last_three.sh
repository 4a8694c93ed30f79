#!/usr/bin/env bash
# Keep the last three complete checkpoints of a run and every thousandth step:
#
#     examples/keep_last_three.sh out          # says what would be deleted
#     examples/keep_last_three.sh out --yes    # deletes it
#
# --keep-best eval_loss:min keeps the best step as well, where the run logs that metric.
set -euo pipefail

run_dir=$1
shift

dcpconv runs prune "$run_dir" --keep-last 3 --keep-every 1000 "$@"
