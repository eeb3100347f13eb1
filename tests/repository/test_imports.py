"""The rooms of the package, what each may import, and what must stay free of torch, of ranks and of DeepSpeed."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "raphael_dist"

# A room is a folder of the package; `base` is what lies directly in it. A room may import itself, `base` and the rooms
# named here. docs/architecture.md lists the rooms in the same order.
ROOMS = {
    "base": "",
    "config": "base",
    "storage": "base config",
    "model": "base config",
    "runtime": "base config storage model",
    "parallel": "base config model runtime",
    "data": "base config storage model runtime parallel",
    "engine": "base config model runtime parallel",
    "checkpoint": "base config storage runtime parallel engine",
    "convert": "base config storage model runtime parallel data engine checkpoint",
    "sampling": "base config storage model runtime parallel data engine checkpoint convert",
    "data_prep": "base config storage model runtime parallel data",
    "analysis": "base config model runtime data sampling",
    "evaluation": "base config storage model runtime parallel data sampling",
    "training": "base config storage model runtime parallel data engine checkpoint convert sampling analysis",
    "planning": "base config model runtime parallel engine checkpoint convert training",
    "cluster": "base config storage model runtime parallel data engine checkpoint training planning",
    "reporting": "base config storage data data_prep checkpoint analysis training planning",
    "cli": "base config storage model runtime parallel data data_prep engine checkpoint convert sampling analysis "
    "evaluation training cluster reporting",
    "entry": "base config storage model runtime parallel data data_prep engine checkpoint convert sampling analysis "
    "evaluation training cluster reporting cli",
}
BASE = {"raphael_dist", "errors", "rng", "text"}
ENTRY = {"__main__", "train", "sample", "pipeline"}
# The writer of DeepSpeed's layout pickles three of its small classes.
MAY_IMPORT_DEEPSPEED = {"engine.deepspeed_comm", "engine.expert_groups", "convert.layouts.deepspeed.write"}
LIGHT_MODULES = {
    "errors", "cli.common", "engine.ds_config", "parallel.batch_plan", "parallel.placement", "planning.communication",
    "cluster.preflight_report", "cli.missing_packages",
    "runtime.launchers", "runtime.launcher_env", "runtime.stop_request", "model.latents", "text", "engine.ds_keys",
}  # fmt: skip


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "raphael_dist"


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
LIGHT = LIGHT_MODULES | {module for module in MODULES if module.startswith("config.")}


def room_of(module: str) -> str:
    """Return the room of a module; an unknown one outside the rooms counts as its own room, and fails."""
    first = module.split(".")[0]
    return "base" if first in BASE else "entry" if first in ENTRY else first


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


@cache
def ours(module: str) -> frozenset[str]:
    """Return the modules of the package that a module imports."""
    found = set()
    for full in imports(module):
        if full.split(".")[0] == "raphael_dist":
            name = full.removeprefix("raphael_dist").lstrip(".")
            while name and name not in MODULES:  # a function or class: the module that holds it
                name = name.rpartition(".")[0]
            found.add(name or "raphael_dist")
    return frozenset(found)


def top_packages(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(module)}


def test_a_room_imports_the_rooms_it_may():
    assert {room_of(module) for module in MODULES} <= set(ROOMS), "a module stands in no room of ROOMS"
    allowed = {room: {room, *others.split()} for room, others in ROOMS.items()}
    wrong = {(one, other) for one in MODULES for other in ours(one) if room_of(other) not in allowed[room_of(one)]}
    assert not wrong, "the first of each must not import the second"


def test_rooms_and_modules_lie_in_an_order():
    """No circle: static_order raises CycleError."""
    list(TopologicalSorter({room: allowed.split() for room, allowed in ROOMS.items()}).static_order())
    list(TopologicalSorter({module: ours(module) - {module} for module in MODULES}).static_order())


def test_only_those_who_bend_to_deepspeed_know_it():
    assert {module for module in MODULES if "deepspeed" in top_packages(module)} <= MAY_IMPORT_DEEPSPEED


def test_the_model_has_never_heard_of_ranks():
    pure = [module for module in MODULES if room_of(module) in ("model", "base")]
    assert not [(m, name) for m in pure for name in imports(m) if name.startswith("torch.distributed")]


def test_configuration_never_reaches_torch():
    heavy = {"torch", "numpy", "deepspeed", "diffusers", "transformers"}
    assert not {module: top_packages(module) & heavy for module in LIGHT if top_packages(module) & heavy}
    reached = {other for module in LIGHT for other in ours(module) if MODULES[other].name != "__init__.py"}
    assert reached <= LIGHT


def test_the_model_runs_without_deepspeed_and_without_a_process_group():
    code = "import sys, raphael_dist.model.losses, raphael_dist.model.unet, torch;"
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


def test_tool_imports_the_package_of_its_own_checkout(tmp_path: Path) -> None:
    """And not another version that is installed."""
    for path in (PACKAGE.parent / "tools").glob("*.py"):
        order = re.findall(
            r"^(?:import|from) (checkout|raphael_dist|benchmarks|emoji_data)\b", path.read_text(), re.MULTILINE
        )
        assert path.stem in ("checkout", "docs_hook") or order[0] == "checkout", path.name
    (tmp_path / "raphael_dist").mkdir()
    (tmp_path / "raphael_dist" / "__init__.py").write_text("")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "checkout.py").write_text((PACKAGE.parent / "tools" / "checkout.py").read_text())
    (tmp_path / "tools" / "tool.py").write_text("import checkout\nimport raphael_dist\nprint(raphael_dist.__file__)\n")
    done = subprocess.run([sys.executable, str(tmp_path / "tools" / "tool.py")], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == str(tmp_path / "raphael_dist" / "__init__.py"), done.stderr
