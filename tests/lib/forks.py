"""Start real ranks quickly: a server process imports everything once and forks each rank from itself.

A rank in a new Python process spends seconds on imports; a forked one spends none. `Forks` is the client. The server is this
file, run as a program. All ranks of a server have the same string hashes. Tests whether results depend on the order of sets
therefore start new processes instead (`launch.run_ranks` with `fresh`).
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from raphael_dist.runtime.clock import RunningClock

ROOT = Path(__file__).parents[2]
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}  # hides GPUs from a process; kernels run in the interpreter
GRACE = 8.0  # seconds that ranks get to notice that one of them is gone


class ServerDiedError(RuntimeError):
    """Raised when the server process has ended, so that no more ranks can be started."""


class Forks:
    """Starts a server process, and asks it to run ranks. `close` ends the server."""

    def __init__(self) -> None:
        env = {**os.environ, **NO_GPU, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.lib.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=env,
        )

    def run(
        self,
        folder: Path,
        world_size: int,
        timeout: float = 200,
        meanwhile: Callable[[list[int]], None] | None = None,
        **spec: Any,
    ) -> list[int]:
        """Run a worker (a module of tests/workers) as `world_size` ranks, wait for them, and return their exit codes.

        The exit code of a rank that was killed by signal N is -N. The other ranks are killed GRACE seconds after one failed.

        Args:
            folder: the output of rank N is written to out-N.txt in it. The worker gets it as spec["folder"].
            world_size: number of ranks.
            timeout: seconds after which ranks are killed.
            meanwhile: called with the process ids of the ranks when they have started.
            spec: passed to the worker's `main`. `worker` is the name of the module (default forked_train).

        Raises:
            AssertionError: a rank did not end within `timeout`.
            ServerDiedError: the server has ended.
        """
        return self._ask(folder, world_size, timeout, GRACE, {"spec": {"folder": str(folder), **spec}}, meanwhile)

    def run_program(
        self, folder: Path, world_size: int, timeout: float, command: list[str], env: dict[str, str]
    ) -> list[int]:
        """Run `python COMMAND` as ranks; return exit codes and raise errors as `run` does.

        `env`: environment of the ranks without RANK and LOCAL_RANK, which are added here.
        """
        return self._ask(folder, world_size, timeout, timeout, {"command": command, "env": env})

    def _ask(
        self,
        folder: Path,
        world_size: int,
        timeout: float,
        grace: float,
        task: dict[str, Any],
        meanwhile: Callable[[list[int]], None] | None = None,
    ) -> list[int]:
        folder.mkdir(parents=True, exist_ok=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"folder": str(folder), "world_size": world_size, "timeout": timeout, "grace": grace, **task}
        with suppress(BrokenPipeError):  # the missing answer tells the same
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        pids = self._answer()
        if meanwhile is not None:
            meanwhile(pids)
        answer = self._answer()
        assert not answer["late"], f"ranks {answer['late']} did not end in {timeout} s:\n{output_of(folder, world_size)}"
        return answer["codes"]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ServerDiedError(f"the fork server ended with exit code {self._process.wait(timeout=30)}")
        return json.loads(line)

    def must(self, folder: Path, world_size: int, **spec: Any) -> None:
        """Call `run`, and assert that every rank exits with code 0."""
        codes = self.run(folder, world_size, **spec)
        assert codes == [0] * world_size, f"exit codes {codes}:\n{output_of(folder, world_size)}"

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # a server that died left a request unread
            self._process.stdin.close()
        self._process.wait(timeout=30)


@cache
def server() -> Forks:
    """Return the server that all tests of this process share; `conftest.forks` closes it."""
    return Forks()


def output_of(folder: Path, world_size: int) -> str:
    """Return the last 3000 characters of the output of each rank that `Forks.run` started in `folder`."""
    return "\n".join(f"--- rank {r}\n" + (folder / f"out-{r}.txt").read_text()[-3000:] for r in range(world_size))


def fork_rank(request: dict[str, Any], rank: int, port: int) -> int:
    """Fork the server; the child runs the worker or the program of `request` as `rank`. Return the child's process id.

    `port`: MASTER_PORT of the ranks.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(f"{request['folder']}/out-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.setpgid(0, 0)
        world = str(request["world_size"])
        os.environ.update(request.get("env", {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": str(port)}))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        if "command" in request:
            sys.argv = request["command"]
            sys.path.insert(0, str((ROOT / sys.argv[0]).parent))
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        else:
            worker = importlib.import_module(f"tests.workers.{request['spec'].get('worker', 'forked_train')}")
            code = worker.main(request["spec"])
    except SystemExit as error:  # as the interpreter does
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(pids: list[int], timeout: float, grace: float) -> dict[str, Any]:
    """Wait for the processes `pids` of all ranks. Runs in the server.

    Ranks are killed after `timeout` seconds, or `grace` seconds after one of them failed, as launchers do.

    Returns:
        {"codes": exit code of each rank, "late": ranks that were still running at the time-out}.
    """
    codes: dict[int, int] = {}
    clock, late = RunningClock(max_gap=1.0), []  # a stall of the machine is not the ranks' delay
    deadline, failed_at = timeout, None
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    if codes[pid] and failed_at is None:
                        failed_at = clock.now()
        now = clock.now()
        if now > deadline and not late:
            late = [rank for rank, pid in enumerate(pids) if pid not in codes]
        if now > deadline or (failed_at is not None and now > failed_at + grace):
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return {"codes": [codes[pid] for pid in pids], "late": late}


def main() -> None:
    """Run the server until the client closes the pipe.

    Each line of standard input is a request as JSON. Two lines answer it: the process ids of the ranks, and how they ended.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # only answers may reach the pipe
    import encodings.utf_8_sig  # noqa: F401 (a rank of another user may not read the standard library)

    import deepspeed  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401

    from raphael_dist.runtime.ranks import free_port
    from tests.workers import forked_train  # noqa: F401

    for line in sys.stdin:
        request, port = json.loads(line), free_port()
        pids = [fork_rank(request, rank, port) for rank in range(request["world_size"])]
        print(json.dumps(pids), file=answers, flush=True)
        print(json.dumps(wait_for(pids, request["timeout"], request["grace"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
