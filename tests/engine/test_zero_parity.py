"""Two ranks under every ZeRO stage take the steps of one process that has the whole batch.

The oracle is plain PyTorch in this process: no DeepSpeed, no ranks, no accumulation. Steps are plain SGD, because Adam
hides the scale of a gradient.
"""

import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from raphael_dist.config.run_sections import EmaConfig
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.parameter_kinds import decays
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.routing import Gate, gate_kind
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.batch_plan import BatchPlan
from tests.lib.launch import run_ranks, train_many
from tests.lib.synthetic import adapted_model, plain_fragments, synthetic_batch, tiny_config

STEPS = 3
ADAM_EPS = 1e-3  # large, or Adam makes whole steps of the rounding errors in gradients that cancel
EQUAL_SIZES = {"channels": [16, 16], "expert_width": [16, 16]}  # experts of all layers have the same shapes
NO_DECAY = (Gate, torch.nn.GroupNorm, torch.nn.LayerNorm)
SCHEDULE = NoiseSchedule.create(tiny_config().diffusion)


def batch_loss(model: RaphaelUNet, config, positions: range, last_experts_until: int | None = None) -> torch.Tensor:
    batch = synthetic_batch(config, [(p, 1.0) for p in positions], model.num_blocks, last_experts_until)
    return compute_losses(model, batch, SCHEDULE, config, torch.float32).total.mean()


@cache
def one_process(
    global_batch_size: int,
    clip: float,
    kind: str = "sgd",
    last_experts_until: int | None = None,
    lr: float = 0.05,
    steps: int = STEPS,
    equal_sizes: bool = False,
    weight_decay: float = 0.0,
    model_fields: tuple[tuple[str, object], ...] = (),
) -> dict:
    """Train in this process with the whole batch at once."""
    model_section = {**(EQUAL_SIZES if equal_sizes else {}), **dict(model_fields)}
    config = tiny_config(
        train={"global_batch_size": global_batch_size},
        optim={"kind": kind, "max_grad_norm": clip, "lr": lr},
        model=model_section,
    )
    torch.manual_seed(config.run.seed)
    model = RaphaelUNet(config)
    adamw = partial(torch.optim.AdamW, weight_decay=0.0, eps=ADAM_EPS)
    torch_optimizer = {"sgd": torch.optim.SGD, "adamw": adamw}[kind]
    groups = [{"params": list(model.parameters())}]
    if weight_decay:
        spared = {id(p) for p in without_decay(model)}
        parts = [[p for p in model.parameters() if (id(p) in spared) == spare] for spare in (True, False)]
        groups = [{"params": parts[0]}, {"params": parts[1], "weight_decay": weight_decay}]
    optimizer = torch_optimizer(groups, lr=config.optim.lr)
    start = {n: p.detach().clone().flatten() for n, p in model.named_parameters()}
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        positions = range(step * global_batch_size, (step + 1) * global_batch_size)
        loss = batch_loss(model, config, positions, last_experts_until)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        optimizer.step()
        losses.append(loss.item())
    weights = {n: p.detach().flatten() for n, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights, "start": start}


# (ZeRO stage, global batch, clip): 13 in micro-batches of 3 on 2 ranks is 3 micro-steps with 5 empty slots, 7 is 2 with 5.
CASES = [(0, 13, 0.5), (1, 13, 0.5), (2, 7, 0.5), (3, 13, 0.5)]
SLOW = [(0, 7, 0.0), (1, 7, 0.0), (1, 12, 0.5), (2, 13, 0.0), (2, 12, 0.5), (3, 7, 0.5), (3, 12, 0.0)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run all cases of a list in the same processes, when the first is requested."""

    @cache
    def of(slow: bool) -> dict[tuple, dict]:
        cases = SLOW if slow else CASES
        specs = [
            {
                "sections": {
                    "train": {"global_batch_size": global_batch_size},
                    "optim": {"kind": "sgd", "max_grad_norm": clip},
                },
                "deepspeed": {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100}},
                "steps": STEPS,
            }
            for stage, global_batch_size, clip in cases
        ]
        return dict(zip(cases, train_many(tmp_path_factory.mktemp("runs"), 2, specs), strict=True))

    return lambda case: of(case in SLOW)[case]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_two_ranks_take_the_steps_of_one_process(case, runs):
    stage, global_batch_size, clip = case
    expected = one_process(global_batch_size, clip)
    assert not clip or min(expected["norms"]) > clip, "clipping must be at work"
    same_steps(runs(case), expected, copies=2 if stage == 0 else 1)


@pytest.mark.slow
def test_balance_losses_take_the_steps_of_one_process(tmp_path):
    """The loss of the time gates is not of a sample; weights of empty slots must leave it out like the others'."""
    sections = {
        "train": {"global_batch_size": 7},
        "optim": {"kind": "sgd", "max_grad_norm": 0.5},
        "model": {"balance_weight": 1.0},
    }
    zero = {"stage3_param_persistence_threshold": 100}
    specs = [
        {"sections": sections, "deepspeed": {"zero_optimization": {"stage": n, **zero}}, "steps": STEPS} for n in (2, 3)
    ]
    expected = one_process(7, 0.5, model_fields=(("balance_weight", 1.0),))
    assert expected["losses"] != one_process(7, 0.5)["losses"]
    for actual in train_many(tmp_path, 2, specs):
        same_steps(actual, expected)


def same_steps(actual: dict, expected: dict, copies: int = 1) -> None:
    """Check that losses, clip norms and weights agree to 1e-5, and that `copies` ranks own each element."""
    assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert actual["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert actual["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        error = (actual["weights"][name] - weight).abs().max() / weight.abs().max()
        assert error < 1e-5, f"{name}: relative difference {error:.1e}"
        # Every element has one owner, or two where ZeRO-0 keeps everything everywhere.
        assert actual["covered"][name] == weight.numel() * copies, name


def without_decay(model: RaphaelUNet) -> list[torch.nn.Parameter]:
    """Return the parameters of norms and gates, and all biases, by the modules that hold them."""
    biases = [p for n, p in model.named_parameters() if n.rpartition(".")[2] in ("bias", "b1", "b2")]
    return [*biases, *(p for m in model.modules() if isinstance(m, NO_DECAY) for p in m.parameters())]


@pytest.mark.parametrize("adapters", [{}, {"control": {"enabled": True}}, {"lora": {"rank": 2}}], ids=str)
def test_rules_by_name_hold_under_every_prefix(adapters):
    """The classes of the modules decide, whatever their names."""
    config = tiny_config(**adapters, **({"run": {"init_from": "the base"}} if adapters else {}))
    model = adapted_model(config) if adapters else RaphaelUNet(config)
    spared = {id(p) for p in without_decay(model)}
    for name, p in model.named_parameters():
        assert decays(name) == (id(p) not in spared), name
    gates = {id(p) for m in model.modules() if isinstance(m, Gate) for p in m.parameters()}
    assert {id(p) for name, p in model.named_parameters() if gate_kind(name)} == gates


@pytest.mark.parametrize("stage", [2, *(pytest.param(s, marks=pytest.mark.slow) for s in (0, 1, 3))])
def test_weight_decay_spares_norms_biases_and_gates(stage, tmp_path):
    """The engine, with sharded experts where the stage supports them, equals AdamW with two groups in one process."""
    expected = one_process(12, 0.5, "adamw", weight_decay=0.3)
    bare = one_process(12, 0.5, "adamw")
    spared = {n for n, w in expected["weights"].items() if not decays(n)}
    model = RaphaelUNet(tiny_config())
    assert spared == {n for n, p in model.named_parameters() if any(p is q for q in without_decay(model))}
    optim = {"kind": "adamw", "max_grad_norm": 0.5, "lr": 0.05, "eps": ADAM_EPS, "weight_decay": 0.3}
    sharded = {"space_ep": 2, "time_ep": 2} if stage in (1, 2) else {}
    tree = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100}}
    sections = {"train": {"global_batch_size": 12}, "optim": optim, "parallel": sharded}
    (actual,) = train_many(tmp_path, 2, [{"sections": sections, "deepspeed": tree, "steps": STEPS}])
    for name, weight in expected["weights"].items():
        error = (actual["weights"][name] - weight).abs().max() / weight.abs().max()
        assert error < 1e-4, f"{name}: relative difference {error:.1e}"
    w1 = next(n for n in expected["weights"] if n.endswith("space_moe.w1"))
    assert (expected["weights"][w1] - bare["weights"][w1]).abs().max() > 1e-3, "decay must be at work"


# ---- averaged weights -----------------------------------------------------------------------------------------------


def ema_by_hand(config, decay: float) -> tuple[dict[str, torch.Tensor], float, float]:
    """Return the averaged weights after two steps of the plain process, and the loss with them and with the exact ones."""
    torch.manual_seed(config.run.seed)
    model = RaphaelUNet(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.optim.lr)
    ema = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        batch_loss(model, config, range(4)).backward()
        optimizer.step()
        ema = {n: decay * ema[n] + (1 - decay) * p.detach() for n, p in model.named_parameters()}
    exact = batch_loss(model, config, range(4)).item()
    model.load_state_dict(ema, strict=False)
    return ema, batch_loss(model, config, range(4)).item(), exact


EMA_SECTIONS = {
    "train": {"global_batch_size": 4, "micro_batch_size": 2},
    "optim": {"kind": "sgd", "max_grad_norm": 0.0},
    "ema": {"decay": 0.7, "warmup": False},
}


@pytest.fixture(scope="module")
def trained_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ema")
    run_ranks(["tests/engine/test_zero_parity.py", str(folder)], 2)
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_averaged_weights_are_in_the_model_only_inside_the_context(stage, trained_ranks):
    averaged, with_average, with_exact = ema_by_hand(tiny_config(**EMA_SECTIONS), 0.7)
    assert with_average != pytest.approx(with_exact, rel=1e-3)
    for rank in range(2):
        losses, values = torch.load(trained_ranks / f"{stage}.{rank}")
        for name, start, value in values:
            expected = averaged[name].flatten()[start : start + value.numel()]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        assert losses == pytest.approx([with_average, with_exact], rel=1e-5)


def test_an_average_with_warm_up_and_its_weights_in_a_plain_model():
    model = torch.nn.Linear(2, 1)
    ema = Ema(plain_fragments(model), EmaConfig(decay=0.99))
    assert [ema.decay(s) for s in (1, 2, 10**6)] == [2 / 11, 3 / 12, 0.99]
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    ema.update(step=1)
    exact = model.weight.detach().clone()
    with ema.in_model():
        torch.testing.assert_close(model.weight.detach(), start + 9 / 11)  # 2/11 of the start, 9/11 of start + 1
    with pytest.raises(ZeroDivisionError), ema.in_model():
        1 / 0  # noqa: B018
    assert torch.equal(model.weight, exact)


def _ema_rank(folder: Path) -> None:
    """Rank process: train two steps under every stage and evaluate the model with and without the average."""
    from raphael_dist.engine.engine import Engine
    from raphael_dist.runtime.ranks import all_reduce_sum, discover, initialise

    ranks = discover()
    device = initialise(ranks)
    torch.set_num_threads(1)
    config = tiny_config(**EMA_SECTIONS)
    plan = BatchPlan(4, 2, 2)
    for stage in range(4):
        tree = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100}}
        engine = Engine(config, tree, plan, device)
        ema = Ema(engine.fragments, config.ema)
        batch = synthetic_batch(config, plan.slots(0, ranks.rank, 0), engine.module.num_blocks)
        for step in (1, 2):
            engine.backward(compute_losses(engine, batch, SCHEDULE, config, engine.dtype).total.sum() * plan.loss_scale)
            engine.step(config.optim.lr)
            ema.update(step)

        def loss(engine=engine, batch=batch) -> float:
            with torch.no_grad():
                local = compute_losses(engine, batch, SCHEDULE, config, engine.dtype).total.sum()
            return float(all_reduce_sum([float(local)], device)[0]) / 4

        with ema.in_model():
            averaged = loss()
        values = [(f.name, f.start, v.clone()) for f, v in zip(engine.fragments, ema.values, strict=True)]
        torch.save(([averaged, loss()], [(n, s, v.flatten()) for n, s, v in values]), folder / f"{stage}.{ranks.rank}")


if __name__ == "__main__":
    _ema_rank(Path(sys.argv[1]))
