"""The U-Net equals Stable Diffusion 2's without experts, and recomputation does not change results."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.utils._pytree
from deepspeed.runtime.utils import OutputBackwardHookManager, register_output_backward_hooks

from benchmarks.gpu_step import diffusers_unet
from raphael_dist.config.schema import Config, config_from_tree, load_config
from raphael_dist.convert.init_weights import load_initial
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.moe import SPACE_BACKENDS
from raphael_dist.model.routing import Gate, choose, gate_logits, one_hot
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.model.unet_interface import GateNoise
from tests.lib.synthetic import plain_fragments, synthetic_batch, tiny_config

torch.set_num_threads(1)  # tiny products: threads that wait for each other cost ten times the work

SMALL_DENSE = {
    "model": {
        "channels": [32, 64, 64],
        "attention": [True, True, False],
        "expert_width": [128, 256, 256],
        "head_dim": 16,
        "norm_groups": 8,
        "text_width": 24,
        "time_activation": "geglu",
        "space_experts": 0,
        "time_experts": 0,
    },
    "edge": {"weight": 0.0},
}


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.state_dict().items()}


def on_meta(config: Config) -> RaphaelUNet:
    with torch.device("meta"):
        return RaphaelUNet(config)


def test_sd2_dense_has_exactly_the_keys_and_shapes_of_diffusers():
    config = load_config("sd2-dense")
    with torch.device("meta"):
        reference = diffusers_unet(config)
    assert shapes(on_meta(config)) == shapes(reference)
    assert sum(p.numel() for p in reference.parameters()) == pytest.approx(0.866e9, rel=1e-3)


@pytest.mark.parametrize("size_hw", [(16, 16), (8, 20), (12, 16)])
def test_a_dense_model_computes_what_diffusers_computes(size_hw):
    config = config_from_tree(SMALL_DENSE)
    torch.manual_seed(0)
    model, reference = RaphaelUNet(config), diffusers_unet(config)
    assert shapes(model) == shapes(reference)
    model.load_state_dict(reference.state_dict())
    x, t, text = torch.randn(3, 4, *size_hw), torch.tensor([0, 417, 999]), torch.randn(3, 5, 24)
    with torch.no_grad():
        out = model(x, t, text, torch.ones(3, 5).bool(), torch.tensor([4, 4, 4])).prediction
        expected = reference(x, t, text).sample
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("max_shard_size", ["10GB", "2MB"])
def test_diffusers_folder_loads_without_missing_or_unexpected_keys(tmp_path, max_shard_size):
    config = config_from_tree(SMALL_DENSE)
    reference = diffusers_unet(config)
    reference.save_pretrained(tmp_path / "unet", max_shard_size=max_shard_size)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text('{"prediction_type": "epsilon"}')
    model = RaphaelUNet(config)
    load_initial(plain_fragments(model), tmp_path / "unet", config)
    assert all((model.state_dict()[name] == tensor).all() for name, tensor in reference.state_dict().items())
    experts = config_from_tree({**SMALL_DENSE, "model": {**SMALL_DENSE["model"], "space_experts": 2}})
    with pytest.raises(UserError, match=r"run.init_from=.* must fit the model"):
        load_initial(plain_fragments(RaphaelUNet(experts)), tmp_path / "unet", experts)
    with pytest.raises(UserError, match=r"run.init_from.*cannot be read"):
        load_initial(plain_fragments(model), tmp_path, config)


def test_raphael_3b_has_the_papers_size_and_sides_that_tile():
    config = load_config("raphael-3b")
    model = on_meta(config)
    assert 2.9e9 < sum(p.numel() for p in model.parameters()) < 3.1e9
    assert model.num_blocks == 16
    experts = {n: s for n, s in shapes(model).items() if re.search(r"(time|space)_moe\.w[12]$", n)}
    assert len(experts) == 16 * 4
    assert {s[0] for n, s in experts.items() if "space" in n} == {6}
    assert {s[0] for n, s in experts.items() if "time" in n} == {4}
    assert all(side % 128 == 0 for s in experts.values() for side in s[1:])


@pytest.mark.parametrize("name", ["raphael-3b", "tiny"])
def test_only_gates_experts_and_edge_modules_have_new_names(name):
    config = tiny_config() if name == "tiny" else load_config(name)
    with torch.device("meta"):
        reference = shapes(diffusers_unet(config))
    ours = shapes(on_meta(config))
    new = {n for n in ours if n not in reference}
    blocks = r"(down_blocks|up_blocks)\.\d+\.attentions\.\d+|mid_block\.attentions\.0"
    gates = r"(time_gates|text_gates)\.\d+\.net\.[02]\.(weight|bias)"
    added = rf"{gates}|({blocks})\.transformer_blocks\.0\.(time_moe|space_moe|edge)\..+"
    assert all(re.fullmatch(added, n) for n in new)
    gone = {n for n in reference if n not in ours}
    assert gone
    assert all(re.search(r"transformer_blocks\.0\.ff\.net\.", n) for n in gone)
    assert all(ours[n] == s for n, s in reference.items() if n not in gone)


# ---- recomputation --------------------------------------------------------------------------------------------------


def run(
    checkpointing: str,
    reentrant: bool,
    size: tuple[int, int] | None = None,
    prepare: Callable[[RaphaelUNet], object] = lambda _: None,
    **model,
) -> dict[str, torch.Tensor]:
    """Return outputs, losses and gradients of one step of the tiny model, gate noise on."""
    config = tiny_config(model={"checkpoint_activations": checkpointing, **model})
    torch.manual_seed(0)
    unet = RaphaelUNet(config)
    unet.gathers_weights = reentrant
    prepare(unet)
    batch = synthetic_batch(config, [(p, 1.0) for p in range(4)], unet.num_blocks)
    if size:
        batch.x0, batch.noise = torch.randn(4, 4, *size), torch.randn(4, 4, *size)
    outputs = []

    def forward(*args):
        outputs.append(unet(*args))
        return outputs[0]

    losses = compute_losses(forward, batch, NoiseSchedule.create(config.diffusion), config, torch.float32)
    losses.total.sum().backward()
    out = outputs[0]
    actual = {
        "prediction": out.prediction,
        "denoise": losses.denoise,
        "edge": losses.edge,
        "used": torch.stack(out.space_used),
    }
    return actual | {n: p.grad for n, p in unet.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", ["reference", *SPACE_BACKENDS])
@pytest.mark.parametrize("recomputed", ["blocks", "all"])
def test_checkpointing_changes_no_output_loss_or_gradient(recomputed, reentrant, backend):
    saved, again = run("none", False, expert_backend=backend), run(recomputed, reentrant, expert_backend=backend)
    assert saved.keys() == again.keys()
    for name, value in saved.items():
        assert value is not None, f"{name} got no gradient"
        torch.testing.assert_close(again[name], value, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_more_recomputation_saves_fewer_activations():
    def kept_bytes(recomputed: str) -> int:
        storages: dict[int, tuple[int, torch.Tensor]] = {}  # held, so that no address is used twice

        def keep(t: torch.Tensor) -> torch.Tensor:
            storages[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
            return t

        unet = RaphaelUNet(tiny_config(model={"checkpoint_activations": recomputed, "expert_backend": "dense"}))
        known = {p.untyped_storage().data_ptr() for p in unet.parameters()}
        batch = synthetic_batch(unet_config := tiny_config(), [(p, 1.0) for p in range(4)], unet.num_blocks)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            compute_losses(unet, batch, NoiseSchedule.create(unet_config.diffusion), unet_config, torch.float32)
        return sum(size for address, (size, _) in storages.items() if address not in known)

    none, blocks, everything = kept_bytes("none"), kept_bytes("blocks"), kept_bytes("all")
    assert none > 1.3 * blocks > 1.3 * 1.3 * everything


@pytest.mark.parametrize("channels_last", [False, True])
def test_feature_maps_keep_one_memory_format_through_all_convolutions(channels_last, monkeypatch):
    """Weights are contiguous, because ZeRO flattens them and checkpoints store them in that order."""
    plain = run("none", False)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    monkeypatch.setattr("raphael_dist.model.unet.feature_map_format", lambda device: wanted)
    seen = []

    def watch(unet: RaphaelUNet) -> None:
        for m in (m for n, m in unet.named_modules() if isinstance(m, torch.nn.Conv2d) and ".edge." not in n):
            assert m.weight.is_contiguous()
            m.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].is_contiguous(memory_format=wanted)))

    actual = run("none", False, prepare=watch)
    assert len(seen) > 15
    assert all(seen)
    for name, value in plain.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_attention_without_a_map_is_the_fused_kernel(monkeypatch):
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    run("none", False)
    blocks = RaphaelUNet(tiny_config()).num_blocks
    assert len(calls) == blocks  # self-attention
    config = config_from_tree(SMALL_DENSE)
    model = RaphaelUNet(config)
    model(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 5, 24), torch.ones(1, 5).bool(), torch.tensor([4]))
    assert len(calls) == blocks + 2 * model.num_blocks  # and cross-attention of blocks whose attention map is not used


@pytest.mark.parametrize("size", [(7, 11), (9, 4), (5, 5), (4, 24)])
def test_odd_and_long_latents_come_back_in_their_size(size):
    assert run("all", False, size)["prediction"].shape == (4, 4, *size)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_step_routes_each_gate_once_although_blocks_run_twice(reentrant, monkeypatch):
    routed, ran = [], []
    monkeypatch.setattr("raphael_dist.model.unet.choose", lambda *a: routed.append(1) or choose(*a))
    from raphael_dist.model.layers import TransformerBlock

    forward = TransformerBlock.forward
    counted = lambda self, *a: ran.append(a[3].time_samples.tolist()) or forward(self, *a)  # noqa: E731
    monkeypatch.setattr(TransformerBlock, "forward", counted)
    run("blocks", reentrant)
    blocks = RaphaelUNet(tiny_config()).num_blocks
    assert len(routed) == 2, "the gates of a kind are routed together"
    assert len(ran) == 2 * blocks
    assert ran[:blocks] == ran[blocks:][::-1]


@pytest.mark.parametrize("shape", [(5,), (3, 7)])
def test_gates_run_together_compute_what_each_computes_alone(shape):
    gates = [Gate(6, 10, 4).double() for _ in range(5)]
    x = torch.randn(*shape, 6, dtype=torch.float64)
    together, alone = gate_logits(gates, x), torch.stack([gate(x) for gate in gates])
    assert together.shape == (5, *shape, 4)
    torch.testing.assert_close(together, alone)
    weights = torch.randn_like(alone)
    parameters = [p for gate in gates for p in gate.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), parameters) for y in (together, alone)), strict=True):
        torch.testing.assert_close(a, b)


def test_deepspeed_finds_every_output_that_a_loss_may_come_from():
    """DeepSpeed prepares the backward pass by hooks on tensors in tuples, lists and dicts, and in no other outputs."""
    config = tiny_config(model={"balance_weight": 0.1})
    model = RaphaelUNet(config)
    batch = synthetic_batch(config, [(p, 1.0) for p in range(2)], model.num_blocks)
    out = model(batch.x0, batch.timestep, batch.text, batch.text_mask, batch.end, batch.gate_noise)
    with_gradient = [out.prediction, *out.edge_logits, *out.balance]
    assert len(with_gradient) == 1 + 2 * model.num_blocks
    hooks = OutputBackwardHookManager(lambda: None)
    hooks.register_hooks_on_outputs(out)
    assert len(hooks.hook_handles) == len(with_gradient)
    leaves = {id(leaf) for leaf in torch.utils._pytree.tree_leaves(out)}
    assert leaves >= {id(t) for t in (*with_gradient, *out.space_used, *out.time_expert)}
    prepared = []
    register_output_backward_hooks(out, lambda: prepared.append(1))
    sum(t.sum() for t in with_gradient).backward()
    assert prepared == [1]


@pytest.mark.parametrize("masked", [True, False])
def test_padding_has_no_part_in_the_balance_where_it_is_masked(masked: bool):
    config = tiny_config(model={"balance_weight": 0.1, "mask_padding": masked})
    model = RaphaelUNet(config)
    batch = synthetic_batch(config, [(p, 1.0) for p in range(2)], model.num_blocks)
    other = torch.where(batch.text_mask[..., None], batch.text, -3 * batch.text)
    first, second = (
        torch.stack(model(batch.x0, batch.timestep, text, batch.text_mask, batch.end, batch.gate_noise).balance)
        for text in (batch.text, other)
    )
    assert torch.allclose(first, second) == masked


def test_time_gate_balance_is_equal_for_all_samples_and_trains_gates_only():
    config = tiny_config(model={"balance_weight": 0.1, "space_experts": 0})
    model = RaphaelUNet(config)
    batch = synthetic_batch(config, [(p, 1.0) for p in range(3)], model.num_blocks)
    arguments = (batch.x0, batch.timestep, batch.text, batch.text_mask, batch.end)
    balance_LB = torch.stack(model(*arguments, batch.gate_noise).balance)
    assert balance_LB.shape == (model.num_blocks, 3)
    assert torch.equal(balance_LB, balance_LB[:, :1].expand(-1, 3))
    balance_LB.sum().backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"time_gates"}
    with torch.no_grad():
        assert model(*arguments).balance == (), "sampling has no loss"


def test_balance_loss_revives_dead_time_experts():
    torch.manual_seed(0)
    model = RaphaelUNet(tiny_config(model={"balance_weight": 0.1}))

    def dead() -> int:
        chosen_LG = model.time_logits(torch.device("cpu")).argmax(dim=-1)
        return int((one_hot(chosen_LG, model.config.time_experts).sum(dim=1) == 0).sum())

    assert dead() > 0
    optimizer = torch.optim.Adam(model.time_gates.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        model.time_balance_L(torch.device("cpu")).mean().backward()
        optimizer.step()
    assert dead() == 0


def test_blocks_are_counted_and_run_in_the_order_of_their_gates():
    model = RaphaelUNet(tiny_config())
    assert model.num_blocks == 1 + 1 + 2  # down, middle, up
    assert len(model.time_gates) == len(model.text_gates) == 4


@pytest.mark.parametrize("backend", ["reference", *SPACE_BACKENDS])
def test_parameters_of_unused_experts_get_a_zero_gradient(backend):
    config = tiny_config(model={"expert_backend": backend})
    model = RaphaelUNet(config)
    batch = synthetic_batch(config, [(p, 1.0) for p in range(3)], model.num_blocks)
    first = GateNoise(*(n.clone() for n in batch.gate_noise))
    for noise in first:
        noise[..., 0] += 100  # all to expert 0
    out = model(batch.x0, batch.timestep, batch.text, batch.text_mask, batch.end, first)
    (out.prediction.square().mean() + sum(e.mean() for e in out.edge_logits)).backward()
    assert all((experts == 0).all() for experts in out.time_expert)
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        if re.search(r"(time|space)_moe\.[wb][12]$", name):
            assert not p.grad[1:].any(), name
            assert p.grad[0].any(), name


def test_routing_without_noise_is_that_of_noise_zero():
    config = tiny_config()
    model = RaphaelUNet(config)
    batch = synthetic_batch(config, [(p, 1.0) for p in range(3)], model.num_blocks)
    args = (batch.x0, batch.timestep, batch.text, batch.text_mask, batch.end)
    silence = GateNoise(*(torch.zeros_like(n) for n in batch.gate_noise))
    with torch.no_grad():
        plain, silent, noisy = model(*args), model(*args, silence), model(*args, batch.gate_noise)
    assert torch.equal(plain.prediction, silent.prediction)
    assert not torch.equal(plain.prediction, noisy.prediction)


@pytest.mark.parametrize("experts", [{"space_experts": 0}, {"time_experts": 0}, {"space_experts": 0, "time_experts": 0}])
@pytest.mark.parametrize("edge_weight", [0.0, 1.0])
def test_layers_that_are_turned_off_leave_no_parameter_behind(experts, edge_weight):
    config = tiny_config(model=experts, edge={"weight": edge_weight})
    model = RaphaelUNet(config)
    batch = synthetic_batch(config, [(0, 1.0), (1, 1.0)], model.num_blocks)
    losses = compute_losses(model, batch, NoiseSchedule.create(config.diffusion), config, torch.float32)
    losses.total.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    kinds = {"space_moe": "space_experts" not in experts, "time_moe": "time_experts" not in experts, "edge": edge_weight > 0}
    for kind, present in kinds.items():
        assert any(f".{kind}." in n for n, _ in model.named_parameters()) == present
    assert (losses.space_used is None, losses.time_load is None) == (not kinds["space_moe"], not kinds["time_moe"])
