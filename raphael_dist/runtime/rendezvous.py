"""How ranks connect: the store through which they form a process group, and each rank's status until the group exists.

The store is torch.distributed's key-value store, a service in the process of rank 0. Before the run directory is open, only
the store can show which rank is missing. A single rank needs no network: its store is in its own memory and opens no port.
"""

import contextlib
import errno
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from raphael_dist.errors import HungError, UserError
from raphael_dist.runtime.clock import RunningClock

ANSWER_S = 5.0  # a store that takes longer belongs to a process that hangs
POLL_S_PER_RANK = 5e-4  # seconds between two polls of a rank, per rank of the world: 2,000 polls a second in all
MAX_NAMED = 5  # ranks that a message names
_STATUS_KEY, _HUNG_KEY = "start", "hung"
_stores: list[dist.Store] = []  # the store of this process, once it is connected


def connect(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Connect this rank to torch.distributed's key-value store that all ranks share, and return the store.

    The store is in the process of rank 0, which must be running. The other ranks need not be running. If torchrun started
    the ranks, torchrun's agent must be running too. `timeout`: how long to wait for rank 0.

    Raises:
        UserError: MASTER_ADDR or MASTER_PORT is invalid.
        HungError: rank 0 does not answer within `timeout`.
    """
    _stores.clear()
    if world_size == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        _stores.append(dist.HashStore())
        return _stores[0]
    address, port = master_address()
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # its agent keeps a store at this address
    keeps_store = rank == 0 and not by_torchrun
    try:
        store = dist.TCPStore(
            address, port, world_size, keeps_store, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )
        if by_torchrun:
            store = _store_of_rank0(store, rank, timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if keeps_store and (os.strerror(errno.EADDRINUSE) in str(error) or "EADDRINUSE" in str(error)):
            raise UserError(
                f"MASTER_PORT={port} must be a free port, but it is in use on this host. Choose another port, or end the "
                "process that uses it."
            ) from None
        raise HungError(f"{_master()} has not answered within {timeout.total_seconds():g} s") from None
    _stores.append(dist.PrefixStore("default_pg", store))
    return _stores[0]


def _store_of_rank0(agent_store: dist.TCPStore, rank: int, timeout: timedelta) -> dist.TCPStore:
    """Return a key-value store in the process of rank 0, which all ranks share.

    Rank 0 creates the store, and sends the store's address to the other ranks through torchrun's store (`agent_store`).
    Torchrun's own store ends with torchrun, which may be before the ranks have written their last checkpoint.
    """
    key = f"raphael_dist/attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank > 0:
        address, port = agent_store.get(key).decode().rsplit(" ", 1)
        return dist.TCPStore(address, int(port), timeout=timeout)
    address = _own_address()
    store = dist.TCPStore(address, 0, is_master=True, timeout=timeout, wait_for_workers=False)
    agent_store.set(key, f"{address} {store.port}")
    return store


def _own_address() -> str:
    """Return MASTER_ADDR if it is an address of this host, else the address from which this host connects to MASTER_ADDR."""
    address, port = master_address()
    family, *_, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing
        own = str(probe.getsockname()[0])
    return address if own == target[0] else own


def wait_for_all(rank: int, world_size: int, timeout: timedelta) -> None:
    """Wait until all ranks have called this function. Raises HungError, which names the missing ranks, after `timeout`.

    Forming the process group would also wait for all ranks. But torch holds Python's global interpreter lock during that
    wait, so that the watchdog thread of this process could not run.
    """
    if world_size == 1:
        return
    store, pause = _stores[0], min(1.0, max(0.02, world_size * POLL_S_PER_RANK))
    clock = RunningClock(10.0)
    store.append("who", f"{rank} ")  # type: ignore[attr-defined]  # missing in its stubs
    count = store.add("met", 1)
    while count < world_size:
        if clock.now() > timeout.total_seconds():
            present = {int(number) for number in store.get("who").split()}
            missing = [str(number) for number in range(world_size) if number not in present]
            names = join_first(missing, ", ")
            raise HungError(
                f"{count} of {world_size} ranks have connected after {clock.now():.0f} s. These are missing: {names}"
            )
        time.sleep(pause)
        count = store.add("met", 0)


def join_first(names: Sequence[str], separator: str) -> str:
    """Join the first 5 names (MAX_NAMED) by `separator`, followed by the number of the other names, as " and 5 more"."""
    rest = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return separator.join(names[:MAX_NAMED]) + rest


def master_address() -> tuple[str, int]:
    """Return host and port of rank 0 from MASTER_ADDR and MASTER_PORT.

    Raises UserError if a variable is missing or not valid.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    missing = [name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if not value]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"WORLD_SIZE above 1 requires MASTER_ADDR and MASTER_PORT, but {' and '.join(missing)} {verb} not set. Start "
            "with torchrun or deepspeed, or set both to the address and port of rank 0."
        )
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise UserError(
            f"MASTER_PORT={port} must be a port number from 1 to 65535. Set it to the port that rank 0 listens on."
        )
    try:
        socket.getaddrinfo(address, int(port))
    except OSError as error:
        if getattr(error, "errno", None) != socket.EAI_AGAIN:  # temporary failure of the name server
            raise UserError(
                f"MASTER_ADDR={address} must be the name or address of a host, but it cannot be resolved "
                f"({error.strerror}). Set it to the name or address of the host of rank 0."
            ) from None
    return address, int(port)


def post_status(line: str) -> None:
    """Append a line about this rank to the list in the ranks' key-value store, which all ranks can read (`read_status`).

    Does nothing before `connect`.
    """
    if _stores:
        with contextlib.suppress(RuntimeError):  # rank 0 is gone; whoever needs it reports that
            _stores[0].append(_STATUS_KEY, f"{line}\n")  # type: ignore[attr-defined]


def read_status() -> list[str] | None:
    """Return the lines that all ranks have posted with `post_status`, oldest first; None if the store does not answer."""
    answers: list[list[str]] = []

    def ask() -> None:
        answers.append(_stores[0].get(_STATUS_KEY).decode().splitlines())

    thread = threading.Thread(target=ask, name="rendezvous", daemon=True)
    if _stores:
        thread.start()
        thread.join(ANSWER_S)
    return answers[0] if answers else None


def unreachable(rank: int, world_size: int, seconds: float) -> list[int]:
    """Return the ranks whose messages do not reach this rank within `seconds`, so that an error message can name them.

    Each rank leaves its messages in the key-value store of rank 0, and reads the messages of the other ranks there.
    All ranks must call this function at about the same time.
    """
    present: set[int] = {rank}

    def ask(store: dist.Store) -> None:
        with contextlib.suppress(RuntimeError):
            for _ in range(2):  # the second word is the sign that an answer arrived: `append` itself has none
                store.append(_HUNG_KEY, f"{rank} ")  # type: ignore[attr-defined]
                store.get(_HUNG_KEY)
            while len(present) < world_size:
                words = Counter(int(number) for number in store.get(_HUNG_KEY).split())
                present.update(number for number, count in words.items() if count > 1)
                time.sleep(max(0.2, world_size * POLL_S_PER_RANK))

    if _stores:
        thread = threading.Thread(target=ask, args=(_stores[0],), name="rendezvous", daemon=True)
        thread.start()
        thread.join(seconds)
    return sorted(set(range(world_size)) - present)


def no_answer() -> str:
    """Return the error message for the case that rank 0, which has the key-value store of all ranks, does not answer."""
    return f"{_master()} does not answer"


def _master() -> str:
    return f"rank 0 at MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
