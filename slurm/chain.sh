#!/usr/bin/env bash
# Submits a run as COUNT jobs, one after another, on clusters where jobs may not be requeued.
#   RUN_DIR=runs/long slurm/chain.sh 10 --account=A --partition=P --nodes=4 slurm/train_raphael.sh [train.py arguments]
# Each continues from the newest checkpoint. Jobs that start after the run is complete end at once.
set -euo pipefail
[[ ${1:-} =~ ^[1-9][0-9]{0,3}$ && $# -ge 2 ]] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
[[ -n ${RUN_DIR:-} ]] || { echo "error: RUN_DIR must be set, since all jobs of the chain train in one directory. Set it." >&2; exit 2; }
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
