"""Nodes of network namespaces (tests/lib/netns.py): what is counted, what links do, and that nothing is left."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raphael_dist.runtime.launchers import alive
from tests.lib import netns
from tests.lib.launch import ROOT
from tests.lib.netns import Link, Network
from tests.lib.slurm_cluster import wait_for

pytestmark = [pytest.mark.network, pytest.mark.skipif(bool(netns.missing()), reason=f"no nodes: {netns.missing()}")]


@pytest.fixture(scope="module")
def pair() -> Iterator[Network]:
    """Two nodes; the second one's link has a relay."""
    with Network([Link(), Link(delay_ms=0.01)]) as network:
        yield network


def transfer(network: Network, size: int, port: int = 5001) -> float:
    """Send bytes from node 1 to node 0 over TCP; return the seconds it took."""
    with network.socket(0) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port))
        server.listen()
        began = time.monotonic()
        with network.socket(1) as client:
            client.settimeout(20)
            client.connect((network.addresses[0], port))
            peer = server.accept()[0]
            sender = threading.Thread(target=lambda: (client.sendall(bytes(size)), client.shutdown(socket.SHUT_WR)))
            sender.start()
            with peer:
                peer.settimeout(20)
                received = sum(len(part) for part in iter(lambda: peer.recv(1 << 16), b""))
            sender.join()
        assert received == size
        return time.monotonic() - began


def arrives(network: Network, sender: int, receiver: int, count: int = 3) -> int:
    """Return how many datagrams arrive; a socket holds 200 of them."""
    arrived = 0
    with network.socket(sender, socket.SOCK_DGRAM) as a, network.socket(receiver, socket.SOCK_DGRAM) as b:
        b.bind(("", 5002))
        b.settimeout(0.3)
        for _ in range(count):
            a.sendto(b"x", (network.addresses[receiver], 5002))
        try:
            for _ in itertools.count():
                b.recv(10)
                arrived += 1
        except TimeoutError:
            return arrived


def test_counters_count_what_is_sent_with_headers(pair: Network) -> None:
    before, size = (pair.counters(0), pair.counters(1)), 2_000_000
    transfer(pair, size)
    sender = pair.counters(1) - before[1]
    assert 0.999 * size < sender.payload < 1.15 * size  # ARP has less headers; a busy TCP repeats
    assert 0.99 * (1 + netns.HEADERS / 1448) < sender.sent / size < 1.2
    assert (pair.counters(0) - before[0]).received == pytest.approx(sender.sent, rel=0.02)


def test_rate_limits_a_link(pair: Network) -> None:
    pair.set_rate(1, 20.0)
    seconds = transfer(pair, 1_000_000)
    pair.set_rate(1, 0.0)
    assert 0.4 < seconds < 4.0  # 0.42 s; more where other processes have the cores


def test_delay_and_loss_of_a_link(pair: Network) -> None:
    pair.set_delay(1, 50.0)
    seconds = transfer(pair, 1000)
    pair.set_delay(1, 0.0, loss=0.2)
    arrived = arrives(pair, 1, 0, 200)
    pair.set_delay(1, 0.0)
    assert seconds > 0.1  # the handshake, and the data
    assert 120 < arrived < 195  # 160, and 6 deviations
    assert arrives(pair, 1, 0, 100) == 100


@pytest.mark.parametrize("node", [0, 1])
def test_a_one_way_cut_leaves_the_other_way(pair: Network, node: int) -> None:
    other = 1 - node
    assert (arrives(pair, node, other), arrives(pair, other, node)) == (3, 3)  # both know each other's address
    pair.cut(node, "sends")
    assert (arrives(pair, node, other), arrives(pair, other, node)) == (0, 3)
    pair.cut(node, "sends", on=False)
    pair.cut(node, "receives")
    assert (arrives(pair, node, other), arrives(pair, other, node)) == (3, 0)
    pair.cut(node, "receives", on=False)
    assert (arrives(pair, node, other), arrives(pair, other, node)) == (3, 3)


def test_link_down_and_up(pair: Network) -> None:
    pair.set_link(0, "down")
    assert arrives(pair, 1, 0) == 0
    pair.set_link(0, "up")
    assert arrives(pair, 1, 0) == 3


def test_dropped_port_does_not_answer() -> None:
    with Network([Link(), Link()]) as network:
        network.drop_port(0, 5003)
        transfer(network, 1000, port=5004)
        with network.socket(0) as server, network.socket(1) as client:
            server.bind(("", 5003))
            server.listen()
            client.settimeout(0.5)
            with pytest.raises(TimeoutError):
                client.connect((network.addresses[0], 5003))


def test_processes_have_the_node_name_and_find_others_by_name() -> None:
    program = "import socket; print(socket.gethostname(), *map(socket.gethostbyname, ('node0', 'node1')))"
    with Network([Link(), Link()]) as network:
        ranks = network.start_ranks(["-S", "-c", program])
        assert netns.finish(ranks, 60) == ([0, 0], ["node0 10.99.0.1 10.99.0.2\n", "node1 10.99.0.1 10.99.0.2\n"])


def test_killed_owner_leaves_nothing() -> None:
    program = (
        "import subprocess, sys, time; from tests.lib.netns import *\n"
        "network = Network([Link(), Link(delay_ms=1)]).__enter__()\n"
        "sleeper = subprocess.Popen(network.command(0, ['sleep', '600']))\n"
        "print(sleeper.pid, *network._spaces, network._hub, flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    sleeper, *left = owner.stdout.readline().split()
    assert set(left) <= set(netns.spaces())
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    wait_for(lambda: not set(left) & set(netns.spaces()), 20, "end of the namespaces")
    wait_for(lambda: not [name for name in left if Path("/etc/netns", name).exists()], 5, "end of the files")
    assert not alive(int(sleeper))


def test_leftovers_of_a_process_are_removed_although_its_id_is_used_again() -> None:
    left = f"raphael-{os.getpid()}-1-0-node0"  # this process did not start at boot
    netns.ip("netns", "add", left)
    with Network([Link()]) as network:
        own = network._spaces
        netns.sweep()
        assert left not in netns.spaces()
        assert set(own) <= set(netns.spaces())
    assert not set(own) & set(netns.spaces())
