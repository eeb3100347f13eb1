#!/usr/bin/env bash
# Makes shards with edge maps (and features) of images or shards, or fills a run's feature cache; an array task for each part.
#   sbatch --account=A --partition=P --array=0-15 --gpus=1 slurm/prepare_data.sh SOURCE --out SHARDS [--features]
#   sbatch --account=A --partition=P --array=0-15 --gpus=1 slurm/prepare_data.sh --config NAME [as for training]
#SBATCH --job-name=raphael-data
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.log
# Settings from the environment: CONFIG OVERRIDES DRY_RUN PYTHON RAPHAEL_HOME RUN_UMASK.
set -uo pipefail
home=${RAPHAEL_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[[ -f $home/slurm/common.sh ]] || home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ -f $home/slurm/common.sh ]] || home=$(raphael-slurm --home 2>/dev/null)
[[ -f $home/slurm/common.sh ]] || { echo "error: RAPHAEL_HOME must be set. Call sbatch in the repository, or set it to what raphael-slurm --home prints." >&2; exit 2; }
# shellcheck source=slurm/common.sh
source "$home/slurm/common.sh"

overrides=()
split_words "${OVERRIDES:-}"
number SLURM_ARRAY_TASK_MIN 0
number SLURM_ARRAY_TASK_ID 0
number SLURM_ARRAY_TASK_STEP 1
number SLURM_ARRAY_TASK_COUNT 1
((SLURM_ARRAY_TASK_STEP > 0)) || die "SLURM_ARRAY_TASK_STEP must be above 0. Correct --array."
part=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / SLURM_ARRAY_TASK_STEP)) parts=$SLURM_ARRAY_TASK_COUNT
((part >= 0 && part < parts)) || die "--array must have evenly spaced numbers, as in --array=0-15. Correct it."
config=()
given --out "$@" || choose_config "$@"  # shards require no configuration, features do
run "$python" "$tools"/prepare_data.py "${config[@]}" --part "$part" --parts "$parts" "${overrides[@]}" "$@"
