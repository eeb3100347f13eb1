#!/usr/bin/env bash
# Converts a checkpoint to another layout on a node with enough memory and a fast disk.
#   sbatch --account=A --partition=P --mem=64G slurm/convert_checkpoint.sh [arguments of tools/convert_checkpoint.py]
#SBATCH --job-name=raphael-convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --output=slurm-%j.log
# Settings from the environment: DRY_RUN PYTHON RAPHAEL_HOME RUN_UMASK.
set -uo pipefail
home=${RAPHAEL_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[[ -f $home/slurm/common.sh ]] || home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ -f $home/slurm/common.sh ]] || home=$(raphael-slurm --home 2>/dev/null)
[[ -f $home/slurm/common.sh ]] || { echo "error: RAPHAEL_HOME must be set. Call sbatch in the repository, or set it to what raphael-slurm --home prints." >&2; exit 2; }
# shellcheck source=slurm/common.sh
source "$home/slurm/common.sh"

run "$python" "$tools"/convert_checkpoint.py "$@"
