"""`optim.kind=muon`: the steps of torch's Muon, and of one process under every supported ZeRO stage and placement."""

import math
from functools import cache

import pytest
import torch

from raphael_dist.engine.ds_config import merge
from raphael_dist.engine.muon import Muon, orthogonalise
from raphael_dist.engine.parameter_kinds import is_hidden_matrix
from raphael_dist.engine.zero_interface import FlatLayout
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.planning.communication import Cluster, communications
from tests.lib.launch import train_many
from tests.lib.synthetic import synthetic_batch, tiny_config

LR, BETAS, EPS, CLIP, BATCH, STEPS = 0.01, (0.9, 0.999), 1e-3, 0.5, 12, 3
OPTIM = {"kind": "muon", "lr": LR, "betas": list(BETAS), "eps": EPS, "max_grad_norm": CLIP}


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (3, 8, 40), (1, 5)], ids=str)
def test_singular_values_of_a_step_are_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-6
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert ((values > 0.6) & (values < 1.3)).all()
    assert not orthogonalise(torch.zeros(shape)).any()


@pytest.mark.parametrize("prefix", ["", "control."])
def test_first_and_last_layers_are_not_hidden_under_any_prefix(prefix: str) -> None:
    assert not any(is_hidden_matrix(f"{prefix}{name}.weight") for name in ("conv_in", "conv_out", "time_embedding.linear_1"))
    assert is_hidden_matrix(f"{prefix}mid_block.resnets.0.conv1.weight")


def test_matrices_take_the_steps_of_torch_and_others_those_of_adamw() -> None:
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw) for shape in ((12, 20), (20, 12), (20,))]
    gradients = [[torch.randn(p.shape, generator=draw) for p in start] for _ in range(STEPS)]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    muon = Muon([{"params": ours}], torch.float32, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    muon.set_layouts(
        (FlatLayout(p, None, [(p, 0)]) for p in ours), dict(zip(ours, ("a.weight", "b.w1", "a.bias"), strict=True))
    )
    torch_muon = torch.optim.Muon(theirs[:2], lr=LR, weight_decay=0.0, momentum=BETAS[0], adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[2:], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    for step in gradients:
        for p, q, gradient in zip(ours, theirs, step, strict=True):
            p.grad, q.grad = gradient.clone(), gradient.clone()
        for optimizer in (muon, torch_muon, adamw):
            optimizer.step()
    assert torch.equal(ours[2], theirs[2])
    for p, q, first in zip(ours[:2], theirs[:2], start[:2], strict=True):
        assert (p - q).norm() < 0.02 * (q - first).norm()  # torch orthogonalises in bfloat16


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


@cache
def one_process() -> dict[str, torch.Tensor]:
    """Train in this process with the whole batch at once, one matrix after another, in plain formulas."""
    config = tiny_config(train={"global_batch_size": BATCH}, optim=OPTIM)
    torch.manual_seed(config.run.seed)
    model, schedule = RaphaelUNet(config), NoiseSchedule.create(config.diffusion)
    adamw = torch.optim.AdamW(
        [p for n, p in model.named_parameters() if not is_hidden_matrix(n)], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0
    )
    matrices = {n: p for n, p in model.named_parameters() if is_hidden_matrix(n)}
    momentum = {n: torch.zeros_like(p) for n, p in matrices.items()}
    for step in range(STEPS):
        model.zero_grad()
        batch = synthetic_batch(config, [(p, 1.0) for p in range(step * BATCH, (step + 1) * BATCH)], model.num_blocks)
        compute_losses(model, batch, schedule, config, torch.float32).total.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adamw.step()
        with torch.no_grad():
            for name, p in matrices.items():
                momentum[name] = BETAS[0] * momentum[name] + (1 - BETAS[0]) * p.grad
                direction = BETAS[0] * momentum[name] + (1 - BETAS[0]) * p.grad
                experts = p.ndim == 3
                for weight, part in zip(p if experts else [p], direction if experts else [direction], strict=True):
                    part = part.flatten(1)
                    update = newton_schulz(part) * 0.2 * math.sqrt(max(part.shape))
                    weight -= LR * update.view(weight.shape).float()
    return {n: p.detach().flatten() for n, p in model.named_parameters()}


CASES = {
    "zero0": ({"stage": 0}, {}, {}),
    "zero1, a micro-step": ({"stage": 1}, {}, {"micro_batch_size": 6}),
    "zero2": ({"stage": 2}, {}, {}),
    "zero2, overlapped": ({"stage": 2, "overlap_comm": True, "reduce_bucket_size": 10_000}, {}, {}),
    "zero2, sharded experts": ({"stage": 2}, {"space_ep": 2, "time_ep": 2, "placement": ["shard"]}, {}),
}
BFLOAT16 = {"zero2, bfloat16": ({"stage": 2}, {}, {"dtype": "bfloat16"})}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    cases = {**CASES, **BFLOAT16, "adamw": ({"stage": 2}, {}, {})}
    specs = [
        {
            "sections": {
                "train": {"global_batch_size": BATCH, **train},
                "optim": OPTIM | ({"kind": name} if name == "adamw" else {}),
                "parallel": parallel,
            },
            "deepspeed": {"zero_optimization": zero},
            "steps": STEPS,
        }
        for name, (zero, parallel, train) in cases.items()
    ]
    return dict(zip(cases, train_many(tmp_path_factory.mktemp("muon"), 2, specs), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_take_the_steps_of_one_process(case: str, runs: dict[str, dict]) -> None:
    """A float32 gradient's smallest singular values are rounding errors, which Muon enlarges; hence 1e-3 of a step."""
    config = tiny_config()
    torch.manual_seed(config.run.seed)
    start = {n: p.detach().flatten() for n, p in RaphaelUNet(config).named_parameters()}
    for name, expected in one_process().items():
        change, difference = (expected - start[name]).norm(), (runs[case]["weights"][name] - expected).norm()
        assert change > 0, name
        assert difference < 1e-3 * change, f"{name}: {difference / change:.1e}"


def test_steps_in_bfloat16_have_the_same_direction(runs: dict[str, dict]) -> None:
    (actual,) = (runs[case]["weights"] for case in BFLOAT16)
    config = tiny_config()
    torch.manual_seed(config.run.seed)
    start = {n: p.detach().flatten() for n, p in RaphaelUNet(config).named_parameters()}
    changes = [torch.cat([w[n] - start[n] for n in start if is_hidden_matrix(n)]) for w in (actual, one_process())]
    cosine = torch.nn.functional.cosine_similarity(*changes, dim=0)
    ratio = changes[0].norm() / changes[1].norm()
    assert cosine > 0.98
    assert 0.95 < ratio < 1.05


def test_gather_of_the_momentum_is_counted_and_planned(runs: dict[str, dict]) -> None:
    assert runs["zero2"]["gathered"] == [2 * sent for sent in runs["adamw"]["gathered"]]
    muon, adamw = (
        communications(tiny_config(optim={"kind": kind}), BatchPlan(BATCH, 2, 2), Cluster(2, 1), 1000, "reduce_scatter")
        for kind in ("muon", "adamw")
    )
    assert [part.network_gb for part in muon] == [adamw[0].network_gb, 2 * adamw[1].network_gb]


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 3}, "optim.kind=muon .* requires ZeRO stage 1 or 2, but the DeepSpeed config has stage 3"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "requires the optimizer on the GPU"),
    ],
    ids=str,
)
def test_stages_without_whole_matrices_are_refused(zero: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        merge(tiny_config(optim=OPTIM), {"zero_optimization": zero}, 1, 2)
