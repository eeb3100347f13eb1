"""A hang ends with stacks and the name of a rank, a slow rank is named, and a stop request saves a checkpoint."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raphael_dist.errors import EXIT_HUNG, EXIT_INTERRUPTED, UserError
from raphael_dist.runtime.stop_request import StopRequest, parse_time
from raphael_dist.runtime.watchdog import Heartbeat, describe_stragglers
from raphael_dist.training.metrics_files import read_metrics
from raphael_dist.training.stragglers import Stragglers
from tests.lib.launch import ROOT, rank_env, run_ranks
from tests.training.test_training import SMALL, wait_for

ALONE = """
import ctypes, sys, time
from pathlib import Path
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.runtime.watchdog import Watchdog
with Watchdog(Ranks(), Path(sys.argv[1]), 1.0) as dog:
    for step in range(30 if sys.argv[2] != "long" else 80):
        dog.heartbeat(f"step {step}")
        time.sleep(0.1)
    if sys.argv[2] == "sleep":
        def stuck_here():
            time.sleep(100)
        stuck_here()
    if sys.argv[2] == "lock":
        ctypes.PyDLL(None).sleep(100)
print("done")
"""


def test_hang_writes_stacks_even_while_the_interpreter_lock_is_held(tmp_path: Path) -> None:
    began = {}
    for how in ("none", "sleep", "lock"):
        env = rank_env(1) | {"RAPHAEL_EXIT_FILE": str(tmp_path / f"{how}.code")}
        command = [sys.executable, "-c", ALONE, str(tmp_path / how), how]
        began[how] = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    outputs = {how: process.communicate(timeout=60)[0] for how, process in began.items()}
    assert outputs["none"] == "done\n"
    assert not list((tmp_path / "none" / "logs").rglob("*rank*")), "nothing is left of a run that ended well"
    assert began["sleep"].returncode == EXIT_HUNG
    assert (tmp_path / "sleep.code").read_text() == f"{EXIT_HUNG}\n"
    assert "no progress for 1 s at step 29" in outputs["sleep"]
    assert "stuck_here" in (tmp_path / "sleep" / "logs" / "stacks-rank-0.txt").read_text()
    assert began["lock"].returncode not in (0, 2, 3, EXIT_INTERRUPTED)
    assert "line 15" in (tmp_path / "lock" / "logs" / "stacks-rank-0.txt").read_text()


@pytest.mark.parametrize("all_of_it", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["the job", "the rank alone"])
def test_suspension_longer_than_the_time_out_is_no_hang(tmp_path: Path, all_of_it: bool) -> None:
    command = [sys.executable, "-c", ALONE, str(tmp_path), "long"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=rank_env(1), cwd=ROOT, text=True, start_new_session=True, **output)
    try:
        wait_for((tmp_path / "logs" / "heartbeats" / "rank-00000").exists)
        send = os.killpg if all_of_it else os.kill
        time.sleep(1.0)
        send(process.pid, signal.SIGSTOP)
        time.sleep(6.0)  # the time-out is 1 s, and 5 s at the start
        send(process.pid, signal.SIGCONT)
        assert process.communicate(timeout=60)[0] == "done\n"
        assert process.returncode == 0
    finally:
        process.kill()


@pytest.mark.slow
def test_rank_that_stops_before_the_first_step_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "tests/workers/start_run.py", "1", *SMALL, f"run.dir={tmp_path}/run", "run.hang_timeout_s=6"]
    ranks = spawn([*command, "sample.prompts=[]", "data.val_shards=[]", f"data.cache_dir={tmp_path}/cache"])
    try:
        output = ranks[0].communicate(timeout=200)[0]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[0].returncode == EXIT_HUNG, output
    assert "no progress for 30 s at the test of a micro-batch: rank 1 on host1 has given no sign of life" in output


def test_rank_that_is_behind_or_silent_is_named() -> None:
    def rank(number: int, beats: int, age: float) -> Heartbeat:
        return Heartbeat(number, f"n{number}", beats, f"step {beats}", 1e9 - age)

    assert describe_stragglers([rank(0, 9, 0), rank(1, 9, 1)], 2.0) == "all ranks have reached the same point"
    assert describe_stragglers([rank(0, 9, 0), rank(1, 8, 1)], 2.0) == "rank 1 on n1 is behind, at step 8"
    silent = "rank 1 on n1 has given no sign of life for 30 s (last: step 9)"
    assert describe_stragglers([rank(0, 9, 0), rank(1, 9, 30), rank(2, 9, 1)], 2.0) == silent
    assert describe_stragglers([rank(i, i % 2, 0) for i in range(100)], 2.0).endswith("and 45 more")


def test_slow_rank_is_named_by_its_own_time_over_20_steps() -> None:
    stragglers = Stragglers(["a", "b", "c"])
    for seconds in ([1.0, 1.1, 1.0], [1.0, 1.2, 9.0]):
        stragglers._recent.append((10, seconds))
    assert stragglers.describe_slow() == (
        "slow ranks for 20 steps or more: rank 2 on c (its own work takes 4.3 times the median)"
    )
    assert stragglers.slowest_ratio() == pytest.approx(10 / 2.3)


def test_max_time_is_parsed_in_slurms_forms() -> None:
    expected = {"90": 5400, "1:30": 90, "1:00:30": 3630, "2-1": 176400, "1-0:30": 88200, "0-0:0:5": 5}
    assert {text: parse_time(text) for text in expected} == expected
    for wrong in ("", "x", "-5", "1:2:3:4", "1-", "1h", "10\n"):
        with pytest.raises(UserError, match="--max-time"):
            parse_time(wrong)
    assert [StopRequest(time).requested for time in (60.0, 0.0, None)] == [False, True, False]


def start(folder: Path, how: str, rank: int, *options: str, world_size: int = 2) -> list[subprocess.Popen]:
    command = [sys.executable, "tests/workers/hang_run.py", how, str(rank), *SMALL, f"run.dir={folder}", *options]
    return spawn([*command, f"data.cache_dir={folder.parent}/cache", "sample.prompts=[]", "data.val_shards=[]"], world_size)


def spawn(command: list[str], world_size: int = 2) -> list[subprocess.Popen]:
    env = rank_env(world_size)
    return [
        subprocess.Popen(
            command,
            env={**env, "RANK": str(r), "LOCAL_RANK": str(r), "SLURMD_NODENAME": f"host{r}"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(world_size)
    ]


def end(ranks: list[subprocess.Popen], timeout: float) -> list[str]:
    try:
        return [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "data", "lock"])
def test_hung_run_names_the_late_rank_and_exits(tmp_path: Path, how: str) -> None:
    """With expert parallelism: the exchange in an expert group hangs, which no process group's time-out would end."""
    spread = ("parallel.space_ep=2", "parallel.time_ep=2", "--deepspeed_config=ds_configs/zero2.json")
    ranks = start(tmp_path / "run", how, 1, "run.hang_timeout_s=20", "train.max_steps=1000", *spread)
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        code = ranks[0].wait(timeout=120)
        # When the timer has ended the rank that keeps the lock, the other may find the connection closed.
        assert code == EXIT_HUNG or (how == "lock" and code == 1)
        assert time.time() - metrics.stat().st_mtime < 50, "it ended later than the time-out"
        if how != "stop":
            assert ranks[1].wait(timeout=10) not in (0, 2, 3, EXIT_INTERRUPTED)
    finally:
        for rank in ranks:
            rank.kill()
    output = ranks[0].communicate()[0]
    message = "has given no sign of life" if how != "data" else "is behind, at the data of step"
    assert f"rank 1 on host1 {message}" in output
    assert f"rank 1 on host1 {message}" in (tmp_path / "run" / "train.log").read_text()
    logs = tmp_path / "run" / "logs"
    if how != "data":  # there rank 1 also gives up, and when it is first, rank 0 has left the exchange by the time it writes
        assert "expert_dispatch.py" in (logs / "stacks-rank-0.txt").read_text()
    if how != "stop":
        assert "hang_run.py" in (logs / "stacks-rank-1.txt").read_text()


@pytest.mark.slow
def test_slow_rank_of_a_run_is_named_with_its_host(tmp_path: Path) -> None:
    ranks = start(tmp_path / "run", "slow", 1, "train.max_steps=25", "train.log_every=5")
    end(ranks, 280)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "rank 1 on host1 (" in log
    assert "rank 0 on host0 (" not in log
    ratios = [value for _, value in read_metrics(tmp_path / "run" / "metrics.jsonl")["time/slowest_rank_ratio"]]
    assert ratios[-1] > 1.5


@pytest.mark.slow
def test_traceback_of_one_rank_is_in_its_log(tmp_path: Path) -> None:
    end(start(tmp_path / "run", "raise", 1, "train.max_steps=30"), 120)
    log = (tmp_path / "run" / "logs" / "rank-00001.log").read_text()
    assert "ZeroDivisionError: a bug on one rank" in log
    assert "Traceback" in log


def test_signal_or_time_limit_during_startup_exits_with_code_75(tmp_path: Path) -> None:
    """After the first step it is the same as with any signal (test_training.py)."""
    command = [sys.executable, "raphael_dist/train.py", *SMALL, "train.max_steps=100000", "sample.prompts=[]"]
    command += ["data.val_shards=[]", f"data.cache_dir={tmp_path}/cache"]
    began = {}
    for name, options in (("timed", ["--max-time", "0:00"]), ("early", [])):
        env = rank_env(1) | {"RAPHAEL_EXIT_FILE": str(tmp_path / f"{name}.code")}
        began[name] = subprocess.Popen(
            [*command, f"run.dir={tmp_path / name}", *options], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
    try:
        wait_for((tmp_path / "early" / "train.log").exists)  # the data, the model and the engine are still to come
        began["early"].send_signal(signal.SIGUSR1)
        for name, process in began.items():
            output = process.communicate(timeout=120)[0]
            assert process.returncode == EXIT_INTERRUPTED, name
            assert "stopped by a signal or the time limit at step 0, with nothing new to save" in output, name
            assert (tmp_path / f"{name}.code").read_text() == f"{EXIT_INTERRUPTED}\n"
    finally:
        for process in began.values():
            process.kill()


@pytest.mark.slow
def test_max_time_saves_and_the_same_command_resumes(tmp_path: Path) -> None:
    command = ["raphael_dist/train.py", *SMALL, "sample.prompts=[]", "data.val_shards=[]", f"run.dir={tmp_path}/run"]
    command += [f"data.cache_dir={tmp_path}/cache", "checkpoint.every=0", "train.max_steps=100000"]
    output = run_ranks([*command, "--max-time", "1:00"], 1, exit_code=EXIT_INTERRUPTED)[0]
    step = output.split("time limit at step ")[1].split(";")[0]
    assert "saved " in output
    assert f"resumed at step {step}" in run_ranks([*command, "--max-time", "0:00"], 1, exit_code=EXIT_INTERRUPTED)[0]
