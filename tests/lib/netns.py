"""Machines on this host: network namespaces with an address each, joined by a bridge in a namespace of its own.

No traffic leaves what a `Network` made. Links have a rate (tc tbf); relay.py gives them latency and loss. Names of
namespaces hold the process id of their owner; the next network removes what a killed owner left.
"""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

from raphael_dist.runtime.launchers import alive
from raphael_dist.runtime.ranks import free_port
from tests.lib.launch import ROOT, rank_env
from tests.lib.relay import enter

HEADERS = 66  # bytes of a frame's Ethernet, IP and TCP headers, with TCP's timestamps
_HOSTS = Path("/etc/netns")  # a folder for each node, with the file that replaces /etc/hosts, also in `ip netns exec`
_NAME = re.compile(r"raphael-(\d+)-\d+-\w+")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_IP = shutil.which("ip", path=_PATH) or "ip"
_networks = itertools.count()


def missing() -> str | None:
    """Return why no network can be made here, or None."""
    absent = [name for name in ("ip", "tc", "bridge", "nsenter", "unshare") if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: iproute2 util-linux)"
    if os.geteuid() != 0:
        return "only root may create network namespaces"
    if not Path("/dev/net/tun").exists():
        return "no /dev/net/tun"
    probe = f"raphael-{os.getpid()}-0-probe"
    done = subprocess.run([_IP, "netns", "add", probe], capture_output=True, text=True)
    subprocess.run([_IP, "netns", "del", probe], capture_output=True)
    return f"no network namespaces: {done.stderr.strip()}" if done.returncode else None


@dataclass(frozen=True)
class Link:
    """The link of a node.

    Attributes:
        rate: Mbit/s each way; 0: no limit.
        delay_ms, loss: of each frame that the node sends.
        mtu: bytes of a frame without Ethernet's header.
        whole: let the kernel pass many frames at once, which is faster; counters then miss headers.
    """

    rate: float = 0.0
    delay_ms: float = 0.0
    loss: float = 0.0
    mtu: int = 1500
    whole: bool = False


@dataclass(frozen=True)
class Counters:
    """Bytes and packets of an interface, with Ethernet's headers and without its checksums."""

    sent: int
    sent_packets: int
    received: int
    received_packets: int

    def __sub__(self, before: "Counters") -> "Counters":
        return Counters(*(a - b for a, b in zip(astuple(self), astuple(before), strict=True)))

    @property
    def payload(self) -> int:
        """Bytes sent without headers, if all frames are of TCP."""
        return self.sent - HEADERS * self.sent_packets


class Network:
    """Context manager: nodes with names node0, node1, ... and addresses 10.99.0.1, 10.99.0.2, ..."""

    def __init__(self, links: Sequence[Link]) -> None:
        self.links = list(links)
        prefix = f"raphael-{os.getpid()}-{next(_networks)}"
        self._hub, self._spaces = f"{prefix}-hub", [f"{prefix}-node{i}" for i in range(len(links))]
        self.names = [f"node{i}" for i in range(len(links))]
        self.addresses = [f"10.99.0.{i + 1}" for i in range(len(links))]
        self._relays: dict[int, subprocess.Popen[bytes]] = {}

    # ---- making and removing ---------------------------------------------------------------------------------------

    def __enter__(self) -> "Network":
        sweep()
        try:
            self._create()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for relay in self._relays.values():
            relay.kill()
            relay.wait()
        for space in (*self._spaces, self._hub):
            _remove(space)

    def _create(self) -> None:
        ip("netns", "add", self._hub)
        ip("-n", self._hub, "link", "add", "bridge", "up", "type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
        hosts = "".join(f"{a} {n}\n" for a, n in zip(self.addresses, self.names, strict=True))
        for i, (space, link) in enumerate(zip(self._spaces, self.links, strict=True)):
            (_HOSTS / space).mkdir(parents=True)
            (_HOSTS / space / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
            ip("netns", "add", space)
            self._connect(i, link)
            ip("-n", self._hub, "link", "set", f"port{i}", "mtu", f"{link.mtu}", "master", "bridge", "up")
            ip("-n", space, "address", "add", f"{self.addresses[i]}/24", "dev", "eth0")
            frames = () if link.whole else ("gso_max_segs", "1")
            ip("-n", space, "link", "set", "eth0", "mtu", f"{link.mtu}", *frames, "up")
            ip("-n", space, "link", "set", "lo", "up")
            self.set_rate(i, link.rate)
        for i in range(len(self.links)):  # the bridge forwards from a port when its device has a carrier
            self._wait_for_carrier(i)

    def _connect(self, i: int, link: Link) -> None:
        if not (link.delay_ms or link.loss):
            ends = ("peer", "name", f"port{i}", "netns", self._hub)
            ip("link", "add", "eth0", "netns", self._spaces[i], "type", "veth", *ends)
            return
        command = [sys.executable, str(Path(__file__).with_name("relay.py")), self._spaces[i], self._hub, f"port{i}"]
        self._relays[i] = relay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert relay.stdout is not None
        assert relay.stdout.readline(), "the relay did not start"
        self.set_delay(i, link.delay_ms, link.loss)

    def _wait_for_carrier(self, i: int) -> None:
        deadline = time.monotonic() + 10
        while "forwarding" not in _run("bridge", "-n", self._hub, "link", "show", "dev", f"port{i}"):
            assert time.monotonic() < deadline, f"port{i} does not forward"
            time.sleep(0.02)

    # ---- links and their faults --------------------------------------------------------------------------------------

    def set_rate(self, i: int, rate: float) -> None:
        """Limit a node's link to so many Mbit/s each way; 0: no limit."""
        for space, device in ((self._spaces[i], "eth0"), (self._hub, f"port{i}")):
            if rate:
                room = max(64_000, int(rate * 1e6 / 8 * 0.05))  # 50 ms
                burst = max(3_200, int(rate * 1e6 / 8 * 0.001))  # 1 ms
                limit = ("rate", f"{rate}mbit", "burst", f"{burst}", "limit", f"{room + burst}")
                _run("tc", "-n", space, "qdisc", "replace", "dev", device, "root", "tbf", *limit)
            else:
                _run("tc", "-n", space, "qdisc", "delete", "dev", device, "root", check=False)

    def set_delay(self, i: int, delay_ms: float, loss: float = 0.0) -> None:
        """Set what happens to the frames that a node sends. Its link must have been made with a delay or a loss."""
        stdin = self._relays[i].stdin
        assert stdin is not None
        stdin.write(f"{delay_ms} {loss}\n".encode())
        stdin.flush()

    def set_link(self, i: int, state: Literal["up", "down"]) -> None:
        """Pull the node's cable, or plug it in."""
        ip("-n", self._hub, "link", "set", f"port{i}", state)
        if state == "up":
            self._wait_for_carrier(i)

    def cut(self, i: int, way: Literal["sends", "receives"], on: bool = True) -> None:
        """Lose all frames that the node sends, or receives, without a sign to either end; `on` false: no more."""
        word, opposite = ("on", "off") if on else ("off", "on")
        flags = ("locked", word) if way == "sends" else ("flood", opposite, "mcast_flood", opposite, "bcast_flood", opposite)
        _run("bridge", "-n", self._hub, "link", "set", "dev", f"port{i}", "learning", opposite, *flags)
        _run("bridge", "-n", self._hub, "fdb", "flush", "dev", f"port{i}", "dynamic", "self", check=False)
        _run("bridge", "-n", self._hub, "fdb", "flush", "dev", "bridge", "dynamic", check=False)

    def drop_port(self, i: int, port: int) -> None:
        """Ignore what other nodes send to a TCP port of this node, as a firewall does."""
        ip("-n", self._spaces[i], "rule", "add", "pref", "10", "lookup", "local")
        ip("-n", self._spaces[i], "rule", "delete", "pref", "0")
        rule = ("iif", "eth0", "ipproto", "tcp", "dport", f"{port}", "blackhole")
        ip("-n", self._spaces[i], "rule", "add", "pref", "5", *rule)

    def drop_routes(self, i: int, others: Sequence[int]) -> None:
        """Lose all that the node sends to some others, until `keep_routes`; the rest of the network is not affected."""
        for other in others:
            ip("-n", self._spaces[i], "route", "add", "blackhole", self.addresses[other])

    def keep_routes(self, i: int) -> None:
        """Undo `drop_routes`."""
        ip("-n", self._spaces[i], "route", "flush", "type", "blackhole")

    def add_address(self, i: int, address: str) -> None:
        """Give a node one more address, such as that of another node."""
        ip("-n", self._spaces[i], "address", "add", f"{address}/24", "dev", "eth0")

    def counters(self, i: int) -> Counters:
        """Return what the node's interface has sent and received."""
        stats = json.loads(ip("-s", "-j", "-n", self._spaces[i], "link", "show", "eth0"))[0]["stats64"]
        sent, received = stats["tx"], stats["rx"]
        return Counters(sent["bytes"], sent["packets"], received["bytes"], received["packets"])

    # ---- processes -----------------------------------------------------------------------------------------------------

    def command(self, i: int, command: Sequence[str]) -> list[str]:
        """Return the command line that runs a command on a node, with the node's host name."""
        # Unlike `ip netns exec`, this keeps /sys, in which slurmd looks for cgroups.
        enter = ["nsenter", f"--net=/run/netns/{self._spaces[i]}", "unshare", "--mount", "--uts", "sh", "-c"]
        setup = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'
        return [*enter, setup, str(_HOSTS / self._spaces[i] / "hosts"), self.names[i], *command]

    def space(self, i: int) -> str:
        """Return the name of a node's namespace, for `relay.enter`."""
        return self._spaces[i]

    def socket(self, i: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """Return a socket of a node in this process."""
        with ThreadPoolExecutor(1) as pool:  # a namespace belongs to a thread, and to the sockets that it opens
            pool.submit(enter, self._spaces[i]).result()
            opened = pool.submit(socket.socket, socket.AF_INET, kind).result()
        opened.settimeout(5)
        return opened

    def rank_envs(self, per_node: int = 1, nodes: int | None = None) -> list[dict[str, str]]:
        """Return the environment of each rank: `per_node` consecutive ones on each of the first `nodes` nodes, or on all."""
        world = (nodes or len(self.links)) * per_node
        shared = {"MASTER_ADDR": self.names[0], "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "eth0"}
        base = {**rank_env(world), **shared, "LOCAL_WORLD_SIZE": str(per_node)}
        return [{**base, "RANK": str(rank), "LOCAL_RANK": str(rank % per_node)} for rank in range(world)]

    def start_ranks(
        self, command: Sequence[str], per_node: int = 1, nodes: int | None = None, **env: str
    ) -> list[subprocess.Popen[str]]:
        """Start `python COMMAND` as ranks, as `rank_envs` describes. End them with `finish` or `kill`."""
        return [
            subprocess.Popen(
                self.command(rank // per_node, [sys.executable, *command]),
                env={**own, **env},
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for rank, own in enumerate(self.rank_envs(per_node, nodes))
        ]


def finish(ranks: Sequence[subprocess.Popen[str]], timeout: float) -> tuple[list[int], list[str]]:
    """Wait for processes and return their exit codes and outputs. Those that outlive the time-out are killed."""
    deadline, outputs = time.monotonic() + timeout, []
    for process in ranks:
        try:
            outputs.append(process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            process.kill()
            outputs.append(process.communicate()[0])
    return [process.returncode for process in ranks], outputs


def ip(*arguments: str) -> str:
    """Run `ip` and return its output."""
    return _run(_IP, *arguments)


def _run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": _PATH})
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout


def spaces() -> list[str]:
    """Return the namespaces that networks have made and not removed."""
    return [name for name in (line.split()[0] for line in ip("netns", "list").splitlines() if line) if _NAME.match(name)]


def sweep() -> None:
    """Remove the namespaces of owners that exist no more."""
    for name in spaces():
        owner = _NAME.match(name)
        if owner and not alive(int(owner[1])):
            _remove(name)


def _remove(space: str) -> None:
    """Kill the processes of a namespace and delete it, if it exists."""
    if space in spaces():
        for pid in ip("netns", "pids", space).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _run(_IP, "netns", "delete", space, check=False)
    shutil.rmtree(_HOSTS / space, ignore_errors=True)
