"""Write, read and damage small checkpoints in tests of conversions.

Checkpoints are written here with safetensors and json only, and not by the package: they are the expected results with which
tests compare conversions. A state is {(kind, parameter name): tensor}, with the kinds KINDS: fp32 weights, moments, average.
"""

import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from raphael_dist.checkpoint.manifest import seal
from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.config.schema import Config
from raphael_dist.convert.layouts import layout_of, names, open_checkpoint
from raphael_dist.convert.source_checkpoint import Checkpoint
from raphael_dist.convert.write_plan import Options
from raphael_dist.model.unet import RaphaelUNet
from tests.lib.launch import ROOT
from tests.lib.synthetic import TREE, tiny_config

WHOLE = {name for name in names() if layout_of("--to", name).holds == "everything"}
MOE = tiny_config(parallel={"placement": ["shard"]})
DENSE = tiny_config(
    model={**TREE["model"], "space_experts": 0, "time_experts": 0, "time_activation": "geglu", "expert_width": [64, 96]},
    edge={"weight": 0.0},
)
State = dict[tuple[str, str], Tensor]
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


def random_state(config: Config, kinds: tuple[str, ...] = KINDS, seed: int = 0) -> State:
    """Return random normal numbers for each parameter of the model of `config`, in each of `kinds`."""
    draw = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in RaphaelUNet(config).named_parameters()}
    return {(kind, name): torch.randn(shape, generator=draw) for kind in kinds for name, shape in shapes.items()}


def handmade_canonical(folder: Path, config: Config, state: State, step: int = 7) -> Path:
    """Write `state` as a checkpoint in the canonical layout, one file per kind; return `folder`. `step`: training step."""
    folder.mkdir(parents=True)
    files = {}
    for kind in dict.fromkeys(kind for kind, _ in state):
        tensors = {}
        for (k, name), value in state.items():
            if k == kind:
                tensors |= by_expert(name, value)
        path = folder / {"master": "model.safetensors"}.get(kind, f"{kind}.safetensors")
        save_file(tensors, path)
        files[path.name] = fingerprint(path)
    manifest = {
        "layout": "canonical",
        "format": 1,
        "step": step,
        "samples_seen": step * config.train.global_batch_size,
        "updates": step - 2,
        "guard": {"skipped": 2},
        "dataset": "synthetic",
        "config": config.model_dump(mode="json"),
        "files": files,
    }
    (folder / "manifest.json").write_bytes(seal(manifest))
    return folder


def by_expert(name: str, value: Tensor) -> dict[str, Tensor]:
    """Return the tensors that the canonical layout stores for a parameter, by key: one per expert if experts are stacked."""
    layer, _, leaf = name.rpartition(".")
    if not layer.endswith(("space_moe", "time_moe")) or leaf not in ("w1", "b1", "w2", "b2"):
        return {name: value}
    kind = "weight" if leaf[0] == "w" else "bias"
    return {f"{layer}.experts.{k}.w{leaf[1]}.{kind}": value[k].contiguous() for k in range(len(value))}


def fingerprint(path: Path) -> dict[str, Any]:
    """Return the size and SHA-256 of a file, as a manifest states them."""
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def rewrite_checksums(folder: Path) -> None:
    """Make the manifest in `folder` valid again after a test has changed or removed files: update sizes and checksums."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: fingerprint(folder / name) for name in manifest["files"] if (folder / name).is_file()}
    (folder / "manifest.json").write_bytes(seal(manifest))


def state_of(found: Checkpoint) -> State:
    """Return all tensors of a checkpoint."""
    return {
        (kind, name): found.read(kind, name, 0, torch.Size(shape).numel()).view(shape)
        for kind in found.kinds()
        for name, shape in found.shapes.items()
    }


def read_state(layout: str, path: Path, config: Config | None = None) -> State:
    """Open the checkpoint `path`, which is in the layout `layout`, and return all its tensors."""
    return state_of(open_checkpoint(layout, path, config))


def assert_same(found: State, expected: State) -> None:
    """Assert that two states have the same keys and bitwise equal tensors."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def options(layout: str, topology: tuple[int, int, int, int] = (2, 1, 1, 2), **more: Any) -> Options:
    """Return options for a conversion to `layout`, with only those that the layout supports.

    `topology`: (ranks, space_ep, time_ep, ZeRO stage), for layouts with files per rank. For others: the fp32 weights instead
    of their average, and the U-Net alone. `more`: options that replace these.
    """
    world, space, time, stage = topology
    supported = layout_of("--to", layout).options
    more.setdefault("unet_only", "unet_only" in supported)
    more.setdefault("weights", "master" if "weights" in supported else None)
    return Options(space, time, world, stage, **more) if "world" in supported else Options(**more)


def tool(
    *arguments: object, name: str = "convert_checkpoint", launcher: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess:
    """Run the tool tools/NAME.py with these arguments; return exit code and output.

    `launcher`: command such as mpirun that starts the tool; empty: its `main` is called in this process. `env`: environment
    variables.
    """
    command, env = [f"tools/{name}.py", *map(str, arguments)], {"COLUMNS": "160", **env}  # paths are long
    if launcher:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
        command = [*launcher, sys.executable, *command]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err, mock.patch.dict(os.environ, env):
        code = importlib.import_module(name).main(command[1:])
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def copy(folder: Path, target: Path) -> Path:
    """Copy the files of `folder` into the new folder `target`; return `target`."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def in_manifest(folder: Path, **values: Any) -> None:
    """Set top-level fields of the manifest in `folder`, and update its checksum."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_bytes(seal(manifest | values))


def flip_a_bit(folder: Path) -> None:
    """Flip one bit of the Adam moments (exp_avg) in a checkpoint of the canonical layout, so that its checksum is wrong."""
    data = bytearray((folder / "exp_avg.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "exp_avg.safetensors").write_bytes(data)


def open_step(run: Path, step: int) -> CheckpointReader:
    """Open the checkpoint of `step` in the run directory `run`, and assert that it has every element of every tensor."""
    reader = CheckpointReader(run / "checkpoints" / f"step-{step:08d}")
    assert reader.incomplete() is None
    return reader
