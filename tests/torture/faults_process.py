"""Processes that are killed, stopped or signalled, and two runs in one directory."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from raphael_dist.errors import EXIT_HUNG, EXIT_INTERRUPTED
from tests.lib.launch import ROOT, rank_env
from tests.torture.kinds import fault
from tests.torture.trial import STEPS, WORLD, Outcome, Trial, checkpoints, refused, survived

LIFE = 4.0  # seconds that most runs of a few steps take
HANG_S = 6.0


def send(pid: int, number: int) -> bool:
    """Send a signal; return whether the process exists."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def at_random(trial: Trial, act: Callable[[list[int]], None]) -> Callable[[list[int]], None]:
    """Return a function that waits for a random moment, often of a save, and then acts on the ranks."""
    wait, on_save = trial.draw.uniform(0, LIFE), trial.draw.random() < 0.4
    late = trial.draw.uniform(0, 0.08)

    def meanwhile(pids: list[int]) -> None:
        deadline = time.monotonic() + (60 if on_save else wait)
        seen = set(writing(trial))
        while time.monotonic() < deadline and alive(pids):
            if on_save and set(writing(trial)) - seen:
                time.sleep(late)
                break
            time.sleep(0.002)
        act(pids)

    return meanwhile


def writing(trial: Trial) -> list[str]:
    """Return the temporary folders of unfinished saves."""
    return [path.name for path in (trial.run / "checkpoints").glob(".writing-*")]


def alive(pids: list[int]) -> bool:
    """Return whether all ranks exist."""
    return all(Path(f"/proc/{pid}").exists() for pid in pids)


def continue_after_death(trial: Trial, at: int, what: str) -> Outcome:
    """Check what a killed run left, and continue it."""
    newest = trial.check_lost_at_most_an_interval(at)
    trial.finish()
    return survived(f"{what}; continued from step {newest}")


@fault("kill -9 of a rank at a random moment", "kills")
def kill_one(trial: Trial) -> Outcome:
    at, victim = trial.begin(), trial.draw.randrange(WORLD)
    codes = trial.train(at_random(trial, lambda pids: send(pids[victim], signal.SIGKILL) and None))
    # The other may have had nothing left to do.
    assert all(codes) or not any(codes) or trial.newest() == STEPS, f"one rank continued alone: {codes}"
    return continue_after_death(trial, at, f"rank {victim}, exit codes {codes}")


@fault("kill -9 of all ranks at once", "kills")
def kill_all(trial: Trial) -> Outcome:
    at = trial.begin()
    codes = trial.train(at_random(trial, lambda pids: [send(pid, signal.SIGKILL) for pid in pids] and None))
    return continue_after_death(trial, at, f"exit codes {codes}")


@fault("kill -9 instead of the n-th call that changes the file system", "kills")
def kill_at_call(trial: Trial) -> Outcome:
    at, victim, call = trial.begin(), trial.draw.randrange(WORLD), int(trial.draw.triangular(0, 260, 20))
    codes = trial.train(around={victim: {"calls": [str(trial.folder / "calls.txt"), "kill", call]}})
    return continue_after_death(trial, at, f"rank {victim} at call {call}, exit codes {codes}")


@fault("five kills in a row", "kills")
def kill_often(trial: Trial) -> Outcome:
    at, reached = trial.begin(at=0), []
    for _ in range(5):
        victims = trial.draw.sample(range(WORLD), trial.draw.randint(1, WORLD))
        trial.train(at_random(trial, lambda pids, v=victims: [send(pids[i], signal.SIGKILL) for i in v] and None))
        at = trial.check_lost_at_most_an_interval(at)
        reached.append(at)
    trial.finish()
    return survived(f"continued from steps {reached}")


@fault("a signal to stop, at a random moment", "signals")
def signal_once(trial: Trial) -> Outcome:
    at, number = trial.begin(), trial.draw.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    victims = trial.draw.choice([[0], [1], [0, 1]])
    codes = trial.train(at_random(trial, lambda pids: [send(pids[i], number) for i in victims] and None))
    # Before the handlers are there (imports, fork) a signal ends the process as it does any.
    early = [0, EXIT_INTERRUPTED]
    if not set(codes) <= set(early):
        return continue_after_death(trial, at, f"{number.name} before the run listened, exit codes {codes}")
    assert len(set(codes)) == 1, f"the ranks disagree: {codes}"
    if codes[0] == EXIT_INTERRUPTED:
        # Saved where it stopped, which may be a step of which the oracle has no checkpoint.
        taken = max((json.loads(line)["step"] for line in trial.metrics_lines()), default=0)
        newest = int(checkpoints(trial.run)[-1].name[5:]) if checkpoints(trial.run) else 0
        assert newest == taken, f"stopped at step {taken} and saved {newest}"
    trial.finish()
    return survived(f"{number.name} to ranks {victims}, exit codes {codes}")


@fault("a storm of signals", "signals")
def signal_storm(trial: Trial) -> Outcome:
    at = trial.begin()
    numbers = trial.draw.choices([signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGCONT], k=12)
    gaps = [trial.draw.uniform(0, 0.1) for _ in numbers]
    wait = trial.draw.uniform(0.5, LIFE)

    def storm(pids: list[int]) -> None:
        time.sleep(wait)
        for number, gap in zip(numbers, gaps, strict=True):
            for pid in pids:
                send(pid, number)
            time.sleep(gap)

    codes = trial.train(storm)
    return continue_after_death(trial, at, f"exit codes {codes}")


@fault("SIGSTOP of a rank", "hangs")
def stop_one(trial: Trial) -> Outcome:
    at, victim = trial.begin(), trial.draw.randrange(WORLD)
    stopped = []
    codes = trial.train(
        at_random(trial, lambda pids: stopped.append(send(pids[victim], signal.SIGSTOP))),
        sections={"run": {"hang_timeout_s": HANG_S}},
    )
    if codes != [0] * WORLD:
        assert codes[1 - victim] in (EXIT_HUNG, 1), f"exit codes {codes}:\n{trial.output}"
        assert codes[victim] == -9, codes  # by the launcher
        named = f"rank {victim}" in trial.output or "error" in trial.output
        assert named, f"the hanging rank was not named:\n{trial.output}"
    return continue_after_death(trial, at, f"rank {victim}, exit codes {codes}")


@fault("a rank that never starts", "hangs")
def never_comes(trial: Trial) -> Outcome:
    at, victim = trial.begin(), trial.draw.randrange(WORLD)
    codes = trial.train(around={victim: {"never": True}}, sections={"run": {"hang_timeout_s": 1.0}})
    assert codes[victim] == -9, codes  # by the launcher
    assert codes[1 - victim] == EXIT_HUNG, f"exit codes {codes}:\n{trial.output}"
    assert f"rank {victim}" in trial.output, f"the missing rank was not named:\n{trial.output}"
    return continue_after_death(trial, at, f"rank {victim}, exit codes {codes}")


@fault("a suspension of all ranks, longer than the time-out", "hangs")
def suspend(trial: Trial) -> Outcome:
    trial.begin()
    apart = trial.draw.uniform(0, 0.3)

    def act(pids: list[int]) -> None:
        for number, wait in ((signal.SIGSTOP, 2 * HANG_S), (signal.SIGCONT, 0)):
            for pid in pids:
                send(pid, number)
                time.sleep(apart)
            time.sleep(wait)

    codes = trial.train(at_random(trial, act), sections={"run": {"hang_timeout_s": HANG_S}})
    assert codes == [0] * WORLD, f"a healthy run was ended: {codes}\n{trial.output}"
    trial.check_equals_oracle()
    return survived("suspended and continued")


@fault("a rank that is stopped for a while", "hangs")
def stop_a_while(trial: Trial) -> Outcome:
    trial.begin()
    victim, seconds = trial.draw.randrange(WORLD), trial.draw.uniform(0.2, HANG_S / 3)

    def act(pids: list[int]) -> None:
        send(pids[victim], signal.SIGSTOP)
        time.sleep(seconds)
        send(pids[victim], signal.SIGCONT)

    codes = trial.train(at_random(trial, act), sections={"run": {"hang_timeout_s": 4 * HANG_S}})
    assert codes == [0] * WORLD, f"exit codes {codes}:\n{trial.output}"
    trial.check_equals_oracle()
    return survived(f"rank {victim} for {seconds:.1f} s")


@fault("a clock that jumps", "surroundings")
def clock(trial: Trial) -> Outcome:
    at = trial.begin()
    jumps = {rank: {"clock": trial.draw.choice([-1, 1]) * 10 ** trial.draw.uniform(1, 8)} for rank in range(WORLD)}
    codes = trial.train(around=jumps)
    assert codes == [0] * WORLD, f"exit codes {codes}:\n{trial.output}"
    trial.check_equals_oracle()
    return survived(f"from step {at}, by {[round(j['clock']) for j in jumps.values()]} s")


@fault("no more memory for a rank", "surroundings")
def memory(trial: Trial) -> Outcome:
    at, victim, room = trial.begin(), trial.draw.randrange(WORLD), int(10 ** trial.draw.uniform(6, 8.5))
    codes = trial.train(around={victim: {"memory": room}}, sections={"run": {"hang_timeout_s": 3 * HANG_S}})
    assert all(codes) or not any(codes), f"one rank continued alone: {codes}"
    return continue_after_death(trial, at, f"{room >> 20} MiB more on rank {victim}, exit codes {codes}")


@fault("two runs in one directory", "surroundings")
def rivals(trial: Trial) -> Outcome:
    trial.begin()
    attempts = []

    def rival(pids: list[int]) -> None:
        while alive(pids) and not (trial.run / ".lock").exists():
            time.sleep(0.01)
        config = trial.outputs / "given-0.yaml"
        if not alive(pids):
            return
        alone = ["parallel.space_ep=1", "parallel.time_ep=1"]  # what one rank can do
        command = [sys.executable, "raphael_dist/train.py", "--config", str(config), f"run.dir={trial.run}", *alone]
        done = subprocess.run(command, env=rank_env(1), cwd=ROOT, capture_output=True, text=True, timeout=300)
        attempts.append((done.returncode, done.stderr, alive(pids)))

    def meanwhile(pids: list[int]) -> None:
        rival(pids)
        for pid in pids:
            send(pid, signal.SIGTERM)

    codes = trial.train(meanwhile, sections={"train": {"max_steps": 400}})  # long enough for the rival to come
    assert attempts, "no rival"
    code, error, there = attempts[0]
    assert set(codes) <= {0, EXIT_INTERRUPTED}, f"the first run did not continue: {codes}\n{trial.output}"
    if not there:
        return survived("the rival came when the first run was done")
    assert (code, "in use by another process" in error, error.count("\n")) == (2, True, 1), error
    return refused(error.strip())
