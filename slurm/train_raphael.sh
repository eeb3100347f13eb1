#!/usr/bin/env bash
# Trains on whole nodes, and continues by itself after a time limit, a preemption, a crash or a lost node. See slurm/README.md.
#   sbatch --account=A --partition=P --nodes=4 --gpus-per-node=8 --time=24:00:00 slurm/train_raphael.sh --config NAME [...]
#SBATCH --job-name=raphael
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# Settings from the environment: CONFIG DS_CONFIG RUN_DIR OVERRIDES LAUNCHER DRY_RUN PREFLIGHT PREFLIGHT_MINUTES SPARE_NODES
# REQUEUE MAX_RESTARTS TASKS_PER_NODE PYTHON RAPHAEL_HOME RUN_UMASK MASTER_ADDR MASTER_PORT.
set -uo pipefail

# Slurm runs a copy of this file, so the repository is where sbatch was called.
home=${RAPHAEL_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[[ -f $home/slurm/common.sh ]] || home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ -f $home/slurm/common.sh ]] || home=$(raphael-slurm --home 2>/dev/null)
[[ -f $home/slurm/common.sh ]] || { echo "error: RAPHAEL_HOME must be set. Call sbatch in the repository, or set it to what raphael-slurm --home prints." >&2; exit 2; }
# shellcheck source=slurm/common.sh
source "$home/slurm/common.sh"

# --- what to train ---------------------------------------------------------------------------------------------------
run_dir=${RUN_DIR:-}
overrides=()
split_words "${OVERRIDES:-}"
for argument in "${overrides[@]}" "$@"; do
    [[ $argument != run.dir=* ]] || run_dir=${argument#run.dir=}
done
choose_config "$@"
# configured_dir ARGUMENT...: print the run.dir of the configuration, where that is a YAML file with a run.dir.
configured_dir() {
    local file=${CONFIG:-} before='' argument
    for argument in "$@"; do
        [[ $before != --config ]] || file=$argument
        [[ $argument != --config=* ]] || file=${argument#--config=}
        before=$argument
    done
    [[ -f $file ]] && grep -q 'dir *:' -- "$file" || return 0
    "$python" -c 'import sys; from raphael_dist.config.load import read_yaml; print(read_yaml(sys.argv[1]).tree["run"]["dir"])' \
        "$file" 2>/dev/null
}
[[ -n $run_dir ]] || run_dir=$(configured_dir "$@")
if [[ -z $run_dir ]]; then
    name=${SLURM_JOB_NAME:-raphael}
    [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || die "the job name $(printf '%q' "$name") cannot be the name of a folder. Set RUN_DIR."
    run_dir=runs/$name
fi
no_control_characters RUN_DIR "$run_dir"
arguments=("${config[@]}" ${DS_CONFIG:+--deepspeed_config "$DS_CONFIG"})
# The trainer refuses a key that is set twice.
given run.dir "$@" "${overrides[@]}" || arguments+=("run.dir=$run_dir")
arguments+=("${overrides[@]}")
# After a restart, ranks of the run before may lock the directory until they notice that others are gone.
[[ ${SLURM_RESTART_COUNT:-0} =~ ^0*$ ]] || given run.lock_wait_s "$@" "${overrides[@]}" || arguments+=("run.lock_wait_s=120")
arguments+=("$@")
train=("$python" "$train_py")

# --- on which nodes and ranks ----------------------------------------------------------------------------------------
number SPARE_NODES 0
number MAX_RESTARTS 5
number PREFLIGHT_MINUTES 3
number SLURM_RESTART_COUNT 0
spares=$SPARE_NODES limit=$MAX_RESTARTS
count_ranks
((num_nodes > spares)) || die "SPARE_NODES=$spares must be below the number of nodes, which is $num_nodes. Lower it, or request more nodes."

# use_nodes COUNT: the ranks of the steps that follow, and where they meet: rank 0 is on the first node.
use_nodes() {
    local first=${nodes[0]:-$(hostname)}
    world_size=$(($1 * tasks))
    step=("--nodes=$1" "--cpus-per-task=$cpus" --mem=0 --kill-on-bad-exit=1)
    ((${#nodes[@]} == 0)) || step+=("--nodelist=$(IFS=, && echo "${nodes[*]:0:$1}")")
    export MASTER_ADDR=${given_addr:-$(address_of "$first")}
}
given_addr=${MASTER_ADDR:-}
# By the job, so that two jobs on a node do not collide; another one after a restart, when the old one may still be bound.
# Below the range of ephemeral ports.
number MASTER_PORT "$((15000 + (SLURM_JOB_ID * 13 + SLURM_RESTART_COUNT) % 7000))"
export MASTER_PORT

# --- the launchers ---------------------------------------------------------------------------------------------------
# launch_LAUNCHER PROGRAM...: become the launcher. The scripts in quotes are constant; programs are their arguments. They
# ignore USR1, which would end the launchers; Slurm sends it to the ranks too.
launch_srun() {
    become srun "${step[@]}" "--ntasks=$world_size" "--ntasks-per-node=$tasks" "$@"
}

launch_torchrun() {
    # shellcheck disable=SC2016  # the node's rank is known on the node
    become srun "${step[@]}" "--ntasks=$((world_size / tasks))" --ntasks-per-node=1 \
        bash -c 'trap "" USR1; exec "$0" -m torch.distributed.run --node_rank "$SLURM_NODEID" "$@"' "$python" \
        --nnodes "$((world_size / tasks))" --nproc_per_node "$tasks" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "${@:2}"
}

launch_deepspeed() {
    local hosts=$run_dir/.hostfile-$SLURM_JOB_ID count=$((world_size / tasks))
    if [[ ${DRY_RUN:-0} != 1 ]]; then
        # Never through a symbolic link: noclobber opens a new file only.
        rm -f -- "$hosts" && (set -C && printf "%s slots=$tasks\n" "${nodes[@]:0:count}" >"$hosts") || return
    fi
    # shellcheck disable=SC2016
    become srun "${step[@]}" "--ntasks=$count" --ntasks-per-node=1 \
        bash -c 'trap "" USR1; exec "$0" -m deepspeed.launcher.runner --node_rank "$SLURM_NODEID" "$@"' "$python" \
        --hostfile "$hosts" --no_ssh --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "${@:2}"
}

launch_mpirun() {
    local name keep=()
    for name in PATH PYTHONPATH PYTHONUNBUFFERED OMP_NUM_THREADS MASTER_ADDR MASTER_PORT RAPHAEL_EXIT_FILE; do
        keep+=(-x "$name")
    done
    become mpirun -np "$world_size" --map-by "ppr:$tasks:node:oversubscribe" --bind-to none "${keep[@]}" "$@"
}

launcher=${LAUNCHER:-srun}
case $launcher in
srun | torchrun | deepspeed) ;;
mpirun)
    if ((EUID == 0)) && [[ ${DRY_RUN:-0} != 1 && ${OMPI_ALLOW_RUN_AS_ROOT:-}${OMPI_ALLOW_RUN_AS_ROOT_CONFIRM:-} != 11 ]]; then
        die "LAUNCHER=mpirun requires a user other than root. Submit as another user, or set OMPI_ALLOW_RUN_AS_ROOT=1 and" \
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1."
    fi
    ;;
*) die "LAUNCHER=$(printf '%q' "$launcher") must be one of srun, torchrun, deepspeed, mpirun. Change it." ;;
esac

# --- restart, or end -------------------------------------------------------------------------------------------------
child='' cancelled=0 timed_out=0

# ask COMMAND...: run a command of Slurm, up to three times, because the controller may be busy. Slurm sends TERM to all
# processes of an ending job, more than once: the command ignores it.
ask() {
    local _
    for _ in 1 2 3; do
        (trap '' TERM && exec "$@") && return
        sleep 1
    done
    return 1
}

# On TERM the job is over. Slurm itself requeues a preempted job, but not one whose time ran out.
on_term() {
    ((timed_out + cancelled == 0)) || return
    if [[ $(ask squeue -h -j "$SLURM_JOB_ID" -o %r 2>/dev/null) == TimeLimit ]]; then timed_out=$((SECONDS + 1)); else cancelled=1; fi
}
trap on_term TERM
signalled=''
on_usr1() {
    [[ -n $signalled ]] || signalled=$SECONDS
    [[ -z $child ]] || kill -USR1 "$child" 2>/dev/null
}
trap on_usr1 USR1

# supervise COMMAND...: run it in the background, so that traps run meanwhile; return its exit code. Not by `wait` in a loop:
# when a signal and the end of the child coincide, bash 5.2 loses the exit code (47 of 300 times). Not by `read -t`: bash 5.2
# aborts when its time is up while a trap runs. srun waits without end for the ranks of a node that it cannot reach, so it is
# killed `grace` seconds after a rank has left its exit code (0: never). Slurm kills this script 30 seconds (KillWait) after
# TERM: a time limit is handled before that, even if a rank ignores TERM.
grace=0
supervise() {
    local code ended=''
    "$@" &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.5
        [[ -n $ended || ! -s $RAPHAEL_EXIT_FILE ]] || ended=$SECONDS
        [[ -z $ended ]] || ((grace == 0 || SECONDS - ended <= grace)) || kill -KILL "$child" 2>/dev/null
        ((timed_out == 0 || SECONDS - timed_out <= 6)) || return 143
    done
    wait "$child"
    code=$?
    child=''
    return "$code"
}

newest_checkpoint() {
    local path newest=none
    for path in "$run_dir"/checkpoints/step-*; do
        # Only names that the trainer writes: a copy that a user made is no progress.
        [[ ${path##*/} =~ ^step-[0-9]{8,}$ && -d $path ]] && newest=${path##*/}
    done
    echo "$newest"
}

# check_time SAVED: end the job where its time limit is too short to train: Slurm then sends USR1 as soon as the job runs.
# Where a few steps were trained, only log that most of the time is lost.
check_time() {
    local left minutes signal_s=${signalled:-$SECONDS} saved=$1 result="no checkpoint was saved"
    left=$(squeue -h -j "$SLURM_JOB_ID" -o %L 2>/dev/null)
    [[ $left =~ ^([0-9]{1,2}:)?[0-9]{1,2}:[0-9]{2}$ ]] || return 0 # more than a day is left
    [[ $left == *:*:* ]] || left=0:$left
    minutes=$((10#${left%%:*} * 60 + 10#$(cut -d: -f2 <<<"$left")))
    ((minutes <= 30 && signal_s <= minutes * 60 + 60)) || return 0
    ((saved == 0)) || result="most of its time is lost"
    say "Slurm signalled the run to stop $signal_s s after the job's start, about $minutes minutes before its time limit, and" \
        "$result: give a longer --time, or fewer seconds in --signal=USR1@SECONDS"
    ((saved)) || exit 2
}

# requeue CODE WHY: requeue the job; give up when several restarts brought no newer checkpoint.
requeue() {
    local count=0 before='' now
    now=$(newest_checkpoint)
    [[ ! -f $run_dir/.restarts ]] || read -r count before <"$run_dir/.restarts"
    [[ $count =~ ^[0-9]{1,9}$ && $before == "$now" ]] || count=0
    count=$((10#$count + 1))
    if ((count > limit)); then
        say "giving up: $2, and $limit restarts brought no newer checkpoint (newest: $now). Fix the cause, then: rm $run_dir/.restarts"
        exit "$1"
    fi
    # Without a count there is no restart: a full disk would otherwise requeue the job for ever.
    local new=$run_dir/.restarts.new
    if ! { rm -f -- "$new" && (set -C && printf '%s %s\n' "$count" "$now" >"$new") && mv "$new" "$run_dir/.restarts"; }; then
        say "$2. The job is not requeued, because $run_dir/.restarts cannot be written. Free some space, and submit it again."
        exit 4
    fi
    if [[ ${REQUEUE:-1} != 1 ]]; then
        say "$2. The job is not requeued, because REQUEUE=${REQUEUE:-}"
    elif ! command -v scontrol >/dev/null; then
        say "$2. The job is not requeued, because there is no scontrol here (a container?). Submit it again, or let the administrator set RequeueExit=75,76"
    elif ask scontrol requeue "$SLURM_JOB_ID"; then
        say "$2. The job is requeued (restart $count with checkpoint $now; Slurm waits about two minutes)"
        exit 0
    fi
    exit "$1"
}

finish() {
    local code=$1
    # Some launchers turn every code into 1, and srun may have ended the rank that exited last: rank 0 leaves the right code.
    local rank_code='' why=''
    if ((code != 0)) && [[ -s $RAPHAEL_EXIT_FILE ]]; then read -r rank_code <"$RAPHAEL_EXIT_FILE"; fi
    if [[ -s $RAPHAEL_EXIT_FILE.why ]]; then read -r why <"$RAPHAEL_EXIT_FILE.why"; fi
    [[ ! $rank_code =~ ^[0-9]{1,3}$ ]] || code=$((10#$rank_code))
    rm -f "$RAPHAEL_EXIT_FILE" "$RAPHAEL_EXIT_FILE.why"
    if ((code == 0)); then
        say "complete: $run_dir"
        rm -f "$run_dir/.restarts"
        exit 0
    fi
    if ((code == 2 || code == 3 || code == 4)); then
        say "exit code $code. A restart would not help: ${why:-see above}"
        exit "$code"
    fi
    if ((cancelled)); then
        say "exit code $code after a cancellation, preemption or requeue by Slurm"
        exit "$code"
    fi
    ((timed_out)) && requeue "$code" "the time limit came before the run could save"
    case $code in
    75 | 138) # 138: USR1 reached a rank that was still starting
        if [[ $(newest_checkpoint) != "$first_checkpoint" ]]; then
            check_time 1
            requeue 75 "stopped after saving"
        fi
        check_time 0
        requeue 75 "stopped, with nothing new to save"
        ;;
    76) requeue 76 "the run hung (stacks in $run_dir/logs)" ;;
    *) requeue "$code" "exit code $code" ;;
    esac
}

# --- preflight, then training ----------------------------------------------------------------------------------------
# Keep in `nodes` those that have a report in the folder $1, and those on which srun can start a process. Where srun cannot
# reach one node, it starts no rank, or kills those that it started: good nodes may have no report.
keep_reached_nodes() {
    local node reached=()
    for node in "${nodes[@]}"; do
        if grep -qsF "\"node\": \"$node\"" "$1"/rank-*.json ||
            supervise timeout 60 srun --nodes=1 --ntasks=1 --mem=0 "--nodelist=$node" true; then
            reached+=("$node")
        elif ((cancelled || timed_out)) || [[ -n $signalled ]]; then
            finish 75
        else
            say "fault: $node: srun cannot start a process there; check its network and slurmd"
        fi
    done
    nodes=("${reached[@]}")
}

# Check the nodes; as long as spares remain, again without those that failed.
preflight() {
    local out=$run_dir/preflight code needed=$((num_nodes - spares)) minutes started
    minutes=$((PREFLIGHT_MINUTES + num_nodes * tasks / 500))
    while :; do
        run rm -rf "$out"
        # A rank that fails must not end the others before they report.
        use_nodes "$((${#nodes[@]} > 0 ? ${#nodes[@]} : num_nodes))"
        step+=(--kill-on-bad-exit=0 "--time=$minutes") # or one node that hangs holds the job for ever
        MASTER_PORT=$((MASTER_PORT + 7000)) supervise launch_srun "$python" "$tools"/check_cluster.py --out "$out" "${arguments[@]}"
        code=$?
        case $code in 2 | 75 | 138) finish "$code" ;; esac
        ((cancelled || timed_out)) && finish "$code"
        if ((code != 0 && ${#nodes[@]} > 1)); then
            started=${#nodes[@]}
            keep_reached_nodes "$out"
            ((${#nodes[@]} >= needed)) || finish 1
            ((${#nodes[@]} == started)) || continue
        fi
        run "$python" "$tools"/check_cluster.py --judge "$out" --ranks "$world_size" --need "$needed" --nodes "${nodes[@]}"
        code=$?
        ((code != 4)) && break
        mapfile -t nodes <"$out/good-nodes"
    done
    ((code == 0)) || finish "$code"
}

first_checkpoint=$(newest_checkpoint)
run mkdir -p "$run_dir/checkpoints" || die "RUN_DIR=$run_dir must be writable, but the folder $run_dir/checkpoints cannot be created. Choose another RUN_DIR."
export RAPHAEL_EXIT_FILE=$run_dir/.exit-code-$SLURM_JOB_ID
remove_exit_file() { run rm -f "$RAPHAEL_EXIT_FILE" "$RAPHAEL_EXIT_FILE.why"; }
remove_exit_file
say "job $SLURM_JOB_ID, restart $SLURM_RESTART_COUNT: nodes: $((num_nodes - spares)), ranks per node: $tasks, $launcher, $run_dir"
[[ ${PREFLIGHT:-1} != 1 ]] || preflight
remove_exit_file # of a rank of the preflight that failed, while the preflight passed
use_nodes "$((num_nodes - spares))"
grace=180
supervise "launch_$launcher" "${train[@]}" "${arguments[@]}"
code=$?
[[ ${DRY_RUN:-0} == 1 ]] || finish "$code"
