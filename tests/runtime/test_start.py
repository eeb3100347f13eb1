"""Start-up is watched from its beginning, and a wrong environment gives one line."""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from raphael_dist.errors import EXIT_HUNG, EXIT_NOT_SAVED, HungError, UserError
from raphael_dist.runtime import rendezvous
from raphael_dist.runtime.ranks import Ranks, discover, free_port, initialise
from tests.lib.forks import output_of
from tests.training.test_training import SMALL

TIMEOUT_S = 1.0


def arguments(folder: Path) -> list[str]:
    options = ["sample.prompts=[]", "data.val_shards=[]", f"run.hang_timeout_s={TIMEOUT_S}"]
    return [*SMALL, f"run.dir={folder}/run", f"data.cache_dir={folder}/cache", *options]


@pytest.mark.parametrize(
    ("rank", "at", "says"),
    [
        (
            1,
            "never",
            "there was no progress for 5 s at waiting for the other ranks: "
            "rank 1 is missing and has given no sign of life yet",
        ),
        (0, "never", "there was no progress for 5 s at looking for the other ranks: rank 0 at MASTER_ADDR="),
        pytest.param(1, "logging", "rank 1 is missing and has given no sign of life yet", marks=pytest.mark.slow),
        (1, "locking", "at locking the run directory: rank 1 on "),
        (0, "met", ""),
    ],
)
def test_rank_that_stops_during_startup_ends_the_others(forks, tmp_path: Path, rank: int, at: str, says: str) -> None:
    codes = forks.run(tmp_path, 2, worker="late_start", rank=rank, at=at, arguments=arguments(tmp_path))
    output = output_of(tmp_path, 2)
    assert codes[rank] == -9, output  # by the launcher
    assert codes[1 - rank] == (EXIT_HUNG if at != "met" else -9), output
    assert says in output
    assert at != "met" or "kept the lock of the Python interpreter (GIL) for" in output


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "environment variable WORLD_SIZE='' (set by deepspeed or torchrun)"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "environment variable LOCAL_RANK=''"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, "RANK=0 must be below WORLD_SIZE=0"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_LOCAL_RANK=''"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, "environment variable SLURM_NTASKS='' (set by srun)"),
    ],
)
def test_incomplete_launcher_variables_give_one_line(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as error:
        discover(variables)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_PORT": ""}, "requires MASTER_ADDR and MASTER_PORT, but MASTER_PORT is not set"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "but MASTER_ADDR and MASTER_PORT are not set"),
        ({"MASTER_PORT": "29500x"}, "MASTER_PORT=29500x must be a port"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 must be a port"),
        ({"MASTER_ADDR": "no such host"}, "MASTER_ADDR=no such host must be the name or address of a host"),
    ],
)
def test_missing_or_wrong_master_address_is_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} | variables).items():
        monkeypatch.setenv(name, value)
    if "no such host" in message:  # do not ask a name server, which may not answer

        def unknown(*_: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        rendezvous.connect(0, 2, timedelta(seconds=5))
    assert message in str(error.value)


def test_master_port_in_use_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(UserError, match=r"^MASTER_PORT=\d+ must be a free port, but it is in use on this host"):
            rendezvous.connect(0, 2, timedelta(seconds=5))


def test_missing_rank_is_named_without_a_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    rendezvous.connect(0, 3, timedelta(seconds=5))
    with pytest.raises(HungError, match=r"1 of 3 ranks have connected after \d s. These are missing: 1, 2$"):
        rendezvous.wait_for_all(0, 3, timedelta(seconds=1))
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(HungError, match=r"rank 0 at MASTER_ADDR=127\.0\.0\.1 .* has not answered"):
        rendezvous.connect(1, 2, timedelta(seconds=1))


def listening() -> set:
    return {c.laddr for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}


def test_rank_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_stores", [dist.HashStore()])
    assert rendezvous.unreachable(0, 2, 0.5) == [1]
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(rendezvous.unreachable, rank, 2, 20.0) for rank in range(2)]
        assert [answer.result() for answer in both] == [[], []]
    monkeypatch.setattr(rendezvous, "_stores", [])
    assert rendezvous.unreachable(1, 2, 0.5) == [0]


class Unanswered:
    """A store that receives what a rank sends, and whose answers do not arrive there: a link that is cut one way."""

    def __init__(self, store: dist.Store) -> None:
        self.append = store.append

    def get(self, _: str) -> bytes:
        time.sleep(1)
        raise dist.DistStoreError


def test_rank_that_receives_nothing_is_named_by_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(rendezvous, "_stores", [Unanswered(store)])
    assert rendezvous.unreachable(1, 2, 0.2) == [0]
    monkeypatch.setattr(rendezvous, "_stores", [store])
    assert rendezvous.unreachable(0, 2, 0.5) == [1]
    store.append(rendezvous._HUNG_KEY, "1 ")  # ends the thread of rank 1's call


@pytest.mark.parametrize("launcher", ["none", "deepspeed or torchrun"])
def test_single_rank_listens_on_loopback_only(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    before = listening()
    initialise(Ranks(launcher=launcher))
    try:
        opened = listening() - before
        assert all(address.ip in ("127.0.0.1", "::1") for address in opened), opened
    finally:
        dist.destroy_process_group()
        os.environ.pop("GLOO_SOCKET_IFNAME", None)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["prepare", "take", "begin", "kill"])
def test_rank_out_of_memory_in_a_save_does_not_hang_the_others(forks, tmp_path: Path, where: str) -> None:
    options = ["run.hang_timeout_s=8", "train.max_steps=2", "checkpoint.every=2", "checkpoint.background=false"]
    base = [argument for argument in arguments(tmp_path) if "hang_timeout" not in argument]
    began = time.monotonic()
    codes = forks.run(tmp_path, 2, worker="short_of_memory", rank=1, where=where, arguments=[*base, *options])
    output = output_of(tmp_path, 2)
    log = tmp_path / "run" / "train.log"
    assert "memory" in output + log.read_text(), output
    if where in ("prepare", "take"):  # an end like that of a full disk
        assert codes == [EXIT_NOT_SAVED, EXIT_NOT_SAVED], output
        assert "rank 1: not enough memory" in output
    else:  # by the broken connection, or by what the watchdog sees of its host
        assert codes[0] in (EXIT_HUNG, 1), output
        assert codes[1] == (1 if where == "begin" else -9), output
        assert "Traceback" not in output.split("--- rank 1")[0], output
    assert time.monotonic() - began < 60
