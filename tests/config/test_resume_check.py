"""A resumed run reports changed settings: every field that decides its results is compared by name."""

from pathlib import Path

import pytest

from raphael_dist.config.resume_check import FREE_FIELDS, changed_fields, check_same_data, check_same_run
from raphael_dist.config.schema import ARCHITECTURE_FIELDS, Config, config_from_tree, load_config, to_yaml
from raphael_dist.config.types import keys_of
from raphael_dist.errors import UserError

PLAIN = [
    "optim.lr_schedule=constant",
    "model.mask_padding=false",
    "diffusion.prediction=epsilon",
    "diffusion.min_snr_gamma=0",
]
BASE = load_config("emoji-tiny", PLAIN)
# One other value of every field that decides what is trained.
OTHER = {
    "run.seed": 7, "model.gate_noise": 0.5, "model.gate_noise_steps": 9,
    "edge.focal_form": "quality", "model.gate_gradient": "none", "model.mask_threshold": 0.3,
    "model.balance_weight": 0.02, "model.mask_padding": True, "edge.weight": 0.5, "edge.max_timestep": 400,
    "edge.focal_alpha": 0.4, "edge.focal_gamma": 1.0, "diffusion.num_timesteps": 900, "diffusion.schedule": "linear",
    "diffusion.beta_start": 0.001, "diffusion.beta_end": 0.02, "diffusion.prediction": "v_prediction",
    "diffusion.stratified": False, "text.max_tokens": 5, "image.buckets": [[32, 32]], "data.edge_maps": "none",
    "data.filters": [{"column": "width", "min": 64.0, "max": None, "words": [], "on_missing": "drop"}],
    "data.flip": True, "data.window_shards": 3, "data.bucket_run": 4, "optim.kind": "sgd", "optim.lr": 1e-5,
    "optim.betas": [0.8, 0.9], "optim.eps": 1e-6, "optim.weight_decay": 0.1, "optim.warmup_steps": 77,
    "optim.lr_schedule": "cosine", "optim.max_grad_norm": 0.3, "train.global_batch_size": 5, "train.dtype": "bfloat16",
    "optim.lr_schedule_args": {"power": 2.0}, "diffusion.zero_terminal_snr": True, "ema.start_step": 5,
    "diffusion.min_snr_gamma": 5.0, "diffusion.offset_noise": 0.1,
    "model.gate_noise_schedule": "cosine", "train.stages": [{"until": None, "set": {"optim.lr": 0.1}}],
    "train.caption_dropout": 0.4, "ema.enabled": False, "ema.decay": 0.5, "ema.warmup": False, "edge.channels": 3,
    "image.dtype": "bfloat16", "data.caption_from": "txt", "data.caption_weights": {"txt": 1.0},
    "lora.rank": 4, "lora.alpha": 3, "lora.targets": ["experts"], "control.enabled": True,
    "upscale.noise": 0.1,
}  # fmt: skip

# What must be so for a value above to be allowed.
WITH = {
    "optim.lr_schedule_args": {"optim.lr_schedule": "polynomial"},
    "diffusion.zero_terminal_snr": {"diffusion.prediction": "v_prediction"},
    "lora.rank": {"run.init_from": "a/base"},
    "control.enabled": {"run.init_from": "a/base", "sample.prompts": []},
}


def with_fields(config: Config, values: dict[str, object]) -> Config:
    tree = config.model_dump(mode="json")
    for name, value in values.items():
        section, field = name.split(".")
        tree[section][field] = value
    return config_from_tree(tree)


def test_every_field_is_free_or_compared() -> None:
    """A new field must be marked at its definition, or be given another value in OTHER."""
    assert set(keys_of(Config)) == FREE_FIELDS | OTHER.keys() | set(ARCHITECTURE_FIELDS)
    assert len(keys_of(Config)) == len(FREE_FIELDS) + len(OTHER) + len(ARCHITECTURE_FIELDS)
    shapes = {"model.channels", "model.space_experts", "model.gate_width", "upscale.factor", "upscale.patch"}
    assert shapes < set(ARCHITECTURE_FIELDS)


@pytest.mark.parametrize("name", OTHER)
def test_changed_field_is_refused_or_reported_with_both_values(name: str) -> None:
    base = with_fields(BASE, WITH.get(name, {}))
    old, new = base.model_dump(mode="json"), OTHER[name]
    section, field = name.split(".")
    changed = with_fields(base, {name: new})
    assert changed_fields(base, changed).keys() == {name}
    with pytest.raises(UserError) as refusal:
        check_same_run(base, changed, "runs/x")
    for part in (name, str(old[section][field]), str(new), f"run.allow_change=[{name}]"):
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)
    allowed = with_fields(changed, {"run.allow_change": [name]})
    assert check_same_run(base, allowed, "x") == [f"{name} was {old[section][field]} and is now {new} (run.allow_change)"]


@pytest.mark.parametrize(
    "values",
    [
        {
            "train.max_steps": 9,
            "train.micro_batch_size": 1,
            "checkpoint.every": 3,
            "parallel.elastic": True,
            "sample.steps": 3,
        },
        {"data.shards": ["elsewhere/*.tar"], "text.encoder": "elsewhere", "model.expert_backend": "dense"},
    ],
)
def test_free_fields_may_change(values: dict[str, object]) -> None:
    assert check_same_run(BASE, with_fields(BASE, values), "x") == []


def test_other_max_steps_is_a_change_for_a_cosine() -> None:
    cosine = with_fields(BASE, {"optim.lr_schedule": "cosine"})
    assert changed_fields(cosine, with_fields(cosine, {"train.max_steps": 9})).keys() == {"train.max_steps"}


def test_other_shapes_are_refused_even_if_allowed() -> None:
    with pytest.raises(UserError, match=r"model.gate_width was .* Restore model.gate_width=.* new run.dir"):
        check_same_run(BASE, with_fields(BASE, {"model.gate_width": 3, "run.allow_change": ["model.gate_width"]}), "x")


def test_stored_configuration_is_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(BASE))
    assert changed_fields(load_config(str(path)), BASE) == {}


@pytest.mark.parametrize("name", ["data.shards", "data.shards (captions)", "text.encoder", "image.vae"])
def test_other_captions_or_encoders_are_refused_or_reported(name: str) -> None:
    now = {"data.shards": "a", "data.shards (captions)": "b", "text.encoder": "c", "image.vae": "d"}
    manifest = {"dataset": "a", "data": now}
    assert check_same_data(manifest, now, BASE, "x") == check_same_data({"dataset": "a"}, now, BASE, "x") == []
    other, field = {**now, name: "other"}, name.split()[0]
    with pytest.raises(UserError, match=rf"{field} must be the same .* x was trained with .* run.allow_change=\[{field}\]"):
        check_same_data(manifest, other, BASE, "x")
    allowed = with_fields(BASE, {"run.allow_change": [field]})
    assert check_same_data(manifest, other, allowed, "x") == [f"{name} differs from x (run.allow_change)"]
