"""Imports point down only (docs/architecture.md): the model has never heard of ranks, and one module calls DeepSpeed."""

import ast
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "raphael_dist"

# A module may import those of lower levels and those to its left in its own level. A new module must be added here; a name
# that does not exist yet is no harm.
LEVELS = {
    0: "raphael_dist presets errors rng stopping preflight_report config_errors config batch_plan ds_config",
    1: """placement model model.experts model.moe model.routing model.edge model.layers model.unet diffusion batch
          objective parallel""",
    2: """guard fragments ema metrics report rundir watchdog straggler conditioning vae exchange expert_groups
          expert_parallel
          data data.captions data.tar_scan data.buckets data.shards data.dataset data.prefetch data.order data.edges
          data.emoji_names data.emoji data.cache_build data.cache data.stream data.batches data.features""",
    3: """checkpoint checkpoint.files checkpoint.progress checkpoint.reader
          convert convert.tensorfile convert.torchfile convert.state convert.partition convert.plan convert.manifest
          convert.canonical convert.run_layout convert.deepspeed_read convert.deepspeed_write convert.dense
          convert.megablocks convert.diffusers_folder convert.upcycle convert.ranks convert.convert convert.command
          convert.inspection checkpoint.load checkpoint.snapshot checkpoint.restore checkpoint.store engine""",
    4: """preflight measure sampling pipeline sample evaluate paths
          benchmarks benchmarks.space benchmarks.moe benchmarks.balance benchmarks.convert benchmarks.checkpoint
          recovery trainer""",
    5: "train cli",
}
ORDER = {name: (level, i) for level, names in LEVELS.items() for i, name in enumerate(names.split())}
PURE = {"batch_plan", "diffusion", "batch", "objective"} | {n for n in ORDER if n.startswith("model") or ORDER[n][0] == 0}
# The writer of DeepSpeed's layout pickles three of its small classes.
MAY_IMPORT_DEEPSPEED = {"engine", "parallel", "expert_groups", "benchmarks.moe", "convert.deepspeed_write"}
LIGHT = {"config", "config_errors", "preflight_report", "stopping", "ds_config", "batch_plan", "placement", "errors"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "raphael_dist"


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
every_module = pytest.mark.parametrize("module", MODULES)


@cache
def imports(module: str) -> frozenset[str]:
    """Return the full names that a module imports anywhere in its text, and torch.distributed where it is only reached."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
            found.add("torch.distributed")
    return frozenset(found)


def ours(module: str) -> set[str]:
    """Return the modules of the package that a module imports."""
    found = set()
    for full in imports(module):
        if full.split(".")[0] == "raphael_dist":
            name = full.removeprefix("raphael_dist.")
            while name not in MODULES:  # a function or class: the module that holds it
                name = name.rpartition(".")[0] or "raphael_dist"
            found.add(name)
    return found


@every_module
def test_a_module_imports_only_what_lies_below_it(module):
    assert module in ORDER, f"{module} is new: give it a place in LEVELS"
    wrong = {other for other in ours(module) if ORDER.get(other, (9, 9)) >= ORDER[module]}
    assert not wrong, f"{module} (level {ORDER[module][0]}) must not import {sorted(wrong)}"


@every_module
def test_only_the_engine_and_the_process_group_know_deepspeed(module):
    if module not in MAY_IMPORT_DEEPSPEED:
        assert not [name for name in imports(module) if name.split(".")[0] == "deepspeed"]


@pytest.mark.parametrize("module", sorted(PURE & set(MODULES)))
def test_the_model_has_never_heard_of_ranks(module):
    assert not [name for name in imports(module) if name.startswith("torch.distributed")]
    assert ours(module) <= PURE


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_configuration_never_reaches_torch(module):
    assert not {name.split(".")[0] for name in imports(module)} & {
        "torch",
        "numpy",
        "deepspeed",
        "diffusers",
        "transformers",
    }
    assert ours(module) <= LIGHT


def test_the_model_runs_without_deepspeed_and_without_a_process_group():
    code = "import sys, raphael_dist.objective, raphael_dist.model.unet, torch;"
    code += "print('deepspeed' in sys.modules, torch.distributed.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_no_module_hides_a_package_when_the_folder_itself_is_on_the_path():
    """`deepspeed raphael_dist/train.py` puts raphael_dist/ first on sys.path."""
    mine = {p.stem if p.suffix else p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()} - {
        "__init__",
        "__pycache__",
    }
    assert not mine & set(sys.stdlib_module_names)
    assert not mine & set(packages_distributions())
