"""A run that goes on with other numbers says so: every field that decides them is compared, by name."""

from pathlib import Path

import pytest

from raphael_dist.config import Config, config_from_tree, load_config, to_yaml
from raphael_dist.errors import UserError
from raphael_dist.identity import FREE, FREE_SECTIONS, changes, check_same_data, check_same_run

PLAIN = ["optim.decay=constant", "model.mask_padding=false", "diffusion.prediction=epsilon", "recipe.min_snr_gamma=0"]
BASE = load_config("emoji-tiny", PLAIN)
# One other value of every field that decides what is trained.
OTHER = {
    "run.seed": 7, "model.gate_noise": 0.5, "model.gate_noise_steps": 9,
    "edge.focal_form": "quality", "model.gate_gradient": "none", "model.mask_threshold": 0.3,
    "model.balance_weight": 0.01, "model.mask_padding": True, "edge.weight": 0.5, "edge.max_timestep": 400,
    "edge.focal_alpha": 0.4, "edge.focal_gamma": 1.0, "diffusion.num_timesteps": 900, "diffusion.schedule": "linear",
    "diffusion.beta_start": 0.001, "diffusion.beta_end": 0.02, "diffusion.prediction": "v_prediction",
    "diffusion.stratified": False, "text.max_tokens": 5, "image.buckets": [[32, 32]], "data.edges": "none",
    "data.filters": [{"column": "width", "min": 64.0, "max": None, "words": [], "on_missing": "drop"}],
    "data.flip": True, "data.window_shards": 3, "data.bucket_run": 4, "optim.kind": "sgd", "optim.lr": 1e-5,
    "optim.betas": [0.8, 0.9], "optim.eps": 1e-6, "optim.weight_decay": 0.1, "optim.warmup_steps": 77,
    "optim.decay": "cosine", "optim.clip": 0.3, "train.global_batch": 5, "train.dtype": "bfloat16",
    "optim.decay_arguments": {"power": 2.0}, "diffusion.zero_terminal_snr": True, "ema.start_step": 5,
    "recipe.min_snr_gamma": 5.0, "recipe.offset_noise": 0.1, "recipe.gradient_noise": 0.01,
    "recipe.gate_noise_schedule": "cosine", "recipe.stages": [{"until": None, "set": {"optim.lr": 0.1}}],
    "train.caption_drop": 0.4, "ema.enabled": False, "ema.decay": 0.5, "ema.warmup": False, "edge.channels": 3,
    "image.dtype": "bfloat16", "data.caption_from": "txt", "data.caption_weights": {"txt": 1.0},
    "lora.rank": 4, "lora.alpha": 3, "lora.targets": ["experts"], "control.enabled": True,
    "upscale.noise": 0.1,
}  # fmt: skip

# What must be so for a value above to be allowed.
WITH = {
    "optim.decay_arguments": {"optim.decay": "polynomial"},
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
    """A field that is neither in FREE nor tried here is new: say which it is."""
    names = {f"{s}.{f}" for s, fields in BASE for f in type(fields).model_fields if s not in FREE_SECTIONS}
    architecture = {name for name in names if name.startswith(("model.", "upscale."))} - FREE - OTHER.keys()
    assert names == FREE | OTHER.keys() | architecture
    assert {"model.channels", "model.space_experts", "model.gate_width", "upscale.factor", "upscale.patch"} < architecture


@pytest.mark.parametrize("name", OTHER)
def test_a_changed_number_is_refused_with_both_values_or_told(name: str) -> None:
    base = with_fields(BASE, WITH.get(name, {}))
    old, new = base.model_dump(mode="json"), OTHER[name]
    section, field = name.split(".")
    changed = with_fields(base, {name: new})
    assert changes(base, changed).keys() == {name}
    with pytest.raises(UserError) as refusal:
        check_same_run(base, changed, "runs/x")
    for part in (name, str(old[section][field]), str(new), f"run.allow_change=[{name}]"):
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)
    allowed = with_fields(changed, {"run.allow_change": [name]})
    assert check_same_run(base, allowed, "x") == [
        f"{name} was {old[section][field]} there and is {new} here (run.allow_change)"
    ]


@pytest.mark.parametrize(
    "values",
    [
        {"train.max_steps": 9, "train.micro_batch": 1, "checkpoint.every": 3, "parallel.elastic": True, "sample.steps": 3},
        {"data.shards": ["elsewhere/*.tar"], "text.encoder": "elsewhere", "model.space_backend": "wide"},
    ],
)
def test_how_a_run_is_carried_out_may_change(values: dict[str, object]) -> None:
    assert check_same_run(BASE, with_fields(BASE, values), "x") == []


def test_another_end_of_a_cosine_is_another_learning_rate() -> None:
    cosine = with_fields(BASE, {"optim.decay": "cosine"})
    assert changes(cosine, with_fields(cosine, {"train.max_steps": 9})).keys() == {"train.max_steps"}


def test_nothing_allows_weights_of_another_shape() -> None:
    with pytest.raises(UserError, match=r"model.gate_width was .* choose another run.dir, or model.gate_width="):
        check_same_run(BASE, with_fields(BASE, {"model.gate_width": 3, "run.allow_change": ["model.gate_width"]}), "x")


def test_the_field_for_other_shards_is_read_under_its_former_name() -> None:
    assert config_from_tree({"data": {"allow_change": True}}).run.allow_change == ("data.shards",)
    assert config_from_tree({"data": {"allow_change": False}}).run.allow_change == ()
    with pytest.raises(UserError, match=r"run.allow_change: no field 'optim.lrr' \(did you mean 'optim.lr'\?\)"):
        config_from_tree({"run": {"allow_change": ["optim.lrr"]}})


def test_a_configuration_is_read_back_as_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(BASE))
    assert changes(load_config(str(path)), BASE) == {}


@pytest.mark.parametrize("name", ["data.shards", "data.shards (captions)", "text.encoder", "image.encoder"])
def test_other_captions_or_weights_of_an_encoder_are_refused_or_told(name: str) -> None:
    now = {"data.shards": "a", "data.shards (captions)": "b", "text.encoder": "c", "image.encoder": "d"}
    manifest = {"dataset": "a", "data": now}
    assert check_same_data(manifest, now, BASE, "x") == check_same_data({"dataset": "a"}, now, BASE, "x") == []
    other, field = {**now, name: "other"}, name.split()[0]
    with pytest.raises(UserError, match=rf"{field}: x was trained with .* run.allow_change=\[{field}\]"):
        check_same_data(manifest, other, BASE, "x")
    allowed = with_fields(BASE, {"run.allow_change": [field]})
    assert check_same_data(manifest, other, allowed, "x") == [f"{name} is not what it was in x (run.allow_change)"]
