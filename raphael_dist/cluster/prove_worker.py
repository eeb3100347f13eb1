"""Runs checks of `prove` in a worker process, which sends progress and results to its agent."""

import gc
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from raphael_dist.cluster.prove_checks import CHECKS, PREFLIGHT
from raphael_dist.cluster.prove_results import Proof
from raphael_dist.config.schema import Config
from raphael_dist.errors import describe_error
from raphael_dist.runtime.ranks import discover, initialise
from raphael_dist.storage.files import no_links
from raphael_dist.text import hide_secrets_in_text

Message = tuple[str, Any]  # of a worker to its agent: "mark", "result" or "error", and its value
KILLED = "killed"  # the last mark of a worker that ends itself


def work(
    pipe: Connection,
    names: Sequence[str],
    env: dict[str, str],
    config: Config,
    out: Path,
    log: Path,
    launched: int,
) -> None:
    """Run checks of `prove` in this worker process; send progress and results to its agent, the process that supervises it.

    Args:
        pipe: the connection to the agent.
        names: names of the checks, in the order in which they run.
        env: environment variables to set, e.g. RANK.
        config: the user's configuration.
        out: folder of the reports.
        log: file for the output of this process.
        launched: number of ranks that the launcher started.
    """
    descriptor = open_log(log)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(env)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # the store that it names belongs to the agents
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent ends this process
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    warnings.filterwarnings("ignore", category=FutureWarning)
    ranks = discover()
    torch.backends.cudnn.allow_tf32 = False  # results are compared in float32; TF32 would round them
    try:
        device = torch.device("cpu") if names[0] == PREFLIGHT else initialise(ranks)
        proof = Proof(ranks, device, config, out, launched, lambda text: pipe.send(("mark", text)))
        for name in names:
            gc.collect()  # DeepSpeed's engine refers to itself, so that of the last check still has its memory
            torch.cuda.empty_cache()
            proof.mark(name)
            pipe.send(("result", asdict(CHECKS[name].run(proof))))
    except Exception as error:
        import traceback

        print(hide_secrets_in_text(traceback.format_exc()), end="", file=sys.stderr)
        pipe.send(("failed", describe_error(error)[:300]))
    sys.stdout.flush()
    threading.Event().wait()  # the agent ends it once all ranks have finished: rank 0 keeps the store of the others


def open_log(path: Path) -> int:
    """Open the file for the output of a worker process, and return its descriptor. Its folder is created.

    Raises OSError if the path is a symbolic link.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return no_links(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def _end_with(agent: int) -> None:
    """Wait until the parent process, the agent, has ended; then end this process. A launcher may kill the agent only.

    `agent`: process id of the agent.
    """
    while os.getppid() == agent:
        time.sleep(1)
    os._exit(1)
