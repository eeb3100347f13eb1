# shellcheck shell=bash
# What the scripts beside this one share. Values travel in arrays and quotes; nothing is evaluated a second time.

umask "${RUN_UMASK:-077}"
# shellcheck disable=SC2034
if [[ -f ${home:?}/raphael_dist/train.py ]]; then
    cd "$home" || exit 2
    export PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}"
    train_py=raphael_dist/train.py tools=tools
else # an installed package: this folder is its assets/, and runs belong where sbatch was called
    train_py=$(cd "$home/.." && pwd)/train.py tools=$home/tools
    [[ -f $train_py ]] || { echo "error: $home is neither the repository nor what raphael-slurm --home prints" >&2; exit 2; }
fi
export PYTHONUNBUFFERED=1

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

say() {
    printf '[%(%FT%T)T] %s\n' -1 "$*"
}

# Refuse what no honest value holds; a newline would forge lines of a log.
no_control_characters() {
    [[ $2 != *[[:cntrl:]]* ]] || die "$1 holds a control character, such as a newline: $(printf '%q' "$2")"
}

# number NAME [DEFAULT]: make the variable NAME a decimal number, DEFAULT where it is empty. Arithmetic runs what it finds in
# a variable, so that nothing may reach it unmatched; nor a leading 0, which it takes for octal.
number() {
    local -n given=$1
    given=${given:-${2:-}}
    [[ $given =~ ^[0-9]{1,10}$ ]] || die "$1 is not a number: $(printf '%q' "$given")"
    given=$((10#$given))
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

# choose_config ARGUMENT...: set `config` to the option that names the configuration, nothing where an argument does.
choose_config() {
    # shellcheck disable=SC2034
    config=(${CONFIG:+--config "$CONFIG"})
    if given --config "$@"; then
        [[ -z ${CONFIG:-} ]] || die "both CONFIG=$CONFIG and --config are given: give one"
    elif [[ -z ${CONFIG:-} ]]; then
        die "no configuration is chosen: give --config NAME among the arguments, or set CONFIG (a preset, or a YAML file)"
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

if [[ -n ${PYTHON:-} ]]; then
    python=$PYTHON
elif [[ -x $home/.venv/bin/python ]]; then
    python=$home/.venv/bin/python
else
    python=$(command -v python3) || die "no python: run 'make install', or set PYTHON"
fi
[[ -x $(command -v "$python") ]] || die "PYTHON: given $python, which is not a program"

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    [[ ${DRY_RUN:-0} == 1 ]] || die "not in a Slurm job: start with 'sbatch slurm/$(basename "$0")', or look with DRY_RUN=1"
    SLURM_JOB_ID=0
fi
number SLURM_JOB_ID
