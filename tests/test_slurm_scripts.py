"""What the scripts under slurm/ would do, without a Slurm; and the verdict over the preflight's reports."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raphael_dist.cluster.preflight import rounds
from raphael_dist.cluster.preflight_report import judge, read_reports
from raphael_dist.errors import UserError
from raphael_dist.parallel.ranks import Ranks, discover
from tests.launch import ROOT
from tests.test_training import SMALL
from tools import check_cluster, prepare_data

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))


def dry(script: str, *arguments: str, **env: str) -> list[str]:
    """Return the commands that a script would run."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / script), *arguments],
        env={**clean, "DRY_RUN": "1", "PYTHON": "python3", **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_settings_become_arguments_and_each_gpu_a_rank() -> None:
    node = {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "64", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_ID": "123"}
    settings = {"CONFIG": "raphael-3b", "OVERRIDES": "a.b=1  c.d=*", "RUN_DIR": "my runs/x", "PREFLIGHT": "0"}
    command = dry("train_raphael.sh", "--max-time", "1:00:00", "e.f=$(id)", **node, **settings)[-1]
    assert "--nodes=4 --cpus-per-task=8" in command
    assert "--ntasks=32 --ntasks-per-node=8" in command
    wanted = r"run.dir=my\ runs/x a.b=1 c.d=\* --max-time 1:00:00 e.f=\$\(id\) "
    assert command.endswith("--config raphael-3b --deepspeed_config ds_configs/zero1.json " + wanted)
    restarted = dry("train_raphael.sh", **node, **settings, SLURM_RESTART_COUNT="1")[-1]
    assert "run.lock_wait_s=120" in restarted
    spares = dry("train_raphael.sh", **node, **settings | {"PREFLIGHT": "1"}, SPARE_NODES="1")
    assert any("--ntasks=32" in line and "check_cluster.py --out" in line for line in spares)
    assert "--ntasks=24" in spares[-1]


@pytest.mark.parametrize(
    ("launcher", "expected"),
    {
        "torchrun": "-m torch.distributed.run --node_rank",
        "deepspeed": "-m deepspeed.launcher.runner --node_rank",
        "mpirun": "mpirun -np 16 --map-by ppr:8:node",
    }.items(),
)
def test_each_launcher_is_called_its_own_way(launcher: str, expected: str) -> None:
    node = {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NUM_NODES": "2", "PREFLIGHT": "0"}
    assert expected in dry("train_raphael.sh", LAUNCHER=launcher, **node)[-1].replace("\\", "")


def test_the_other_scripts_pass_their_arguments_on() -> None:
    task = {f"SLURM_ARRAY_TASK_{name}": value for name, value in {"MIN": "1", "ID": "7", "STEP": "2", "COUNT": "4"}.items()}
    assert dry("prepare_data.sh", "x.y=a b", **task) == [
        r"python3 tools/prepare_data.py --config emoji-tiny --part 3 --parts 4 x.y=a\ b "
    ]
    assert dry("sample_raphael.sh", "--prompt", "a b") == [
        r"python3 -m raphael_dist.sample --checkpoint runs/raphael --prompt a\ b "
    ]
    assert dry("convert_checkpoint.sh", "--help") == ["python3 tools/convert_checkpoint.py --help "]
    chain = dry("chain.sh", "3", "--nodes=2", "slurm/train_raphael.sh", RUN_DIR="x")
    assert chain[1:] == [
        line.replace("--nodes", f"--dependency=afterany:JOB{i} --nodes") for i, line in enumerate([chain[0]] * 2)
    ]


def test_ranks_are_read_from_every_launcher() -> None:
    srun = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS_PER_NODE": "4",
    }
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    mpirun = {f"OMPI_COMM_WORLD_{name}": value for name, value in zip(names, "5814", strict=True)}
    assert discover(srun) == Ranks(5, 8, 1, 4, "srun")
    assert discover(mpirun) == Ranks(5, 8, 1, 4, "mpirun")
    assert discover({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Ranks()  # a batch shell is no rank
    with pytest.raises(UserError, match="SLURM_NTASKS is '8;x' under srun"):
        discover({**srun, "SLURM_NTASKS": "8;x"})


def report(rank: int, **changes: object) -> dict:
    """Return what a healthy rank on a node of its own reports."""
    device = {"name": "cpu", "network": "eth0", "versions": {"torch": "2.13.0"}}
    others = {f"n{i}": 1.0 for i in range(4) if i != rank}
    found = {"rank": rank, "node": f"n{rank}", "problems": [], "joined": True, "device": device, "clock": 0.0}
    return {**found, "data": {"mb_per_s": 100}, "checkpoints": {"mb_per_s": 50, "free_gib": 9}, "pairs": others, **changes}


def problem(phase: str, what: str) -> list[dict[str, str]]:
    return [{"phase": phase, "what": what, "fix": "mend it"}]


NODES = ["n0", "n1", "n2", "n3"]


@pytest.mark.parametrize(
    ("changed", "node", "text"),
    [
        ({2: None}, "n2", "no report"),
        ({1: {"problems": problem("data", "unreadable")}}, "n1", "unreadable; mend it"),
        ({3: {"clock": 60.0}}, "n3", "+60.0 s off"),
        ({3: {"device": {"versions": {"torch": "2.12.0"}}}}, "n3", "torch is 2.12.0, elsewhere 2.13.0"),
        ({0: {"problems": problem("all_reduce", "wrong sum")}}, "n0", "wrong sum"),
        # Who could not join is at fault, not those that waited.
        (
            {0: {"problems": problem("clock", "timed out")}, 2: {"joined": False, "problems": problem("group", "no route")}},
            "n2",
            "no route",
        ),
        # Nor those that waited for one that never came.
        ({1: None, 0: {"joined": False, "problems": problem("group", "timed out")}}, "n1", "no report"),
    ],
)
def test_the_preflight_names_the_node_that_is_at_fault_and_no_other(changed: dict, node: str, text: str) -> None:
    reports = [report(rank, **changed.get(rank) or {}) for rank in range(4) if changed.get(rank, {}) is not None]
    verdict = judge(reports, 4, NODES)
    assert list(verdict.faults) == [node]
    assert text in verdict.faults[node][0]
    assert not verdict.everywhere


def test_the_preflight_passes_leaves_out_or_fails_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def code(reports: list[dict], need: int) -> int:
        for path in tmp_path.glob("*"):
            path.unlink()
        for r in reports:
            (tmp_path / f"rank-{r['rank']:05d}.json").write_text(json.dumps(r))
        return check_cluster.main(["--judge", str(tmp_path), "--ranks", "4", "--need", str(need), "--nodes", *NODES])

    assert code([report(rank) for rank in range(4)], 4) == 0
    slow = [report(r, pairs={f"n{o}": 0.1 if 3 in (r, o) else 1.0 for o in range(4) if o != r}) for r in range(4)]
    assert code(slow, 4) == 0
    assert "warning: n3 is slow to most other nodes" in capsys.readouterr().out
    broken = [report(rank, problems=problem("data", "unreadable") if rank == 1 else []) for rank in range(4)]
    assert code(broken, 4) == 1
    assert "exclude n1" in capsys.readouterr().out
    assert code(broken, 3) == check_cluster.EXIT_LEFT_OUT
    assert (tmp_path / "good-nodes").read_text() == "n0\nn2\nn3\n"
    assert code([report(rank, problems=problem("data", "unreadable")) for rank in range(4)], 1) == 2
    assert code([], 4) == 2
    assert "no rank left a report" in capsys.readouterr().err
    with pytest.raises(UserError):
        read_reports(tmp_path)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_every_two_nodes_meet_once(count: int) -> None:
    members = [10 * i for i in range(count)]
    met = [tuple(sorted(pair)) for partners in rounds(members) for pair in partners.items()]
    assert sorted(set(met)) == [(a, b) for i, a in enumerate(members) for b in members[i + 1 :]]
    assert len(met) == count * (count - 1)
    assert all(partners[b] == a for partners in rounds(members) for a, b in partners.items())


def test_parts_prepare_every_shard_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [f"data.cache_dir={tmp_path}", "image.encoder=none", "image.buckets=[[8,8]]", "model.latent_channels=3"]
    for part, built in ((1, 0), (0, 1), (0, 0)):  # one shard of each kind, which is part 0's
        assert prepare_data.main(["--part", str(part), "--parts", "2", *base]) == 0
        assert f"data.shards: {built} of 1 shards" in capsys.readouterr().out
    assert prepare_data.main(["--part", "2", "--parts", "2", *base]) == 2
    assert "--part: given 2; allowed 0 to 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed (Debian: openmpi-bin)")
def test_mpirun_alone_starts_two_ranks_that_meet_by_mpi4py(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {k: v for k, v in os.environ.items() if not k.startswith("MASTER_")} | root | {"PYTHONPATH": paths}
    mine = [f"run.dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache", "train.max_steps=2", "sample.prompts=[]"]
    command = ["mpirun", "-np", "2", "--oversubscribe", sys.executable, "raphael_dist/train.py", *SMALL, *mine]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 ranks on cpu" in (tmp_path / "run" / "train.log").read_text()
