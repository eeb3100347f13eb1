"""Predicted communication of a step, compared with results by hand and with published steps."""

import json
from dataclasses import dataclass, replace

import pytest

from benchmarks.network import Case, planned_bytes
from benchmarks.network_time import communication_s
from raphael_dist.config.schema import Config, load_config
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.planning.communication import (
    Cluster,
    Communication,
    Scheme,
    communications,
    gathered_again,
    hidden_seconds,
    one_pass,
    ring,
)
from tests.lib.launch import ROOT, run_ranks

# Two nodes of two GPUs: 100 GB/s in a node, 10 GB/s by each card.
SMALL = Cluster(4, per_node=2, node_gb_s=100.0, net_gb_s=10.0, node_hop_us=1.0, net_hop_us=5.0)
H100 = Cluster(1000)
PARAMETERS = 2_974_500_020  # of raphael-3b
BACKWARD_SHARE = 0.73  # of a step's computation: 6.30 of 8.59 TFLOP per image of raphael-3b, recomputation included


@dataclass(frozen=True)
class StepCost:
    """Computation and communication of a step, as in the table of docs/scale.md."""

    compute_s: float
    parts: list[Communication]
    exposed_s: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.exposed_s

    @property
    def network_gb(self) -> float:
        return sum(part.network_gb for part in self.parts)


def step_cost(
    config: Config, cluster: Cluster, parameters: int, scheme: Scheme, compute_s: float, overlap: bool
) -> StepCost:
    """Return the cost of a step; `overlap`: passes hide communication as far as the scheme allows."""
    parts = communications(config, BatchPlan.of(config, cluster.ranks), cluster, parameters, scheme)
    hidden = hidden_seconds(parts, (1 - BACKWARD_SHARE) * compute_s, BACKWARD_SHARE * compute_s) if overlap else 0.0
    return StepCost(compute_s, parts, sum(part.seconds for part in parts) - hidden)


def cost(scheme: Scheme, cluster: Cluster = H100, overlap: bool = False, compute_s: float = 0.12, **parallel: int):
    config = load_config("raphael-3b", [f"parallel.{key}={value}" for key, value in parallel.items()])
    return step_cost(config, cluster, PARAMETERS, scheme, compute_s, overlap)


def test_a_ring_by_hand():
    """8 GB over 4 ranks: a rank sends 6 GB. Two rings, one per card, carry 3 GB each between the nodes."""
    over_all = ring("", "nothing", 8e9, 4, SMALL)
    assert over_all.network_gb == pytest.approx(3.0)
    assert over_all.seconds == pytest.approx(0.3 + (2 * 1 + 1 * 5) * 1e-6)
    inside = ring("", "nothing", 8e9, 2, SMALL, calls=3)
    assert (inside.network_gb, inside.seconds) == (0.0, pytest.approx(0.04 + 3 * 1e-6))
    across = ring("", "nothing", 8e9, 2, SMALL, stride=2)
    assert (across.network_gb, across.seconds) == (pytest.approx(4.0), pytest.approx(0.4 + 5e-6))
    assert ring("", "nothing", 8e9, 1, SMALL).seconds == 0


def test_two_stages_of_gloo_by_hand():
    """8 GB over two nodes of two ranks: a rank sends 4 GB in its node, and then 2 GB to the other node."""
    two_stages = one_pass("", "nothing", 8e9, 4, replace(SMALL, gloo=True), calls=3)
    assert two_stages.network_gb == pytest.approx(2.0)
    assert two_stages.seconds == pytest.approx(0.04 + 0.2 + 3 * (1 + 2 * 5) * 1e-6)
    one_rank_per_node = one_pass("", "nothing", 8e9, 2, replace(SMALL, gloo=True), stride=2)
    assert one_rank_per_node.seconds == pytest.approx(0.4 + 2 * 5e-6)
    for ranks in (2, 3):  # one node; unequal nodes
        as_ring = ring("", "nothing", 8e9, ranks, replace(SMALL, gloo=True))
        assert one_pass("", "nothing", 8e9, ranks, replace(SMALL, gloo=True)) == as_ring
    assert one_pass("", "nothing", 8e9, 4, SMALL) == ring("", "nothing", 8e9, 4, SMALL)


def test_round_trips_of_gloo_by_hand():
    """At 100 ms a connection carries 28 MB/s, however fast the link is; an all-reduce waits after 2 MiB, or for each hop."""
    far = Cluster(2, per_node=1, net_gb_s=1.0, net_hop_us=50_000, gloo=True)
    assert one_pass("", "nothing", 56e6, 2, far, calls=2).seconds == pytest.approx(1.0 + 2 * 0.1)
    assert one_pass("", "nothing", 56e6, 4, replace(far, ranks=4)).seconds == pytest.approx(0.5 + 0.1)
    all_reduce = ring("", "nothing", 2 * 10 * 2**20, 2, far, calls=2)
    assert all_reduce.seconds == pytest.approx(10 * 2**20 / 1e9 + 5 * 0.1)
    assert ring("", "nothing", 0.0, 4, replace(far, ranks=4), calls=2).seconds == pytest.approx(6 * 0.1)


def test_network_bytes_of_each_scheme_by_hand():
    """n = 5.949 GB of bfloat16 over nodes of 8: n / 8 for every pass over all ranks.

    ZeRO-3 gathers all weights once, and all but the last third of 10^9 again, since this model recomputes blocks.
    """
    n, again = 2 * PARAMETERS / 8e9, 1 - 1e9 / 3 / PARAMETERS
    passes_of = {"all_reduce": 3, "reduce_scatter": 2, "node_shards": 2, "zero3": 2 + again, "zero3_hpz": 2}
    for scheme, passes in passes_of.items():
        assert cost(scheme).network_gb == pytest.approx(passes * n, rel=0.01), scheme


def test_planned_bytes_are_those_measured_on_the_wire():
    rows = json.loads((ROOT / "docs/network_bytes.json").read_text())["rows"]
    cases = [(Case(**row["case"]), row) for row in rows if row["case"]["who"] == "ours"]
    for case, row in cases:
        assert planned_bytes(case, str(ROOT / "tools/benchmarks/network.yaml")) == pytest.approx(row["planned"]), case
        assert row["planned"] == pytest.approx(row["payload"], rel=0.011), case
    assert {case.accumulation for case, _ in cases if case.stage == 3} == {1, 4}


def test_planned_times_are_those_measured_over_slow_links():
    rows = [row for row in json.loads((ROOT / "docs/network_time.json").read_text()) if not row["case"]["overlap"]]
    for row in rows:
        config = str(ROOT / "tools/benchmarks/network.yaml")
        seconds = row["alone_s"] + sum(communication_s(Case(**row["case"]), config, row["mbit_s"], row["delay_ms"]))
        assert seconds == pytest.approx(row["planned_s"], abs=1e-3), row
        assert row["measured_s"] == pytest.approx(seconds, rel=0.16), row
    assert {row["case"]["space_ep"] for row in rows} == {1, 2}


@pytest.mark.slow
def test_zero3_gathers_again_what_it_freed(tmp_path):
    """Real engines, whose reuse distance is one and nine times their model."""
    once, twice = ({"train": {"global_batch_size": 2 * n, "micro_batch_size": 1}} for n in (1, 2))
    recomputed = {**once, "model": {"checkpoint_activations": "all"}}
    cases = [(recomputed, 1), (twice, 1), (twice, 9)]
    specs = [{"sections": sections, "distance": distance} for sections, distance in cases]
    run_ranks(["tests/workers/zero3_gathers.py", str(tmp_path / "gathers.json"), json.dumps(specs)], 2)
    measured = json.loads((tmp_path / "gathers.json").read_text())
    for (sections, distance), gathers in zip(cases, measured, strict=True):
        micro_steps = sections["train"]["global_batch_size"] // 2
        expected = micro_steps * (1 + gathered_again(1000, "model" in sections, 1000 * distance))
        assert gathers == pytest.approx(expected, rel=0.05), (sections, distance)


def test_node_shards_avoid_the_latency_of_the_long_ring():
    free = replace(H100, node_hop_us=0.0, net_hop_us=0.0)
    ring_free, node_free = cost("reduce_scatter", free), cost("node_shards", free)
    assert node_free.network_gb == pytest.approx(ring_free.network_gb, rel=0.01)
    node, one_ring, doubled = (cost(s, overlap=True).exposed_s for s in ("node_shards", "reduce_scatter", "all_reduce"))
    assert node < one_ring
    assert node < doubled


def test_overlap_hides_no_more_than_there_is_to_compute():
    alone, overlapped = cost("all_reduce"), cost("all_reduce", overlap=True)
    reduce, gather = alone.parts
    assert overlapped.exposed_s == pytest.approx(gather.seconds + max(0.0, reduce.seconds - 0.73 * 0.12))
    assert cost("all_reduce", overlap=True, compute_s=1e-9).exposed_s == pytest.approx(alone.exposed_s)
    assert cost("node_shards", overlap=True).exposed_s < overlapped.exposed_s


def test_sharded_experts_send_rows_instead_of_gradients():
    cluster = Cluster(984)
    saved, sharded = cost("all_reduce", cluster), cost("all_reduce", cluster, space_ep=6)
    names = [part.name for part in sharded.parts]
    assert "rows to and from experts over 6 ranks" in names
    assert sharded.parts[0].network_gb < saved.parts[0].network_gb
    rows = sharded.parts[-1].network_gb
    inside = cost("all_reduce", replace(cluster, per_node=6), space_ep=6).parts[-1]
    assert (inside.network_gb, inside.seconds < sharded.parts[-1].seconds) == (0.0, True)
    # Bytes of placement's own count: what moves less what is reduced and gathered.
    assert rows == pytest.approx((1.179420050 + 0.134106250) - 4 * (755266560 + 151053312) / 6 * 163 / 164 / 1e9, rel=1e-4)
    with pytest.raises(ValueError, match="does not support sharded experts"):
        cost("zero3", cluster, space_ep=6)


def test_the_model_leaves_room_for_the_best_published_step():
    """1,024 H100 trained SD 2 (0.87 B) at 2 images each in 41 ms a step: predicted communication must not exceed it."""
    config = load_config("sd2-dense", ["train.global_batch_size=2048"])
    predicted = step_cost(config, Cluster(1024), 866_000_000, "reduce_scatter", 0.03, overlap=True)
    assert predicted.seconds < 0.041
