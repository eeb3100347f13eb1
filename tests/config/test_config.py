"""The configuration: strict, layered, and light to import; mistakes are one line that shows the field and the values."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raphael_dist.config.key_suggestions import RENAMED, known_key
from raphael_dist.config.load import preset_names
from raphael_dist.config.model_sections import Model
from raphael_dist.config.schema import ARCHITECTURE_FIELDS, Config, load_config, to_yaml
from raphael_dist.config.upscale import Upscale
from raphael_dist.engine import ds_config
from raphael_dist.errors import UserError
from raphael_dist.parallel.batch_plan import BatchPlan

ROOT = Path(__file__).parents[2]
JSONS = sorted(ROOT.glob("ds_configs/*.json"))


def test_preset_as_yaml_loads_equal(tmp_path):
    path = tmp_path / "resolved.yaml"
    for preset in preset_names():
        config = load_config(preset)
        path.write_text(to_yaml(config))
        assert load_config(str(path)) == config
        assert yaml.safe_load(path.read_text()).keys() == Config.model_fields.keys()


def test_presets_of_paper_and_demo_exist():
    assert {"emoji-tiny", "emoji-small", "raphael-3b", "sd2-dense"} <= set(preset_names())
    paper = load_config("raphael-3b")
    assert (paper.train.global_batch_size, paper.optim.warmup_steps, paper.optim.lr) == (2000, 20000, 1e-4)
    assert (paper.model.space_experts, paper.model.time_experts, paper.edge.max_timestep) == (6, 4, 500)


def test_overrides_take_precedence_over_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {max_steps: 7, micro_batch_size: 3}\noptim: {max_grad_norm: 2}\n")
    config = load_config(str(path), ["train.max_steps=9", "optim.lr=1e-3", "data.shards=a b.tar"])
    assert (config.train.max_steps, config.train.micro_batch_size, config.train.global_batch_size) == (9, 3, 32)
    assert (config.optim.max_grad_norm, config.optim.lr, config.data.shards) == (2.0, 1e-3, ("a b.tar",))
    many = load_config(
        str(path),
        [
            "data.shards=[a.tar, b.tar]",
            "image.buckets=[[64, 32], [32, 64]]",
            "data.bucket_run=3",
            "train.global_batch_size=6",
            "run.dir=/x/y",
        ],
    )
    assert (many.data.shards, many.image.buckets) == (("a.tar", "b.tar"), ((64, 32), (32, 64)))
    assert many.run.dir == Path("/x/y")
    path.write_text("")
    assert load_config(str(path)) == Config.model_validate({"run": {"dir": "runs/c"}})


MISTAKES = [
    (["train.max_step=5"], ["train.max_step: unknown key (did you mean 'train.max_steps'?)", "max_steps,"]),
    (["trian.max_steps=5"], ["trian: unknown section (did you mean 'train'?)"]),
    (["train.lr=1"], ["train.lr: unknown key (did you mean 'optim.lr'?)"]),
    (["train.max_steps=0"], ["train.max_steps=0 must be at least 1"]),
    (["train.max_steps=many"], ["train.max_steps=many must be an integer"]),
    (["train.dtype=float16"], ["train.dtype=float16 must be 'float32' or 'bfloat16'"]),
    (["optim.lr=.nan"], ["optim.lr=nan"]),
    (["train.max_steps="], ["train.max_steps=null"]),
    (["train.max_steps"], ["argument 'train.max_steps'", "must have the form section.key=value"]),
    (["model.attention=[true]"], ["model.attention=[True] must have one entry per U-Net level", "model.channels has 4"]),
    (
        ["model.channels=[320, 640, 1280, 1270]"],
        ["model.channels=[320, 640, 1280, 1270] must be multiples of model.norm_groups=32", "1270 is not"],
    ),
    (["model.head_dim=100"], ["model.head_dim=100"]),
    (["image.buckets=[[64, 64], [64, 64]]"], ["image.buckets=[[64, 64], [64, 64]] must have", "each size only once"]),
    (["image.buckets=[[64]]"], ["image.buckets.0"]),
    (["edge.max_timestep=1001"], ["edge.max_timestep=1001 must be at most diffusion.num_timesteps=1000"]),
    (["sample.steps=1000"], ["sample.steps=1000 must be below diffusion.num_timesteps=1000"]),
    (["parallel.space_ep=4"], ["parallel.space_ep=4 must divide model.space_experts=6", "[1, 2, 3, 6]"]),
    (["model.space_experts=0", "parallel.space_ep=2"], ["one of [1]"]),
    (["train.max_steps=0", "run.seed=-1"], ["; train.max_steps=0"]),
    (["train.max_steps=[5\n: 3"], ["train.max_steps=[5"]),
]


def refusal(load, *args) -> str:
    """Return the line in which a mistake is reported."""
    with pytest.raises(UserError) as caught:
        load(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistake_is_one_line_with_field_and_value():
    for overrides, texts in MISTAKES:
        line = refusal(load_config, "raphael-3b", overrides)
        assert all(text in line for text in texts), line


WRONG_FILES = [
    ("emoji-tny", None, "there is no such preset (did you mean 'emoji-tiny'?). Give a .yaml file or one of emoji"),
    ("gone.yaml", None, "gone.yaml: there is no such file"),
    ("bad.yaml", "train: {max_steps: [1\nx: }", "not valid YAML"),
    ("list.yaml", "- 1\n- 2", "must contain a mapping of sections, but it contains a list"),
    ("scalar.yaml", "train: 5", "train=5 must be a mapping"),
    ("nested.yaml", "train: {max_steps: {a: 1}}", "train.max_steps={'a': 1} must be an integer"),
    ("key.yaml", "train: {1: 2}", "train.1"),
    ("binary.yaml", "\x00\x01", "not UTF-8"),
    ("typo.yaml", "optim: {lr: 1}\ntrain:\n  max_step: 5", "(did you mean 'train.max_steps'?)"),
    ("line.yaml", "optim: {lr: 1}\ntrain:\n  max_steps: 0", "line.yaml, line 3)"),
    ("section.yaml", "optim: {lr: 1}\n\ntrian: {}", "section.yaml, line 3)"),
    (
        "twice.yaml",
        "train: {max_steps: 1}\noptim: {lr: 1}\ntrain: {micro_batch_size: 2}",
        "train is set in line 1 and again in line 3",
    ),
    ("key_twice.yaml", "train:\n  max_steps: 1\n  max_steps: 2", "train.max_steps is set in line 2 and again in line 3"),
    ("round.yaml", "base: round.yaml", "must end within"),
    ("surrogate.yaml", 'run: {dir: "a\\uD800"}', r"run.dir=a\ud800 must consist of Unicode characters, but"),
    ("surrogate_key.yaml", 'run: {"\\uD800": 1}', r"run.\ud800=1 must consist of Unicode characters, but"),
    ("surrogate_list.yaml", 'sample: {prompts: [a, "\\uDBFF"]}', r"sample.prompts=\udbff must consist of Unicode"),
    ("no_base.yaml", "base: emoji-tny", "there is no such preset (did you mean 'emoji-tiny'?)"),
    ("base_list.yaml", "base: [emoji-tiny]", "base=['emoji-tiny'] must be the name of one preset or YAML file"),
]


GIVEN_TWICE = [
    (
        [f"data.shards=/d/0000{i}.tar" for i in range(3)],  # what a shell makes of data.shards=/d/0000{0..2}.tar
        [
            "data.shards must be given once, but it is given 3 times",
            "'/d/00000.tar' and '/d/00001.tar' and 1 more",
            "Quote braces, data.shards='",
        ],
    ),
    (
        ["train.max_steps=8", "optim.lr=1", "train.max_steps=9"],
        ["train.max_steps must be given once, but it is given 2 times, as '8' and '9'. Give it only once"],
    ),
]


def test_repeated_key_is_refused_with_both_values():
    for overrides, expected in GIVEN_TWICE:
        line = refusal(load_config, "emoji-tiny", overrides)
        assert all(text in line for text in expected), line


def test_file_builds_on_preset_or_file(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "all.yaml").write_text("base: emoji-tiny\ntrain: {max_steps: 5}\nrun: {seed: 3}\n")
    (tmp_path / "mine" / "more.yaml").write_text("base: ../all.yaml\ntrain: {log_every: 7}\n")
    config, preset = load_config(str(tmp_path / "mine" / "more.yaml"), ["run.seed=4"]), load_config("emoji-tiny")
    assert (config.train.max_steps, config.train.log_every, config.run.seed) == (5, 7, 4)
    train = {"max_steps": 5, "log_every": 7}
    assert config == preset.model_copy(
        update={
            "train": preset.train.model_copy(update=train),
            "run": preset.run.model_copy(update={"seed": 4, "dir": Path("runs/more")}),
        }
    )


def test_mistake_in_base_names_its_file_and_line(tmp_path):
    (tmp_path / "base.yaml").write_text("train:\n  max_steps: 0\n")
    (tmp_path / "c.yaml").write_text("base: base.yaml\ntrain: {log_every: 7}\n")
    assert "base.yaml, line 2)" in refusal(load_config, str(tmp_path / "c.yaml"))
    assert "line" not in refusal(load_config, str(tmp_path / "c.yaml"), ["train.max_steps=-1"])


def test_invalid_file_is_one_line(tmp_path):
    for name, text, expected in WRONG_FILES:
        if text is not None:
            (tmp_path / name).write_text(text)
        assert expected in refusal(load_config, str(tmp_path / name) if name.endswith(".yaml") else name)


def test_override_of_section_that_is_no_mapping_names_it(tmp_path):
    (tmp_path / "c.yaml").write_text("train: 5")
    with pytest.raises(UserError, match=r"^train=5 in the configuration file must be a mapping"):
        load_config(str(tmp_path / "c.yaml"), ["train.max_steps=5"])


def test_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.max_steps = 5


def test_architecture_fields_are_fields_of_the_model():
    known = {f"model.{field}" for field in Model.model_fields} | {f"upscale.{field}" for field in Upscale.model_fields}
    assert set(ARCHITECTURE_FIELDS) <= known


def test_loading_configuration_imports_nothing_heavy():
    code = "import sys, raphael_dist.engine.ds_config; from raphael_dist.config.schema import load_config;"
    code += "load_config('raphael-3b');"
    code += "print([m for m in ('torch', 'deepspeed', 'diffusers', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


# ---- the DeepSpeed JSON ---------------------------------------------------------------------------------------------


def test_every_deepspeed_json_merges_with_every_preset():
    for preset, path in itertools.product(preset_names(), JSONS):
        config, tree = load_config(preset), ds_config.read_deepspeed_json(str(path))
        unchanged = json.dumps(tree)
        plan = BatchPlan.of(config, 8)
        if config.train.dtype == "bfloat16" and ds_config.zero_stage(tree) == 0:
            with pytest.raises(UserError, match=r"train.dtype=bfloat16 requires ZeRO stage 1, 2 or 3"):
                ds_config.merge(config, tree, plan.accumulation, 8)
            continue
        merged = ds_config.merge(config, tree, plan.accumulation, 8)
        assert json.dumps(tree) == unchanged, "the user's tree must stay as it is"
        assert merged["train_micro_batch_size_per_gpu"] == config.train.micro_batch_size
        assert merged["gradient_clipping"] == config.optim.max_grad_norm
        assert merged["bf16"]["enabled"] == (config.train.dtype == "bfloat16")
        assert merged["zero_optimization"].items() >= tree["zero_optimization"].items()
        product = merged["train_micro_batch_size_per_gpu"] * merged["gradient_accumulation_steps"] * 8
        assert merged["train_batch_size"] == product >= config.train.global_batch_size


CONTRADICTIONS: list[tuple[dict, list[str]]] = [
    ({"train_micro_batch_size_per_gpu": 4}, ["per_gpu=4 in the DeepSpeed JSON must be 8", "train.micro_batch_size"]),
    ({"gradient_accumulation_steps": 5}, ["=5 in", "must be 2", "train.global_batch_size"]),
    ({"gradient_clipping": 0.3}, ["=0.3 in", "must be 1.0", "optim.max_grad_norm"]),
    ({"train_batch_size": 64}, ["=64 in", "must be 32", "train.global_batch_size"]),
    ({"bf16": {"enabled": True}}, ["bf16.enabled=true", "must be false", "train.dtype"]),
    ({"fp16": {"enabled": True}}, ["fp16.enabled=true", "float32 or bfloat16"]),
    ({"bf16": True}, ["bf16=true in the DeepSpeed JSON must be a JSON object"]),
    ({"optimizer": {"type": "Adam"}}, ["optimizer in the DeepSpeed JSON is not used", "optim.*"]),
    ({"scheduler": {}}, ["scheduler", "optim.warmup_steps"]),
    ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage=4", "must be 0 or 1 or 2 or 3"]),
    ({"zero_optimization": 2}, ["zero_optimization=2", "must be a JSON object"]),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        ['offload_param.device="nvme"', 'must be "none" or "cpu"', "in memory"],
    ),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, ["in memory", 'or "cpu"']),
]


def test_contradicting_deepspeed_number_is_refused_with_both_values():
    for tree, expected in CONTRADICTIONS:
        line = refusal(ds_config.merge, Config(), tree, 2, 2)
        assert all(text in line for text in expected), line


def test_equal_or_auto_deepspeed_numbers_are_accepted():
    tree = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
    }
    merged = ds_config.merge(Config(), tree, 2, 2)
    assert (merged["train_batch_size"], merged["gradient_clipping"], merged["bf16"]["enabled"]) == (32, 1.0, False)


def test_invalid_deepspeed_file_is_one_line(tmp_path):
    path = tmp_path / "ds.json"
    for text, expected in (
        (None, "but there is no such file"),
        ("{", "cannot be read as JSON"),
        ("[1]", "but it contains [1]"),
    ):
        if text is not None:
            path.write_text(text)
        line = refusal(ds_config.read_deepspeed_json, str(path))
        assert expected in line
        assert str(path) in line


def test_zero_stage_without_deepspeed_file_follows_precision():
    assert ds_config.zero_stage(ds_config.read_deepspeed_json(None)) == 1
    assert ds_config.zero_stage(ds_config.read_deepspeed_json(None, "bfloat16")) == 2


# ---- expert parallelism ---------------------------------------------------------------------------------------------

SPREAD = {"parallel": {"space_ep": 2, "time_ep": 2}}
TWO_SIZES = {"image": {"buckets": [[64, 64], [64, 32]]}, "train": {"micro_batch_size": 4, "global_batch_size": 24}}


REFUSED: list[tuple[dict, dict, int, list[str]]] = [
    ({"parallel": {"space_ep": 3}}, {"stage": 1}, 4, ["space_ep=3", "(4)", "space_experts=6", "[1, 2]", "6 ranks"]),
    ({"parallel": {"time_ep": 4}}, {"stage": 1}, 6, ["time_ep=4", "(6)", "time_experts=4", "[1, 2]", "8 ranks"]),
    ({"parallel": {"space_ep": 2}}, {"stage": 1}, 1, ["space_ep=2", "(1)", "[1]", "2 ranks"]),
    (SPREAD, {"stage": 0}, 2, ["space_ep=2 parallel.time_ep=2", "stage 0", "gradient norm", "1 or 2"]),
    (SPREAD, {"stage": 3}, 2, ["stage 3", "1 or 2", "zero2.json"]),
    ({**SPREAD, "model": {"expert_backend": "reference"}}, {"stage": 1}, 2, ["reference", "grouped or dense"]),
    (SPREAD, {"stage": 2, "overlap_comm": True}, 2, ["requires overlap_comm=false", "zero2.json"]),
]


def test_impossible_expert_parallelism_is_refused_with_remedy():
    for sections, zero, world_size, expected in REFUSED:
        line = refusal(ds_config.merge, Config.model_validate(sections), {"zero_optimization": zero}, 2, world_size)
        assert all(text in line for text in expected), line


ACCEPTED: list[tuple[dict, int]] = [
    ({"parallel": {"space_ep": 3, "time_ep": 2}}, 6),
    ({"parallel": {"space_ep": 6, "time_ep": 4}}, 12),
    ({**SPREAD, **TWO_SIZES, "data": {"bucket_run": 4}}, 4),
    ({**TWO_SIZES, "parallel": {"space_ep": 3, "time_ep": 2}, "data": {"bucket_run": 7}}, 6),
    ({**SPREAD, **TWO_SIZES, "train": {"micro_batch_size": 4, "global_batch_size": 21}, "data": {"bucket_run": 8}}, 4),
]


def test_possible_expert_parallelism_is_accepted():
    for sections, world_size in ACCEPTED:
        for zero in ({"stage": 1}, {"stage": 2, "offload_optimizer": {"device": "cpu"}}):
            ds_config.merge(Config.model_validate(sections), {"zero_optimization": zero}, 2, world_size)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "override",
    [
        "train.max_steps=2020-99-99", "train.max_steps=" + "9" * 5000, "train.max_steps=" + "[" * 3000,
        "train.max_steps=" + "{a: " * 3000, "run.dir=a\0b", "text.encoder=a\0b", "data.shards=[a\0b]", "x" * 5000,
        "train." + "y" * 5000 + "=1", "train.max_steps={? [1] : 2}", "train.max_steps=&a [*a]",
    ],
)  # fmt: skip
def test_nonsense_override_is_one_short_line(override: str) -> None:
    with pytest.raises(UserError) as refusal:
        load_config("emoji-tiny", [override])
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text",
    [BOMB, "train: &t {max_steps: 1, b: *t}", "train: " + "[" * 5000, "? [1]\n: 2", "train: {max_steps: 2020-99-99}",
     "train: !!python/object:os.system x"],
)  # fmt: skip
def test_nonsense_file_is_one_short_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError) as refusal:
        load_config(str(tmp_path / "x.yaml"))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_renamed_key_is_refused_with_its_new_name(old: str, new: str, tmp_path: Path) -> None:
    section, _, name = old.partition(".")
    path = tmp_path / "c.yaml"
    path.write_text(f"base: emoji-tiny\n{section}: {{{name}: 1}}\n")
    for arguments in (("emoji-tiny", [f"{old}=1"]), (str(path), [])):
        with pytest.raises(UserError, match=f"^{re.escape(old)} was renamed to {re.escape(new)}"):
            load_config(*arguments)
    assert known_key(new, Config) == new
