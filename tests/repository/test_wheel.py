"""The package from a wheel, without the repository, in any folder: commands, presets, the demo, the Slurm scripts."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.lib.launch import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tracked files and installed into a folder without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    left_out = ("tests/", "data/emoji/train", "data/emoji/val")
    wanted = [name for name in files.stdout.splitlines() if not name.startswith(left_out)]
    for name in wanted:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(folder / "source")]
    subprocess.run([*pip, *build], check=True, capture_output=True, timeout=200)
    (wheel,) = folder.glob("*.whl")
    install = ["install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True, timeout=200)
    return folder / "site"


def run(installed: Path, cwd: Path, *command: str, code: int = 0, **env: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PYTHONPATH", "RAPHAEL_"))}
    path = f"{installed}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**clean, "PYTHONPATH": str(installed), "PATH": path, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_wheel_holds_code_and_assets_and_no_tests(installed: Path) -> None:
    (wheel,) = installed.parent.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "slurm/train_raphael.sh",
        "data/emoji-demo/train-0000.tar",
        "ds_configs/zero2.json",
        "tools/prepare_data.py",
    ):
        assert f"raphael_dist/assets/{name}" in names
    assert not [name for name in names if name.startswith(("tests", "tools", "setup"))]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_the_commands_work_from_any_folder(installed: Path, tmp_path: Path) -> None:
    assert run(installed, tmp_path, "raphael-config", "optim.lr").startswith("optim.lr=0.0001")
    assert run(installed, tmp_path, "raphael-slurm").strip() == f"{installed}/raphael_dist/assets/slurm"
    plan = run(installed, tmp_path, "raphael-train", "--config", "emoji-tiny", "--plan")
    assert f"vae: {installed}/raphael_dist/assets/data/vae-emoji" in plan
    run(installed, tmp_path, "raphael-train", "--config", "emoji-tiny", "--dry-run")
    assert "--from" in run(installed, tmp_path, "raphael-convert", "--help")
    assert re.search(r"raphael_dist \S+,", run(installed, tmp_path, "python", "-m", "raphael_dist", "--version"))


def test_demo_trains_samples_and_is_inspected_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    # Pixels instead of latents: what takes long on two busy cores is the autoencoder, which the dry run above has found.
    pixels = ["image.vae=none", "model.latent_channels=3", "image.buckets=[[16,16]]"]
    sizes = [
        *pixels,
        "model.channels=[32,32]",
        "model.attention=[true,false]",
        "model.expert_width=[32,32]",
        "train.global_batch_size=2",
    ]
    steps = ["train.max_steps=1", "train.micro_batch_size=2", "data.val_shards=[]", "sample.prompts=[]"]
    zero = ["--deepspeed_config", "ds_configs/zero1.json"]
    run(installed, tmp_path, "raphael-train", "--config", "emoji-tiny", *zero, "run.dir=run", *sizes, *steps)
    run(installed, tmp_path, "raphael-sample", "--checkpoint", "run", "--prompt", "a sun", "--steps", "1", "--out", "x.png")
    assert (tmp_path / "x.png").is_file()
    run(installed, tmp_path, "raphael-inspect", "run")


def test_slurm_scripts_run_the_installed_package_where_submitted(installed: Path, tmp_path: Path) -> None:
    script = f"{installed}/raphael_dist/assets/slurm/train_raphael.sh"
    settings = {"DRY_RUN": "1", "PYTHON": "python3", "CONFIG": "raphael-3b", "SLURM_SUBMIT_DIR": str(tmp_path)}
    copy = tmp_path / "slurm_script"  # Slurm runs a copy of the script
    copy.write_text(Path(script).read_text())
    for path, more in ((script, {}), (str(copy), {}), (str(copy), {"RAPHAEL_HOME": f"{installed}/raphael_dist/assets"})):
        lines = run(installed, tmp_path, "bash", path, **settings, **more).splitlines()
        assert lines[0] == "mkdir -p runs/raphael/checkpoints "
        assert f"{installed}/raphael_dist/train.py --config raphael-3b" in lines[-1]
        assert any(f"{installed}/raphael_dist/assets/tools/check_cluster.py --out" in line for line in lines)
