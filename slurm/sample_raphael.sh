#!/usr/bin/env bash
# Draws images with a run's newest checkpoint; the prompts are divided over one rank per GPU.
#   RUN_DIR=runs/raphael sbatch --account=A --partition=P --gpus=1 slurm/sample_raphael.sh --prompt "a red heart" --out grid.png
#SBATCH --job-name=raphael-sample
#SBATCH --nodes=1
#SBATCH --output=slurm-%j.log
# Settings from the environment: RUN_DIR TASKS_PER_NODE MASTER_ADDR MASTER_PORT DRY_RUN PYTHON RAPHAEL_HOME RUN_UMASK; arguments are those of raphael_dist.sample.
set -uo pipefail
home=${RAPHAEL_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[[ -f $home/slurm/common.sh ]] || home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ -f $home/slurm/common.sh ]] || home=$(raphael-slurm --home 2>/dev/null)
[[ -f $home/slurm/common.sh ]] || { echo "error: RAPHAEL_HOME must be set. Call sbatch in the repository, or set it to what raphael-slurm --home prints." >&2; exit 2; }
# shellcheck source=slurm/common.sh
source "$home/slurm/common.sh"

no_control_characters RUN_DIR "${RUN_DIR:=runs/raphael}"
given --checkpoint "$@" || set -- --checkpoint "$RUN_DIR" "$@"
run_ranks 1 "$python" -m raphael_dist.sample "$@"
