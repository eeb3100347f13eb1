"""Runs the checks of `prove` on all ranks of a launcher: compares training with one process, tests network and checkpoints.

Each check has a time limit. `prove` itself survives a check that crashes or hangs, and names the rank that did. To this end,
the process that the launcher starts for a rank is its agent. The agent computes nothing and uses no GPU. It starts a worker
process, which runs the checks and sends progress to the agent through a pipe. The agent ends the worker at the time limit.
Agents exchange values through a torch.distributed store, with a time limit for each request. If a worker hangs, dies or is
killed on purpose, its agent reports this. If a node hangs, its agent does not answer.
"""

import json
import multiprocessing
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from raphael_dist.cluster import preflight, prove_report
from raphael_dist.cluster.prove_checks import CHECKS, KILL, PREFLIGHT
from raphael_dist.cluster.prove_report import CheckReport, ProveReport
from raphael_dist.cluster.prove_results import Outcome
from raphael_dist.cluster.prove_worker import KILLED, Message, work
from raphael_dist.config import assets
from raphael_dist.config.schema import Config
from raphael_dist.errors import EXIT_USER_ERROR, write_exit_code
from raphael_dist.runtime import rendezvous
from raphael_dist.runtime.ranks import Ranks, complete_environment, discover, free_port, host_name
from raphael_dist.storage.versions import versions
from raphael_dist.text import JsonObject, print_line

# Seconds to connect all agents; for a worker's imports; for an answer after a check's time limit.
JOIN_S, START_S, GRACE_S = 120.0, 120.0, 20.0
POLL_S = 0.2
START_METHOD = "spawn"  # a forked process could not use a GPU


class Agents:
    """Exchanges values between the agents of all ranks. An agent is the process that supervises a rank's checks."""

    def __init__(self, ranks: Ranks) -> None:
        """Connect to the agents of the other ranks. Raises HungError, which names missing ranks, after JOIN_S (120) s."""
        complete_environment(ranks)
        limit = timedelta(seconds=JOIN_S)
        self.ranks = ranks
        self._store = rendezvous.connect(ranks.rank, ranks.world_size, limit)
        rendezvous.wait_for_all(ranks.rank, ranks.world_size, limit)
        self._exchanges = 0

    def exchange(self, value: object, limit_s: float) -> list[Any]:
        """Send this rank's `value`, which JSON must be able to represent, to all ranks; return the values of all, by rank.

        Collective. The value is None for a rank that does not answer within `limit_s` seconds.
        """
        self._exchanges += 1
        key, deadline = f"prove/{self._exchanges}", time.monotonic() + limit_s
        values: list[Any] = []
        with self.deadline(limit_s):
            self._store.set(f"{key}/{self.ranks.rank}", json.dumps(value))
            for rank in range(self.ranks.world_size):
                try:
                    left = max(0.1, deadline - time.monotonic())
                    self._store.wait([f"{key}/{rank}"], timedelta(seconds=left))
                    values.append(json.loads(self._store.get(f"{key}/{rank}")))
                except RuntimeError:  # no value within the limit
                    values.append(None)
        return values

    @contextmanager
    def deadline(self, limit_s: float) -> Iterator[None]:
        """Return a context manager that ends this process if its body takes a minute longer than `limit_s` seconds.

        This is needed if the node of rank 0 is dead: requests to the store on this node may then never return.
        """
        timer = threading.Timer(limit_s + 3 * GRACE_S, self._end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def leave(self) -> None:
        """Announce that this rank has ended. Rank 0 waits for all others first, up to GRACE_S (20) seconds.

        Rank 0 hosts the store through which the agents communicate, so it must end last.
        """
        if not self.ranks.is_main:
            self._store.set(f"left/{self.ranks.rank}", "1")
            return
        with suppress(RuntimeError):  # one of the other ranks hangs
            others = [f"left/{rank}" for rank in range(1, self.ranks.world_size)]
            self._store.wait(others, timedelta(seconds=GRACE_S))

    @staticmethod
    def _end() -> None:
        host = os.environ.get("MASTER_ADDR", "its node")
        print(f"prove: rank 0 does not answer: {host} hangs or is gone", file=sys.stderr, flush=True)
        os._exit(EXIT_USER_ERROR)

    def stop_others(self, piece: int) -> None:
        """Ask the agents of all ranks to end their worker processes, because the worker on this rank has failed.

        `piece`: serial number of the current worker processes, which were started together, one on each rank.
        """
        self._store.set(f"stop/{piece}", "1")

    def stopped(self, piece: int) -> bool:
        """Return whether the agent of some rank has asked to end the worker processes (`stop_others`).

        `piece`: serial number of the worker processes that were started together, one on each rank.
        """
        return bool(self._store.check([f"stop/{piece}"]))


def prove(config: Config, out: Path) -> int:
    """Run all checks of the command `prove` (does this cluster train correctly?) on this rank; return the exit code.

    Collective: all ranks call it, and get the same code: 0 (passed), 2 (bad environment) or 3 (wrong numbers). Rank 0 writes
    `report.json` and `report.html` into the folder `out`. Checks that passed before in the same environment, according to
    this `report.json`, are not repeated, except the preflight.
    """
    ranks = discover()
    agents = Agents(ranks)
    own = {"host": host_name(), "local_rank": ranks.local_rank, "python": sys.executable, "system": platform.release()}
    identity = agents.exchange(own | versions() | {"cuda": torch.version.cuda}, JOIN_S)
    hosts = [rank["host"] if rank else "?" for rank in identity]
    environment = {"ranks": identity, "config": config.model_dump(mode="json"), "commit": assets.git_commit()}
    run = _Run(agents, config, out, hosts)
    if ranks.is_main:
        out.mkdir(parents=True, exist_ok=True)
        run.report = prove_report.open_report(out, environment, {n: c.title for n, c in CHECKS.items()})
    run.all_checks()
    codes = agents.exchange(run.report.exit_code if ranks.is_main else None, GRACE_S)
    agents.leave()
    code: int = codes[0] if codes[0] is not None else EXIT_USER_ERROR
    if ranks.is_main:
        write_exit_code(code)  # a Slurm job reads it
    return code


@dataclass
class _Run:
    agents: Agents
    config: Config
    out: Path
    hosts: list[str]
    report: ProveReport = field(default_factory=lambda: ProveReport({}, []))
    pieces: int = 0

    def all_checks(self) -> None:
        """Run the checks that have no result yet. Consecutive checks share worker processes, unless one must run alone."""
        done = self.agents.exchange(self.report.finished(), JOIN_S)[0] or []
        waiting = [name for name in CHECKS if name not in done or name == PREFLIGHT]
        if KILL in done and "resume" in waiting:
            waiting.insert(waiting.index("resume"), KILL)  # its checkpoints may be gone
        while waiting:
            first = CHECKS[waiting[0]]
            count = 1
            while not first.alone and count < len(waiting) and not CHECKS[waiting[count]].alone:
                count += 1
            finished = self._run_together(waiting[:count])
            if finished is None:
                return
            waiting = waiting[finished:]

    def _run_together(self, names: Sequence[str]) -> int | None:
        """Run the checks `names` one after another, in one worker process per rank; return how many of them were run.

        If a check does not finish, the checks after it are not run, because they need new worker processes. Returns None if
        no further check can run, because some rank does not answer or the ranks cannot exchange data.
        """
        self.pieces += 1
        world = CHECKS[names[0]].ranks(self.agents.ranks.world_size)
        port = free_port() if self.agents.ranks.is_main else 0
        ports = self.agents.exchange(port, JOIN_S)
        if None in ports:  # workers would wait for the rank that does not answer until the time limit
            answered = zip(ports, range(len(ports)), self.hosts, strict=True)
            self._record(names[0], [None if port is None else Outcome(rank, host) for port, rank, host in answered])
            return None
        with ExitStack() as at_end:
            worker = None
            if self.agents.ranks.rank < world:
                worker = Worker(self, names, world, ports[0])
                at_end.callback(worker.end)
            return self._follow_checks(names, world, worker)

    def _follow_checks(self, names: Sequence[str], world: int, worker: "Worker | None") -> int | None:
        for number, name in enumerate(names, start=1):
            outcome = Outcome(self.agents.ranks.rank, self.hosts[self.agents.ranks.rank])
            if worker is not None:
                worker.follow(name, outcome, first=number == 1)
            if name == PREFLIGHT:
                outcome.result = _own_probe(self.out, self.agents.ranks.rank)
            left_s = CHECKS[name].limit_s + START_S - outcome.seconds  # of the other ranks, which began at the same time
            answers = self.agents.exchange(vars(outcome), max(0.0, left_s) + GRACE_S)
            every = [None if answer is None else Outcome(**answer) for answer in answers[:world]]
            status = self._record(name, every)
            if not all(answers) or (name == PREFLIGHT and not status.joined):
                return None
            if any(o is None or o.result is None for o in every) and name not in (KILL, PREFLIGHT):
                break  # further checks need new workers
        return number

    def _record(self, name: str, every: list[Outcome | None]) -> CheckReport:
        check = CHECKS[name]
        if name == PREFLIGHT:
            status = prove_report.judge_environment(every, self.hosts)
        else:
            status = prove_report.judge_check(every, self.hosts, check.environment, expects_kill=name == KILL)
        status = replace(status, name=name, title=check.title, seconds=max((o.seconds for o in every if o), default=0.0))
        if self.agents.ranks.is_main:
            self.report.add(status)
            self.report.write(self.out)
            for line in status.text():
                print_line(line)
        return status


def _own_probe(out: Path, rank: int) -> JsonObject | None:
    path = preflight.report_path(out / "preflight", rank)
    return json.loads(path.read_text()) if path.is_file() else None


class Worker:
    """The worker process that runs checks on this rank, as seen by its agent, the process that supervises it."""

    def __init__(self, run: _Run, names: Sequence[str], world: int, port: int) -> None:
        ranks, self._run, self._piece = run.agents.ranks, run, run.pieces
        local = sum(host == run.hosts[ranks.rank] for host in run.hosts[:world])
        env: dict[str, int | str] = {
            "RANK": ranks.rank,
            "WORLD_SIZE": world,
            "LOCAL_RANK": ranks.local_rank,
            "LOCAL_WORLD_SIZE": local,
        }
        env |= {"MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"), "MASTER_PORT": port}
        if names[0] == PREFLIGHT:
            preflight.report_path(run.out / "preflight", ranks.rank).unlink(missing_ok=True)
        if names[0] == KILL and ranks.is_main:
            shutil.rmtree(run.out / "resume", ignore_errors=True)
        run.out.mkdir(parents=True, exist_ok=True)
        log = run.out / "logs" / f"{run.pieces}-{names[0]}-rank-{ranks.rank}.txt"
        context = multiprocessing.get_context(START_METHOD)
        self._pipe, theirs = context.Pipe(duplex=False)
        self._ended = False
        arguments = (theirs, list(names), {k: str(v) for k, v in env.items()}, run.config, run.out, log, ranks.world_size)
        self._process = context.Process(target=work, args=arguments, daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()

    def follow(self, name: str, outcome: Outcome, first: bool) -> None:
        """Wait until the worker process has finished a check, or kill it at the check's time limit.

        Args:
            name: name of the check.
            outcome: the record to fill in with result, progress and duration of the check on this rank.
            first: whether this check is the worker's first one. Its time limit includes the start of the process.
        """
        began = time.monotonic()
        limit_s = CHECKS[name].limit_s + (START_S if first else 0.0)
        with self._run.agents.deadline(limit_s):
            while outcome.result is None and not outcome.why:
                message = self._receive()
                if message is not None:
                    self._take(message, outcome)
                elif self._ended:
                    outcome.why = f"its process ended with exit code {self._process.exitcode}"
                elif time.monotonic() - began > limit_s:
                    outcome.why = f"not finished after {limit_s:.0f} s"
                elif self._run.agents.stopped(self._piece):
                    outcome.why = "stopped, because another rank failed"
        outcome.seconds = time.monotonic() - began
        if outcome.why:
            self._process.kill()
            if outcome.last != KILLED and name != PREFLIGHT:  # the preflight's ranks report without waiting for each other
                self._run.agents.stop_others(self._piece)

    def _receive(self) -> Message | None:
        try:
            return self._pipe.recv() if self._pipe.poll(POLL_S) else None
        except (EOFError, ConnectionError):  # all that the worker sent has been read
            self._process.join(GRACE_S)
            self._ended = True
            return None

    def _take(self, message: Message, outcome: Outcome) -> None:
        kind, value = message
        if kind == "mark":
            outcome.marks, outcome.last = outcome.marks + 1, value
        elif kind == "result":
            outcome.result = value
        else:
            outcome.why = value

    def end(self) -> None:
        """Kill the worker process, and wait until it has ended."""
        self._process.kill()
        self._process.join()
