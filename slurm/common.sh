# shellcheck shell=bash
# Functions and checks of the other scripts. Values are passed in arrays and quotes; nothing is evaluated a second time.

umask "${RUN_UMASK:-077}"
# shellcheck disable=SC2034
if [[ -f ${home:?}/raphael_dist/train.py ]]; then
    cd "$home" || exit 2
    export PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}"
    train_py=raphael_dist/train.py tools=tools
else # an installed package: this folder is its assets/, and runs belong where sbatch was called
    train_py=$(cd "$home/.." && pwd)/train.py tools=$home/tools
    [[ -f $train_py ]] || { echo "error: RAPHAEL_HOME=$home must be the repository, or the folder that raphael-slurm --home prints. Correct it." >&2; exit 2; }
fi
export PYTHONUNBUFFERED=1

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

say() {
    printf '[%(%FT%T)T] %s\n' -1 "$*"
}

# A newline in a value would forge lines of a log.
no_control_characters() {
    [[ $2 != *[[:cntrl:]]* ]] || die "$1=$(printf '%q' "$2") must not contain a control character, such as a newline. Remove it."
}

# number NAME [DEFAULT]: make the variable NAME a decimal number, DEFAULT where it is empty. Arithmetic runs commands in the value
# of a variable, so each value is matched first; and a leading 0 would mean octal.
number() {
    local -n value=$1
    value=${value:-${2:-}}
    [[ $value =~ ^[0-9]{1,10}$ ]] || die "$1=$(printf '%q' "$value") must be a whole number. Correct it."
    value=$((10#$value))
}

# split_words TEXT: set `overrides` to its words, split at blanks, without expanding anything.
split_words() {
    # shellcheck disable=SC2034
    read -r -d '' -a overrides <<<"$1" || true
}

# given WORD ARGUMENT...: whether an argument is WORD, or begins with WORD and =.
given() {
    local word=$1 argument
    for argument in "${@:2}"; do
        [[ $argument != "$word" && $argument != "$word="* ]] || return 0
    done
    return 1
}

# choose_config ARGUMENT...: set `config` to the option that names the configuration; empty if an argument does, or for
# the default of the program.
choose_config() {
    # shellcheck disable=SC2034
    config=(${CONFIG:+--config "$CONFIG"})
    if given --config "$@"; then
        [[ -z ${CONFIG:-} ]] || die "CONFIG=$CONFIG and --config must not be combined. Set one of them."
    fi
}

# Run a command, or with DRY_RUN=1 print it.
run() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

# Replace this (sub)shell by a command, or with DRY_RUN=1 print it.
become() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then run "$@"; else exec "$@"; fi
}

# count_ranks: set `nodes` (their names, where Slurm has them), `num_nodes`, `tasks` (ranks on a node) and `cpus` (of a rank).
count_ranks() {
    number SLURM_JOB_NUM_NODES 1
    number SLURM_NTASKS "$SLURM_JOB_NUM_NODES"
    nodes=() num_nodes=$SLURM_JOB_NUM_NODES
    ((num_nodes > 0)) || die "SLURM_JOB_NUM_NODES must be above 0"
    # One rank per GPU; without GPUs, one per task.
    number TASKS_PER_NODE "${SLURM_GPUS_ON_NODE:-0}"
    tasks=$TASKS_PER_NODE
    if ((tasks == 0)); then
        tasks=$((SLURM_NTASKS / num_nodes))
        ((tasks > 0)) || tasks=1
    fi
    number SLURM_CPUS_ON_NODE "$tasks"
    cpus=$((SLURM_CPUS_ON_NODE / tasks))
    ((cpus > 0)) || cpus=1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
    # Every rank must see all GPUs of its node and picks its own; these would hide the others from it.
    unset SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_GPU_BIND SLURM_TRES_PER_TASK SLURM_CPUS_PER_TASK SLURM_NTASKS_PER_NODE
    if command -v scontrol >/dev/null && [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
        mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    fi
}

# address_of NODE: print its name, or the address in Slurm's configuration where the name does not resolve.
address_of() {
    local address=
    getent hosts "$1" >/dev/null || address=$(scontrol -o show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    printf '%s\n' "${address:-$1}"
}

# run_ranks KILL COMMAND...: run it as one rank per GPU of the job. KILL: 1 if a rank that fails ends the others, else 0.
run_ranks() {
    local kill=$1 few=()
    shift
    count_ranks
    if ((num_nodes * tasks == 1)); then
        run "$@"
        return
    fi
    ((tasks <= SLURM_CPUS_ON_NODE)) || few=(--overcommit) # more GPUs than cores
    export MASTER_ADDR=${MASTER_ADDR:-$(address_of "${nodes[0]:-$(hostname)}")}
    number MASTER_PORT "$((15000 + SLURM_JOB_ID * 13 % 7000))" # below the ephemeral ports
    export MASTER_PORT
    run srun "--nodes=$num_nodes" "--ntasks=$((num_nodes * tasks))" "--ntasks-per-node=$tasks" "--cpus-per-task=$cpus" \
        --mem=0 "--kill-on-bad-exit=$kill" "${few[@]}" "$@"
}

if [[ -n ${PYTHON:-} ]]; then
    python=$PYTHON
elif [[ -x $home/.venv/bin/python ]]; then
    python=$home/.venv/bin/python
else
    python=$(command -v python3) || die "there is no python3. Run 'make install', or set PYTHON."
fi
[[ -x $(command -v "$python") ]] || die "PYTHON=$python must be a program. Set it to the Python of the environment."

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    [[ ${DRY_RUN:-0} == 1 ]] || die "this is not a Slurm job. Start it with 'sbatch slurm/$(basename "$0")', or print the commands with DRY_RUN=1."
    SLURM_JOB_ID=0
fi
number SLURM_JOB_ID
