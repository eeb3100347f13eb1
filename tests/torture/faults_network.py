"""Faults of the links between nodes of network namespaces (tests/lib/netns.py), one rank on each."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from raphael_dist.errors import EXIT_HUNG
from raphael_dist.runtime.ranks import free_port
from tests.lib.netns import Link, Network
from tests.torture.faults_process import HANG_S, at_random, continue_after_death
from tests.torture.kinds import fault
from tests.torture.trial import WORLD, Outcome, Trial, refused, survived

PATIENT = {"run": {"hang_timeout_s": 20 * HANG_S}}  # for healthy runs on slow links
IMPATIENT = {"run": {"hang_timeout_s": 4 * HANG_S}}  # a start may take five times as long


class Nodes:
    """A network, and the surroundings of each rank in it."""

    def __init__(self, network: Network, **env: str) -> None:
        self.network = network
        shared = {
            "MASTER_ADDR": network.addresses[0],
            "GLOO_SOCKET_IFNAME": "eth0",
            "LOCAL_WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
        }
        places = [[network.space(rank), network.names[rank]] for rank in range(WORLD)]
        self.around = {rank: {"node": places[rank], "env": {**shared, **env}} for rank in range(WORLD)}


@contextmanager
def nodes(links: Sequence[Link] = (Link(),) * WORLD, **env: str) -> Iterator[Nodes]:
    """Make a node for each rank, with these links and `env` in the environment of the ranks."""
    with Network(links) as network:
        yield Nodes(network, **env)


def goes_on(trial: Trial, links: Sequence[Link], what: str) -> Outcome:
    """Run over slow or lossy links; the run must end as the oracle did."""
    trial.begin()
    with nodes(links) as where:
        codes = trial.train(around=where.around, sections=PATIENT)
    assert codes == [0] * WORLD, f"exit codes {codes}:\n{trial.output}"
    trial.check_equals_oracle()
    return survived(what)


@fault("a link with 200 ms of latency (ZeRO-3: 20 ms)", "links")
def latency(trial: Trial) -> Outcome:
    # ZeRO-3 gathers each parameter in a call of its own, thousands of them: minutes per step at 200 ms (docs/network.md).
    delay_ms = 20 if trial.setting.stage == 3 else 200
    return goes_on(trial, [Link(delay_ms=delay_ms)] * WORLD, f"{delay_ms} ms each way")


@fault("a link that loses 1% of the frames", "links")
def loss(trial: Trial) -> Outcome:
    return goes_on(trial, [Link(delay_ms=0.1, loss=0.01)] * WORLD, "1% each way")


@fault("a link that loses 10% of the frames (ZeRO-3: 3%)", "links")
def heavy_loss(trial: Trial) -> Outcome:
    share = 0.03 if trial.setting.stage == 3 else 0.1  # each of ZeRO-3's calls may wait for a frame to be sent again
    return goes_on(trial, [Link(delay_ms=0.1, loss=share)] * WORLD, f"{share:.0%} each way")


@fault("a link of 1 Mbit/s", "links")
def slow(trial: Trial) -> Outcome:
    victim = trial.draw.randrange(WORLD)
    return goes_on(trial, [Link(rate=float(rank == victim)) for rank in range(WORLD)], f"1 Mbit/s from and to node{victim}")


@fault("a link that is down for 5 or 60 s", "links")
def down_for_a_while(trial: Trial) -> Outcome:
    trial.begin()
    seconds = trial.draw.choice([5, 60])
    victim = trial.draw.randrange(WORLD)
    with nodes() as where:

        def act(_: list[int]) -> None:
            where.network.set_link(victim, "down")
            time.sleep(seconds)
            where.network.set_link(victim, "up")

        codes = trial.train(at_random(trial, act), around=where.around, sections=PATIENT)
    assert codes == [0] * WORLD, f"exit codes {codes}:\n{trial.output}"
    trial.check_equals_oracle()
    return survived(f"node{victim} for {seconds} s")


def names_link(line: str) -> bool:
    """Return whether an error line of a rank names the other rank and its node, and the network as the cause."""
    cause = r"rank (\d) on node\2 cannot be reached from node\1: check the network between them"
    match = re.match(rf"error on rank (\d) \(node\1\): .*\b{cause}", line)
    return match is not None and match[1] != match[2]


def ends_in_time(trial: Trial, break_link: Callable[[Network, int], None], what: str) -> Outcome:
    """Break a node's link for good: the run must end in time, name the link, and continue after the repair."""
    at, victim = trial.begin(), trial.draw.randrange(WORLD)
    with nodes() as where:
        act = at_random(trial, lambda _: break_link(where.network, victim))
        codes = trial.train(act, around=where.around, sections=IMPATIENT)
        if codes == [0] * WORLD:
            trial.check_equals_oracle()
            return survived(f"{what} node{victim}, after the run")
        assert EXIT_HUNG in codes, f"exit codes {codes}:\n{trial.output}"
        assert "Traceback" not in trial.output, trial.output
        lines = [line for line in trial.output.splitlines() if line.startswith("error")]
        assert any(map(names_link, lines)), f"nobody named the other node and the network:\n{trial.output}"
    return continue_after_death(trial, at, f"{what} node{victim}: {lines[0]}")


@fault("a link that goes down for good", "links")
def down(trial: Trial) -> Outcome:
    return ends_in_time(trial, lambda network, victim: network.set_link(victim, "down"), "no link of")


@fault("a link that is cut one way", "links")
def cut(trial: Trial) -> Outcome:
    way = trial.draw.choice(["sends", "receives"])
    lost = "nothing arrives from" if way == "sends" else "nothing arrives at"
    return ends_in_time(trial, lambda network, victim: network.cut(victim, way), lost)


def does_not_start(trial: Trial, where: Nodes, allowed: tuple[int, ...], named: str) -> Outcome:
    """Require that a run ends in its start, with a line that names the cause, and changes nothing; then run without it."""
    before = trial.snapshot()
    codes = trial.train(around=where.around, sections={"run": {"hang_timeout_s": HANG_S}})
    ended = {code for code in codes if code != -9}  # by the launcher, once one has ended
    assert ended <= set(allowed), f"exit codes {codes}:\n{trial.output}"
    assert ended
    lines = [line for line in trial.output.splitlines() if line.startswith("error")]
    assert any(named in line for line in lines), f"the cause was not named:\n{trial.output}"
    assert trial.snapshot() == before
    trial.finish()
    return refused(next(line for line in lines if named in line))


@fault("a name of rank 0 that does not resolve", "links")
def no_name(trial: Trial) -> Outcome:
    trial.begin()
    with nodes(MASTER_ADDR="node7.invalid") as where:
        return does_not_start(trial, where, (2, EXIT_HUNG), "node7.invalid")


@fault("a firewall that drops rank 0's port", "links")
def firewall(trial: Trial) -> Outcome:
    trial.begin()
    port = free_port()
    with nodes(MASTER_PORT=f"{port}") as where:
        where.network.drop_port(0, port)
        return does_not_start(trial, where, (EXIT_HUNG,), f"MASTER_PORT={port}")


@fault("two nodes with the same address", "links")
def duplicate_address(trial: Trial) -> Outcome:
    trial.begin()
    with nodes() as where:
        where.network.add_address(1, where.network.addresses[0])
        return does_not_start(trial, where, (EXIT_HUNG,), f"MASTER_ADDR={where.network.addresses[0]}")
