"""Simulate nodes of a cluster on this host. A node is a network namespace with its own IP address. Requires root.

The nodes of a `Network` are joined by a bridge in a further namespace, and reach nothing else. The bandwidth of links is
limited by `tc` (tbf); relay.py adds latency and loss. A shell process removes the namespaces, also when the process that
created the `Network` is killed. The name of a namespace contains process id and start time of its creator. If the shell
process was killed too, the next `Network` removes the namespaces.
"""

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

from raphael_dist.runtime.launchers import Process
from raphael_dist.runtime.ranks import free_port
from tests.lib.launch import ROOT, rank_env
from tests.lib.relay import enter

HEADERS = 66  # bytes of a frame's Ethernet, IP and TCP headers, with TCP's timestamps
_HOSTS = Path("/etc/netns")  # a folder for each node, with the file that replaces /etc/hosts, also in `ip netns exec`
_NAME = re.compile(r"raphael-(\d+-\d+)-\d+-\w+")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_IP = shutil.which("ip", path=_PATH) or "ip"
# A host may use BBR, with which a connection that has shared a link without latency stays slow for seconds. Linux's default,
# cubic, cannot be chosen in a namespace.
_CONGESTION = "reno"
_networks = itertools.count()
# Remove the namespaces "$@" and all processes in them when standard input ends.
_REMOVE = f"""cat; for name; do
    ip netns pids "$name" | xargs -r kill -9
    ip netns delete "$name"
    rm -rf "{_HOSTS}/$name"
done"""


def missing() -> str | None:
    """Return the reason why no `Network` can be created on this host; None if it can."""
    absent = [name for name in ("ip", "tc", "bridge", "nsenter", "unshare") if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: iproute2 util-linux)"
    if os.geteuid() != 0:
        return "only root may create network namespaces"
    if not Path("/dev/net/tun").exists():
        return "no /dev/net/tun"
    probe = f"raphael-{creator()}-0-probe"
    done = subprocess.run([_IP, "netns", "add", probe], capture_output=True, text=True)
    subprocess.run([_IP, "netns", "del", probe], capture_output=True)
    return f"no network namespaces: {done.stderr.strip()}" if done.returncode else None


@dataclass(frozen=True)
class Link:
    """The properties of the link between a node and the bridge.

    Attributes:
        rate: bandwidth in Mbit/s in each direction; 0: no limit.
        delay_ms: latency that is added to each frame that the node sends.
        loss: probability (0..1) that a frame that the node sends is lost.
        mtu: largest size of a frame in bytes, without the Ethernet header.
        whole: let the kernel pass many frames as one large frame, which is faster. The counters then have the headers of
            large frames only, and so fewer bytes than a real network would carry.
    """

    rate: float = 0.0
    delay_ms: float = 0.0
    loss: float = 0.0
    mtu: int = 1500
    whole: bool = False


@dataclass(frozen=True)
class Counters:
    """Bytes and packets that a node's network interface has sent and received, with Ethernet headers but no checksums."""

    sent: int
    sent_packets: int
    received: int
    received_packets: int

    def __sub__(self, before: "Counters") -> "Counters":
        return Counters(*(a - b for a, b in zip(astuple(self), astuple(before), strict=True)))

    @property
    def payload(self) -> int:
        """Bytes sent without headers, under the assumption that all packets are TCP packets."""
        return self.sent - HEADERS * self.sent_packets


class Network:
    """A context manager that creates simulated nodes with these `links`, one for each, and removes them at the end.

    Node i has the name node<i> and the address 10.99.0.<i + 1>. The argument `i` of the methods is the number of a node.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self.links = list(links)
        prefix = f"raphael-{creator()}-{next(_networks)}"
        self._hub, self._spaces = f"{prefix}-hub", [f"{prefix}-node{i}" for i in range(len(links))]
        self.names = [f"node{i}" for i in range(len(links))]
        self.addresses = [f"10.99.0.{i + 1}" for i in range(len(links))]
        self._relays: dict[int, subprocess.Popen[bytes]] = {}

    # ---- making and removing ---------------------------------------------------------------------------------------

    def __enter__(self) -> "Network":
        sweep()
        self._remover = _start_remover([*self._spaces, self._hub])
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
        self._remover.communicate(timeout=60)

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
            frames = "1" if not link.whole else "8" if link.rate else "65535"
            ip("-n", space, "link", "set", "eth0", "mtu", f"{link.mtu}", "gso_max_segs", frames, "up")
            ip("-n", space, "link", "set", "lo", "up")
            setting = f"echo {_CONGESTION} > /proc/sys/net/ipv4/tcp_congestion_control"
            _run(_IP, "netns", "exec", space, "sh", "-c", setting, check=False)  # some containers do not allow it
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
        """Set the bandwidth of a node's link to `rate` Mbit/s in each direction; 0: no limit."""
        for space, device in ((self._spaces[i], "eth0"), (self._hub, f"port{i}")):
            if rate:
                room = max(64_000, int(rate * 1e6 / 8 * 0.05))  # 50 ms
                burst = max(13_000, int(rate * 1e6 / 8 * 0.001))  # 1 ms; tbf divides larger packets, which takes time
                limit = ("rate", f"{rate}mbit", "burst", f"{burst}", "limit", f"{room + burst}")
                _run("tc", "-n", space, "qdisc", "replace", "dev", device, "root", "tbf", *limit)
            else:
                _run("tc", "-n", space, "qdisc", "delete", "dev", device, "root", check=False)

    def set_delay(self, i: int, delay_ms: float, loss: float = 0.0) -> None:
        """Change the latency and the loss probability of frames that a node sends.

        The link must have been created with a latency or a loss, because only then it has a relay.
        """
        stdin = self._relays[i].stdin
        assert stdin is not None
        stdin.write(f"{delay_ms} {loss}\n".encode())
        stdin.flush()

    def set_link(self, i: int, state: Literal["up", "down"]) -> None:
        """Disconnect a node from the network ("down"), or connect it again ("up"), as if its cable was unplugged."""
        ip("-n", self._hub, "link", "set", f"port{i}", state)
        if state == "up":
            self._wait_for_carrier(i)

    def cut(self, i: int, way: Literal["sends", "receives"], on: bool = True) -> None:
        """Drop all frames that a node sends, or that it receives. No side gets an error. `on` = False: stop doing it."""
        word, opposite = ("on", "off") if on else ("off", "on")
        flags = ("locked", word) if way == "sends" else ("flood", opposite, "mcast_flood", opposite, "bcast_flood", opposite)
        _run("bridge", "-n", self._hub, "link", "set", "dev", f"port{i}", "learning", opposite, *flags)
        _run("bridge", "-n", self._hub, "fdb", "flush", "dev", f"port{i}", "dynamic", "self", check=False)
        _run("bridge", "-n", self._hub, "fdb", "flush", "dev", "bridge", "dynamic", check=False)

    def drop_port(self, i: int, port: int) -> None:
        """Drop all packets that other nodes send to the TCP port `port` of a node, as a firewall does."""
        ip("-n", self._spaces[i], "rule", "add", "pref", "10", "lookup", "local")
        ip("-n", self._spaces[i], "rule", "delete", "pref", "0")
        rule = ("iif", "eth0", "ipproto", "tcp", "dport", f"{port}", "blackhole")
        ip("-n", self._spaces[i], "rule", "add", "pref", "5", *rule)

    def drop_routes(self, i: int, others: Sequence[int]) -> None:
        """Drop all packets that a node sends to the nodes with the numbers `others`, until `keep_routes` is called."""
        for other in others:
            ip("-n", self._spaces[i], "route", "add", "blackhole", self.addresses[other])

    def keep_routes(self, i: int) -> None:
        """Undo `drop_routes` for a node."""
        ip("-n", self._spaces[i], "route", "flush", "type", "blackhole")

    def add_address(self, i: int, address: str) -> None:
        """Give a node a further IP address, e.g. that of another node, to test duplicate addresses."""
        ip("-n", self._spaces[i], "address", "add", f"{address}/24", "dev", "eth0")

    def counters(self, i: int) -> Counters:
        """Return the bytes and packets that a node's interface has sent and received since the node was created."""
        stats = json.loads(ip("-s", "-j", "-n", self._spaces[i], "link", "show", "eth0"))[0]["stats64"]
        sent, received = stats["tx"], stats["rx"]
        return Counters(sent["bytes"], sent["packets"], received["bytes"], received["packets"])

    # ---- processes -----------------------------------------------------------------------------------------------------

    def command(self, i: int, command: Sequence[str]) -> list[str]:
        """Return the command line that runs `command` in a node's namespace, with the node's host name and /etc/hosts."""
        # Unlike `ip netns exec`, this keeps /sys, in which slurmd looks for cgroups.
        enter = ["nsenter", f"--net=/run/netns/{self._spaces[i]}", "unshare", "--mount", "--uts", "sh", "-c"]
        setup = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'
        return [*enter, setup, str(_HOSTS / self._spaces[i] / "hosts"), self.names[i], *command]

    def space(self, i: int) -> str:
        """Return the name of a node's network namespace, as `relay.enter` requires it."""
        return self._spaces[i]

    def socket(self, i: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """Return a socket that belongs to a node's network, although this process does not. `kind`: type of the socket."""
        with ThreadPoolExecutor(1) as pool:  # a namespace belongs to a thread, and to the sockets that it opens
            pool.submit(enter, self._spaces[i]).result()
            opened = pool.submit(socket.socket, socket.AF_INET, kind).result()
        opened.settimeout(5)
        return opened

    def rank_envs(self, per_node: int = 1, nodes: int | None = None) -> list[dict[str, str]]:
        """Return the environment variables of each rank of a run.

        Each of the first `nodes` nodes (None: each node) has `per_node` ranks with consecutive numbers.
        """
        world = (nodes or len(self.links)) * per_node
        shared = {"MASTER_ADDR": self.names[0], "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "eth0"}
        base = {**rank_env(world), **shared, "LOCAL_WORLD_SIZE": str(per_node)}
        return [{**base, "RANK": str(rank), "LOCAL_RANK": str(rank % per_node)} for rank in range(world)]

    def start_ranks(
        self, command: Sequence[str], per_node: int = 1, nodes: int | None = None, **env: str
    ) -> list[subprocess.Popen[str]]:
        """Start `python COMMAND` as ranks on the nodes, distributed as `rank_envs` describes; return their processes.

        `env`: further environment variables. The caller must end the processes with `finish` or `kill`.
        """
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
    """Wait for the processes of `start_ranks`, kill them after `timeout` seconds; return their exit codes and outputs."""
    deadline, outputs = time.monotonic() + timeout, []
    for process in ranks:
        try:
            outputs.append(process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            process.kill()
            outputs.append(process.communicate()[0])
    return [process.returncode for process in ranks], outputs


def ip(*arguments: str) -> str:
    """Run the command `ip` with these arguments; return its output. AssertionError: it failed."""
    return _run(_IP, *arguments)


def _run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": _PATH})
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout


def spaces() -> list[str]:
    """Return the names of all namespaces on this host that a `Network` of any process created and has not removed."""
    return [name for name in (line.split()[0] for line in ip("netns", "list").splitlines() if line) if _NAME.match(name)]


def sweep() -> None:
    """Remove the namespaces of processes that have ended without removing them."""
    creators = {name: match[1] for name in spaces() if (match := _NAME.match(name))}
    _start_remover([name for name, creator in creators.items() if not exists(creator)]).communicate(timeout=60)


def creator() -> str:
    """Return the id and the start time of this process, for names of things that it creates and `sweep` functions remove."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return f"{os.getpid()}-{fields[19]}"


def exists(creator: str) -> bool:
    """Return whether the process still runs in which the function `creator` returned this text."""
    pid, began = creator.split("-")
    return Process(int(pid), int(began), "").alive


def _start_remover(names: list[str]) -> subprocess.Popen[bytes]:
    """Start a process that removes the namespaces `names`, those which exist, when this process closes its input or ends.

    It is in a session of its own, so that no signal to this process's group ends it.
    """
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command, env = ["sh", "-c", _REMOVE, "remover", *names], {**os.environ, "PATH": _PATH}
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, start_new_session=True, **quiet)
