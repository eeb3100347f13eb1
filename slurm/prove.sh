#!/usr/bin/env bash
# Proves this installation on the nodes of a job, one rank per GPU, in about ten minutes: report.html and report.json.
#   sbatch --account=A --partition=P --nodes=2 --gpus-per-node=8 slurm/prove.sh [--config NAME ...]
#SBATCH --job-name=raphael-prove
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=01:00:00
#SBATCH --output=slurm-%j.log
# Settings from the environment: PROOF_DIR TASKS_PER_NODE MASTER_ADDR MASTER_PORT DRY_RUN PYTHON RAPHAEL_HOME RUN_UMASK; arguments
# are those of `python -m raphael_dist prove`. Exit codes: 0 all checks passed, 2 bad environment, 3 wrong numbers. A second
# job with the same PROOF_DIR repeats only what did not pass.
set -uo pipefail
home=${RAPHAEL_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[[ -f $home/slurm/common.sh ]] || home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ -f $home/slurm/common.sh ]] || home=$(raphael-slurm --home 2>/dev/null)
[[ -f $home/slurm/common.sh ]] || { echo "error: RAPHAEL_HOME must be set. Call sbatch in the repository, or set it to what raphael-slurm --home prints." >&2; exit 2; }
# shellcheck source=slurm/common.sh
source "$home/slurm/common.sh"

no_control_characters PROOF_DIR "${PROOF_DIR:=proof}"
export RAPHAEL_EXIT_FILE=$PROOF_DIR/.exit-code-$SLURM_JOB_ID # rank 0 writes it at its end
set -m # srun gets a process group, to be killed as a whole: it waits without end for the ranks of a node that it cannot reach
run_ranks 0 "$python" -m raphael_dist prove --out "$PROOF_DIR" "$@" &
ended=0
while kill -0 $! 2>/dev/null; do
    sleep 0.5
    [[ ! -s $RAPHAEL_EXIT_FILE ]] || ((++ended < 60)) || kill -KILL -- -$!
done
wait $!
code=$?
[[ ! -s $RAPHAEL_EXIT_FILE ]] || read -r code <"$RAPHAEL_EXIT_FILE"
((code == 0 || code == 3)) || code=2 # srun's own code, if rank 0 was killed or did not start
rm -f "$RAPHAEL_EXIT_FILE"
[[ ${DRY_RUN:-0} == 1 ]] || say "exit code $code: read $PROOF_DIR/report.html"
exit "$code"
