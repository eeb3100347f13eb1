#!/usr/bin/env bash
# Submits a run as COUNT jobs that follow one another, where jobs may not be queued again.
#   RUN_DIR=runs/long slurm/chain.sh 10 --account=A --partition=P --nodes=4 slurm/train_raphael.sh [train.py arguments]
# Each continues from the newest checkpoint of the one before; those that are left when the run is complete end at once.
set -euo pipefail
[[ ${1:-} =~ ^[1-9][0-9]{0,3}$ && $# -ge 2 ]] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
[[ -n ${RUN_DIR:-} ]] || { echo "error: set RUN_DIR: all jobs of the chain must train in one directory" >&2; exit 2; }
count=$1 previous=''
shift
export REQUEUE=0
for ((i = 0; i < count; i++)); do
    command=(sbatch --parsable --no-requeue ${previous:+"--dependency=afterany:$previous"} "$@")
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%q ' "${command[@]}"
        printf '\n'
        previous=JOB$i
    else
        previous=$("${command[@]}")
        previous=${previous%%;*}
        echo "submitted $previous"
    fi
done
