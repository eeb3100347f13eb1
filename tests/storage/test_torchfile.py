"""Pickles from others: read as weights only, never run."""

import os
import time
import zipfile
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from raphael_dist.convert.conversion import convert
from raphael_dist.convert.inspect_checkpoint import open_for_inspection
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.convert.layouts.deepspeed.classes import ALLOWED
from raphael_dist.convert.write_plan import Entry
from raphael_dist.errors import UserError
from raphael_dist.storage.tensorfile import HashedFile
from raphael_dist.storage.torchfile import load_tree, write_tree
from tests.lib.checkpoints import (
    options,
    tool,
)


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, sources, file):
    convert("auto", sources["moe"][1], "deepspeed", tmp_path / "ds", options("deepspeed", (2, 2, 1, 2)))
    canary, victim = tmp_path / "canary", tmp_path / "ds/global_step7" / file
    torch.save({"module": Evil(canary)}, victim)
    torch.load(victim, weights_only=False)
    time.sleep(0.1)
    assert canary.exists()  # it would run
    canary.unlink()
    done = tool("--from", "auto", tmp_path / "ds", "--to", "canonical", tmp_path / "out")
    assert done.returncode == 2
    assert "must contain only tensors and plain values, but loading it would run other code" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    for path, unpickle, message in (
        (tmp_path / "ds", False, "is not opened"),
        (tmp_path / "ds", True, "was not run"),
        (victim, False, "no manifest has its checksum"),
        (victim, True, "was not run"),
    ):
        with pytest.raises(UserError, match=message):
            open_for_inspection(path, unpickle, None)
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


class ByGetattr:
    """Pickled as the first releases of Python 3.11 pickle a member of an enum."""

    def __init__(self, of: object, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self):
        return getattr, (self.of, self.name)


def test_zero_stages_are_read_and_written_alike_by_all_pythons(tmp_path):
    stages = {stage.name: stage for stage in ZeroStageEnum}
    torch.save({name: ByGetattr(ZeroStageEnum, name) for name in stages}, tmp_path / "old.pt")
    with HashedFile(tmp_path / "ours.pt") as file:
        write_tree(file, stages, Entry, lambda entry: iter(()))
    file.entry()
    for file in ("old.pt", "ours.pt"):
        assert load_tree(tmp_path / file, ALLOWED) == {name: int(stage) for name, stage in stages.items()}
    assert torch.load(tmp_path / "ours.pt", weights_only=False) == stages
    with zipfile.ZipFile(tmp_path / "ours.pt") as archive:
        assert b"getattr" not in archive.read("archive/data.pkl")


@pytest.mark.parametrize(("of", "name"), [(ZeroStageEnum, "__class__"), (LossScaler, "__init__"), ("text", "upper")])
def test_getattr_of_other_objects_is_refused(tmp_path, of, name):
    torch.save({"zero_stage": ByGetattr(of, name)}, tmp_path / "file.pt")
    with pytest.raises(UserError, match="must contain only tensors and plain values, but loading it would run other code"):
        load_tree(tmp_path / "file.pt", ALLOWED)


def other_byte_order(path: Path) -> None:
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)


def contains_itself(path: Path) -> None:
    loop: list = []
    loop.append(loop)
    torch.save(loop, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (other_byte_order, "other byte order"),
        (contains_itself, "recursion"),
        (lambda path: torch.save({"w": torch.ones(2, 3).t()}, path), r"a tensor of shape \[3, 2\] is not contiguous"),
        (lambda path: torch.save({"w": torch.ones(2).to_sparse()}, path), "cannot be read as a file of torch.save"),
    ],
)
def test_torch_file_that_cannot_be_read_is_one_line(tmp_path, write, message):
    write(tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=message):
        open_checkpoint("dense", tmp_path / "model.ckpt")
