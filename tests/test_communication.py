"""The arithmetic of a step's communication, by hand, and against what is known of real clusters."""

from dataclasses import replace

import pytest

from raphael_dist.config import load_config
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.communication import Cluster, Scheme, describe, ring, step_cost

# Two nodes of two GPUs: 100 GB/s in a node, 10 GB/s by each card.
SMALL = Cluster(4, per_node=2, node_gb_s=100.0, net_gb_s=10.0, node_hop_us=1.0, net_hop_us=5.0)
H100 = Cluster(1000)
PARAMETERS = 2_974_500_020  # of raphael-3b


def cost(scheme: Scheme, cluster: Cluster = H100, overlap: bool = False, compute_s: float = 0.12, **parallel: int):
    config = load_config("raphael-3b", [f"parallel.{key}={value}" for key, value in parallel.items()])
    plan = BatchPlan.of(config, cluster.ranks)
    return step_cost(config, plan, cluster, PARAMETERS, scheme, compute_s, overlap)


def test_a_ring_by_hand():
    """8 GB over 4 ranks: a rank sends 6 GB. Two rings, one by each card, carry 3 GB each between the nodes."""
    over_all = ring("", "nothing", 8e9, 4, SMALL)
    assert over_all.network_gb == pytest.approx(3.0)
    assert over_all.seconds == pytest.approx(0.3 + (2 * 1 + 1 * 5) * 1e-6)
    inside = ring("", "nothing", 8e9, 2, SMALL, calls=3)
    assert (inside.network_gb, inside.seconds) == (0.0, pytest.approx(0.04 + 3 * 1e-6))
    across = ring("", "nothing", 8e9, 2, SMALL, stride=2)
    assert (across.network_gb, across.seconds) == (pytest.approx(4.0), pytest.approx(0.4 + 5e-6))
    assert ring("", "nothing", 8e9, 1, SMALL).seconds == 0


def test_the_bytes_by_the_card_of_each_scheme_by_hand():
    """n = 5.949 GB of bfloat16 over nodes of 8: n / 8 for every pass over all ranks."""
    n = 2 * PARAMETERS / 8e9
    for scheme, passes in (("all_reduce", 3), ("reduce_scatter", 2), ("node_shards", 2), ("zero3", 3), ("zero3_hpz", 2)):
        assert cost(scheme).network_gb == pytest.approx(passes * n, rel=0.01), scheme


def test_shards_in_the_node_save_the_latency_of_the_long_ring():
    free = replace(H100, node_hop_us=0.0, net_hop_us=0.0)
    ring_free, node_free = cost("reduce_scatter", free), cost("node_shards", free)
    assert node_free.network_gb == pytest.approx(ring_free.network_gb, rel=0.01)
    node, one_ring, doubled = (cost(s, overlap=True).exposed_s for s in ("node_shards", "reduce_scatter", "all_reduce"))
    assert node < one_ring
    assert node < doubled


def test_overlap_hides_no_more_than_there_is_to_compute():
    alone, beside = cost("all_reduce"), cost("all_reduce", overlap=True)
    reduce, gather = alone.parts
    assert beside.exposed_s == pytest.approx(gather.seconds + max(0.0, reduce.seconds - 0.73 * 0.12))
    assert cost("all_reduce", overlap=True, compute_s=1e-9).exposed_s == pytest.approx(alone.exposed_s)
    assert cost("node_shards", overlap=True).exposed_s < beside.exposed_s


def test_spread_experts_trade_gradients_for_rows():
    cluster = Cluster(984)
    kept, spread = cost("all_reduce", cluster), cost("all_reduce", cluster, space_ep=6)
    names = [part.what for part in spread.parts]
    assert "rows to and from experts over 6 ranks" in names
    assert spread.parts[0].network_gb < kept.parts[0].network_gb
    rows = spread.parts[-1].network_gb
    inside = cost("all_reduce", replace(cluster, per_node=6), space_ep=6).parts[-1]
    assert (inside.network_gb, inside.seconds < spread.parts[-1].seconds) == (0.0, True)
    # Bytes of placement's own count: what moves less what is reduced and gathered.
    assert rows == pytest.approx((1.179420050 + 0.134106250) - 4 * (755266560 + 151053312) / 6 * 163 / 164 / 1e9, rel=1e-4)
    with pytest.raises(ValueError, match="no place for spread experts"):
        cost("zero3", cluster, space_ep=6)


def test_the_model_leaves_room_for_the_best_published_step():
    """1,024 H100 trained SD 2 (0.87 B) at 2 images each in 41 ms a step: reckoned communication must not exceed it."""
    config = load_config("sd2-dense", ["train.global_batch=2048"])
    plan = BatchPlan.of(config, 1024)
    reckoned = step_cost(config, plan, Cluster(1024), 866_000_000, "reduce_scatter", 0.03, overlap=True)
    assert reckoned.seconds < 0.041


def test_the_table_has_a_line_for_each_cost():
    lines = describe([("today", cost("all_reduce")), ("node", cost("node_shards"))])
    assert len(lines) == 4
    assert lines[2].startswith("| today | 2.23 |")
