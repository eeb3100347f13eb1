"""Runs the checks of `prove`: on all ranks of a launcher, it compares training with one process and tests links and saves.

Each check has a time limit. `prove` itself survives a check that crashes or hangs, and names the rank that did. To this end,
the process that the launcher starts for a rank is its agent. The agent computes nothing and uses no GPU. It starts a worker
process that runs the checks, receives progress through a pipe, and ends the worker at the time limit. Agents exchange values
through a torch.distributed store, with a time limit for each request. If a worker hangs, dies or is killed on purpose, its
agent reports this. If a node hangs, its agent does not answer.
"""

import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from raphael_dist.cluster import preflight, prove_report
from raphael_dist.cluster.prove_checks import CHECKS, KILL, PREFLIGHT
from raphael_dist.cluster.prove_report import CheckReport, Report
from raphael_dist.cluster.prove_results import Proof
from raphael_dist.config import assets
from raphael_dist.config.schema import Config
from raphael_dist.errors import EXIT_USER_ERROR, describe_error
from raphael_dist.runtime import rendezvous
from raphael_dist.runtime.ranks import Ranks, complete_environment, discover, free_port, host_name, initialise
from raphael_dist.storage.versions import versions

JOIN_S, START_S, GRACE_S = 120.0, 120.0, 20.0  # of all agents; of a worker's imports; of an answer beyond a check's limit
POLL_S = 0.2
START_METHOD = "spawn"  # a forked process could not use a GPU
KILLED = "killed"  # the last mark of a worker that ends itself


@dataclass
class Outcome:
    """What a check did on one rank, as known to the agent of that rank.

    Attributes:
        result: result of the check; None: it did not finish.
        marks, last: number of progress messages from the worker, and the text of the last one.
        why: why the check did not finish.
        seconds: how long it ran.
    """

    rank: int
    node: str
    result: dict[str, Any] | None = None
    marks: int = 0
    last: str = "nothing"
    why: str = ""
    seconds: float = 0.0


class Agents:
    """Communication between the agents of all ranks, from the agent of this rank."""

    def __init__(self, ranks: Ranks) -> None:
        """Connect to the agents of the other ranks. Raises HungError, which names missing ranks, after JOIN_S seconds."""
        complete_environment(ranks)
        limit = timedelta(seconds=JOIN_S)
        self.ranks = ranks
        self._store = rendezvous.connect(ranks.rank, ranks.world_size, limit)
        rendezvous.wait_for_all(ranks.rank, ranks.world_size, limit)
        self._exchanges = 0

    def exchange(self, value: Any, limit_s: float) -> list[Any]:
        """Return the values of all ranks, in the order of ranks; None for a rank that does not answer within the limit.

        `value`: this rank's value, which must be representable in JSON.
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
        """Return a context that ends this process if its body takes much longer than the limit.

        This is needed if the node of rank 0 is dead, since requests to its store may then never return.
        """
        timer = threading.Timer(limit_s + 3 * GRACE_S, self._end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def leave(self) -> None:
        """Wait on rank 0 until all other agents have left, because rank 0 keeps the store."""
        if not self.ranks.is_main:
            self._store.set(f"left/{self.ranks.rank}", "1")
            return
        with suppress(RuntimeError):  # one hangs
            others = [f"left/{rank}" for rank in range(1, self.ranks.world_size)]
            self._store.wait(others, timedelta(seconds=GRACE_S))

    @staticmethod
    def _end() -> None:
        print("prove: rank 0 does not answer; its node hangs or is gone", file=sys.stderr, flush=True)
        os._exit(EXIT_USER_ERROR)

    def stop_others(self, piece: int) -> None:
        """Ask all other agents to end their workers of work number `piece`, because a worker has failed."""
        self._store.set(f"stop/{piece}", "1")

    def stopped(self, piece: int) -> bool:
        """Return whether an agent has asked to end the workers of work number `piece`."""
        return bool(self._store.check([f"stop/{piece}"]))


def prove(config: Config, out: Path) -> int:
    """Run all checks of `prove` on this rank, and return the exit code, equal on all ranks. Collective.

    Rank 0 writes `report.json` and `report.html` into `out`. Checks that already have a result there are not repeated.
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
    return codes[0] if codes[0] is not None else EXIT_USER_ERROR


@dataclass
class _Run:
    agents: Agents
    config: Config
    out: Path
    hosts: list[str]
    report: Report = field(default_factory=lambda: Report({}, []))
    pieces: int = 0

    def all_checks(self) -> None:
        """Run the checks that have no result yet; those that can share their workers do."""
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
        """Run checks in one worker on each rank; return how many have a result, None if no further check is possible."""
        self.pieces += 1
        world = CHECKS[names[0]].ranks(self.agents.ranks.world_size)
        port = free_port() if self.agents.ranks.is_main else 0
        ports = self.agents.exchange(port, JOIN_S)
        worker = None
        if self.agents.ranks.rank < world:
            worker = Worker(self, names, world, ports[0] or 0)
        for number, name in enumerate(names):
            outcome = Outcome(self.agents.ranks.rank, self.hosts[self.agents.ranks.rank])
            if worker is not None:
                worker.follow(name, outcome, first=number == 0)
            if name == PREFLIGHT:
                outcome.result = _own_probe(self.out, self.agents.ranks.rank)
            answers = self.agents.exchange(vars(outcome), CHECKS[name].limit_s + START_S + GRACE_S)
            every = [None if answer is None else Outcome(**answer) for answer in answers[:world]]
            status = self._record(name, every)
            if not all(answers) or (name == PREFLIGHT and not status.joined):
                if worker is not None:
                    worker.end()
                return None
            if any(o is None or o.result is None for o in every) and name not in (KILL, PREFLIGHT):
                break  # further checks need new workers
        if worker is not None:
            worker.end()
        return number + 1

    def _record(self, name: str, every: list[Outcome | None]) -> CheckReport:
        check = CHECKS[name]
        if name == PREFLIGHT:
            probes = [o.result for o in every if o is not None and o.result]
            status = prove_report.judge_environment(probes, self.hosts)
        else:
            outcomes = [None if o is None else vars(o) for o in every]
            status = prove_report.judge_check(name, outcomes, self.hosts, check.environment, expects_kill=name == KILL)
        status = replace(status, name=name, title=check.title, seconds=max((o.seconds for o in every if o), default=0.0))
        if self.agents.ranks.is_main:
            self.report.add(status)
            self.report.write(self.out)
            print("\n".join(status.text()), flush=True)
        return status


def _own_probe(out: Path, rank: int) -> dict[str, Any] | None:
    path = preflight.report_path(out / "preflight", rank)
    return json.loads(path.read_text()) if path.is_file() else None


class Worker:
    """The worker process that runs checks on this rank."""

    def __init__(self, run: _Run, names: Sequence[str], world: int, port: int) -> None:
        ranks, self._run, self._piece = run.agents.ranks, run, run.pieces
        local = sum(host == run.hosts[ranks.rank] for host in run.hosts[:world])
        env: dict[str, Any] = {
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
        arguments = (theirs, list(names), {k: str(v) for k, v in env.items()}, run.config, run.out, log)
        options = {"world": ranks.world_size}
        self._process = context.Process(target=work, args=(*arguments, options), daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()

    def follow(self, name: str, outcome: Outcome, first: bool) -> None:
        """Wait until the worker has finished a check, and fill in `outcome`. End the worker at the time limit.

        Args:
            name: the check.
            outcome: what this check did on this rank.
            first: whether it is the worker's first check, so that the start of the process counts too.
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
            if outcome.last != KILLED and name != PREFLIGHT:  # whose ranks report also without each other
                self._run.agents.stop_others(self._piece)

    def _receive(self) -> tuple[str, Any] | None:
        try:
            return self._pipe.recv() if self._pipe.poll(POLL_S) else None
        except (EOFError, ConnectionError):  # all that the worker sent has been read
            self._process.join(GRACE_S)
            self._ended = True
            return None

    def _take(self, message: tuple[str, Any], outcome: Outcome) -> None:
        kind, value = message
        if kind == "mark":
            outcome.marks, outcome.last = outcome.marks + 1, value
        elif kind == "result":
            outcome.result = value
        else:
            outcome.why = value

    def end(self) -> None:
        """End the worker process, and wait for its end."""
        self._process.kill()
        self._process.join()


def work(
    pipe: Connection,
    names: Sequence[str],
    env: dict[str, str],
    config: Config,
    out: Path,
    log: Path,
    options: dict[str, Any],
) -> None:
    """Run checks in this worker process; send progress and results to the agent.

    Args:
        pipe: the connection to the agent.
        names: the checks, in order.
        env: environment variables to set, e.g. RANK.
        config: the user's configuration.
        out: folder of the reports.
        log: file that gets the process's output.
        options: further arguments of the checks.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(env)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # that store is the agents'
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent ends this process
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    warnings.filterwarnings("ignore", category=FutureWarning)
    ranks = discover()
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared with float32
    try:
        device = torch.device("cpu") if names[0] == PREFLIGHT else initialise(ranks)
        proof = Proof(ranks, device, config, out, options, lambda text: pipe.send(("mark", text)))
        for name in names:
            proof.mark(name)
            pipe.send(("result", CHECKS[name].run(proof).as_dict()))
    except Exception as error:
        import traceback

        traceback.print_exc()
        pipe.send(("failed", describe_error(error)[:300]))
    sys.stdout.flush()
    threading.Event().wait()  # the agent ends it once all ranks have finished: rank 0 keeps the store of the others


def _end_with(agent: int) -> None:
    """End this process when its agent has ended, which a launcher may kill."""
    while os.getppid() == agent:
        time.sleep(1)
    os._exit(1)
