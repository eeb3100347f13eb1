"""Commands of the scripts under slurm/, without Slurm, and the verdict over the preflight's reports."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raphael_dist.cluster import host_devices
from raphael_dist.cluster.host_devices import network
from raphael_dist.cluster.preflight import Probe, rounds
from raphael_dist.cluster.preflight_report import judge, read_reports
from raphael_dist.config.schema import load_config
from raphael_dist.errors import UserError
from raphael_dist.runtime.ranks import Ranks, discover
from tests.data.features.test_encoders import save_clip
from tests.lib.launch import ROOT
from tests.training.test_training import SMALL
from tools import check_cluster, prepare_data

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))


def dry(script: str, *arguments: str, **env: str) -> list[str]:
    """Return the commands that a script would run."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / script), *arguments],
        env={**clean, "DRY_RUN": "1", "PYTHON": "python3", "CONFIG": "emoji-tiny", **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_reports_nothing() -> None:
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, [*SCRIPTS, *(ROOT / "docs" / "examples").glob("*.sh")])],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout


def test_settings_become_arguments_and_each_gpu_a_rank() -> None:
    node = {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "64", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_ID": "123"}
    settings = {"CONFIG": "raphael-3b", "OVERRIDES": "a.b=1  c.d=*", "RUN_DIR": "my runs/x", "PREFLIGHT": "0"}
    command = dry("train_raphael.sh", "--max-time", "1:00:00", "e.f=$(id)", **node, **settings)[-1]
    assert "--nodes=4 --cpus-per-task=8" in command
    assert "--ntasks=32 --ntasks-per-node=8" in command
    reference = r"run.dir=my\ runs/x a.b=1 c.d=\* --max-time 1:00:00 e.f=\$\(id\) "
    assert command.endswith("--config raphael-3b " + reference)
    chosen = dry("train_raphael.sh", **node, **settings, DS_CONFIG="my zero.json")[-1]
    assert r"--config raphael-3b --deepspeed_config my\ zero.json run.dir" in chosen
    restarted = dry("train_raphael.sh", **node, **settings, SLURM_RESTART_COUNT="1")[-1]
    assert "run.lock_wait_s=120" in restarted
    spares = dry("train_raphael.sh", **node, **settings | {"PREFLIGHT": "1"}, SPARE_NODES="1")
    assert any("--ntasks=32" in line and "check_cluster.py --out" in line for line in spares)
    assert "--ntasks=24" in spares[-1]


@pytest.mark.parametrize("script", ["train_raphael.sh", "prepare_data.sh"])
def test_job_passes_one_configuration_or_none(script: str) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"DRY_RUN": "1", "PYTHON": "python3"}
    command = ["bash", str(ROOT / "slurm" / script), "--config", "a"]
    done = subprocess.run(command, env={**clean, "CONFIG": "b"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "CONFIG=b and --config must not" in done.stderr
    assert "--config" not in dry(script, CONFIG="", PREFLIGHT="0")[-1]  # the default of the program
    chosen = dry(script, "--config", "raphael-3b", CONFIG="", PREFLIGHT="0")[-1]
    assert "--config raphael-3b" in chosen
    assert "emoji-tiny" not in chosen


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is refused by Open MPI")
def test_mpirun_as_root_is_refused_without_retries() -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_"))}
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "CONFIG": "emoji-tiny", "PYTHON": "python3"}
    command = ["bash", str(ROOT / "slurm" / "train_raphael.sh")]
    done = subprocess.run(command, env={**clean, **job, "LAUNCHER": "mpirun"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "LAUNCHER=mpirun requires a user other than root" in done.stderr


def test_run_dir_comes_from_command_line_then_yaml(tmp_path: Path) -> None:
    """The script counts restarts by its checkpoints. Without a run.dir in the file the job's name is used."""
    for text, reference in (("run: {dir: runs/my own}", r"runs/my\ own"), ("data: {cache_dir: /tmp/c}", "runs/raphael")):
        (tmp_path / "my.yaml").write_text(f"base: emoji-tiny\n{text}\n")
        for config in ({"CONFIG": str(tmp_path / "my.yaml")}, {"CONFIG": ""}):
            arguments = () if config["CONFIG"] else ("--config", str(tmp_path / "my.yaml"))
            command = dry("train_raphael.sh", *arguments, PREFLIGHT="0", PYTHON=sys.executable, **config)
            assert command[0] == f"mkdir -p {reference}/checkpoints "
            assert f"run.dir={reference}" in command[-1]
    other = dry("train_raphael.sh", CONFIG=str(tmp_path / "my.yaml"), PREFLIGHT="0", RUN_DIR="elsewhere")
    assert "run.dir=elsewhere" in other[-1]


def test_the_script_repeats_no_key_that_its_arguments_give() -> None:
    """The trainer refuses a repeated key."""
    inputs = ("run.dir=mine", "run.lock_wait_s=5")
    for arguments, env in ((inputs, {}), ((), {"OVERRIDES": " ".join(inputs)})):
        command = dry("train_raphael.sh", *arguments, PREFLIGHT="0", SLURM_RESTART_COUNT="1", **env)
        assert command[0] == "mkdir -p mine/checkpoints "
        assert [command[-1].count(key) for key in ("run.dir=", "run.lock_wait_s=")] == [1, 1]


@pytest.mark.parametrize(
    ("launcher", "expected"),
    {
        "torchrun": "-m torch.distributed.run --node_rank",
        "deepspeed": "-m deepspeed.launcher.runner --node_rank",
        "mpirun": "mpirun -np 16 --map-by ppr:8:node",
    }.items(),
)
def test_each_launcher_gets_its_own_command(launcher: str, expected: str) -> None:
    node = {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NUM_NODES": "2", "PREFLIGHT": "0"}
    assert expected in dry("train_raphael.sh", LAUNCHER=launcher, **node)[-1].replace("\\", "")


NUMBERS = {
    "train_raphael.sh": [
        "MASTER_PORT", "SLURM_RESTART_COUNT", "SLURM_CPUS_ON_NODE", "SLURM_NTASKS", "SLURM_JOB_NUM_NODES", "SPARE_NODES",
        "MAX_RESTARTS", "PREFLIGHT_MINUTES", "TASKS_PER_NODE", "SLURM_GPUS_ON_NODE", "SLURM_JOB_ID",
    ],
    "prove.sh": ["TASKS_PER_NODE", "SLURM_JOB_NUM_NODES"],
    "prepare_data.sh": [f"SLURM_ARRAY_TASK_{name}" for name in ("MIN", "ID", "STEP", "COUNT")],
}  # fmt: skip


@pytest.mark.parametrize(("script", "name"), [(script, name) for script, names in NUMBERS.items() for name in names])
def test_invalid_number_is_refused_and_not_executed(tmp_path: Path, script: str, name: str) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    clean |= {"DRY_RUN": "1", "PYTHON": "python3", "CONFIG": "emoji-tiny"}
    for value in (f"PATH[$(touch {tmp_path}/canary)]", "1; touch canary", "-1", "0x10", "99999999999"):
        env = {**clean, "SLURM_JOB_ID": "5", name: value, "RAPHAEL_HOME": str(ROOT)}
        done = subprocess.run(["bash", str(ROOT / "slurm" / script)], env=env, capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "must be a whole number" in done.stderr
        assert not list(tmp_path.iterdir())


def test_number_can_start_with_a_zero() -> None:
    node = {"TASKS_PER_NODE": "08", "SLURM_JOB_NUM_NODES": "09", "SLURM_RESTART_COUNT": "08", "SLURM_CPUS_ON_NODE": "064"}
    assert "--nodes=9 --cpus-per-task=8" in dry("train_raphael.sh", **node, PREFLIGHT="0")[-1]


def job(tmp_path: Path, python: str, squeue: str = "", scontrol: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run the batch script as job 7 with dummies for Python and Slurm's commands; scontrol records its calls."""
    tools = {"python": python, "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"', "squeue": squeue}
    for name, text in {**tools, "scontrol": f'{scontrol}\n[[ $1 != requeue ]] || touch "{tmp_path}/requeued"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}"
    }
    inputs = {"SLURM_JOB_ID": "7", "RUN_DIR": str(tmp_path / "run"), "PYTHON": str(tmp_path / "python"), "PREFLIGHT": "0"}
    inputs["CONFIG"] = "emoji-tiny"
    command = ["bash", str(ROOT / "slurm" / "train_raphael.sh")]
    return subprocess.run(command, env={**clean, **inputs, **env}, capture_output=True, text=True, timeout=60)


def test_only_checkpoints_that_the_trainer_names_count_as_progress(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-00000010").mkdir(parents=True)
    (tmp_path / "run" / ".restarts").write_text("5 step-00000010\n")
    for name in ("step-00000020-mine", "step-9", "step-zzz"):
        (folder / name).mkdir()
    (folder / "step-00000030").write_text("a file")
    done = job(tmp_path, "exit 9")
    assert done.returncode == 9
    assert "5 restarts brought no newer checkpoint (newest: step-00000010)" in done.stdout
    (folder / "step-00000040").mkdir()
    assert "restart 1 with checkpoint step-00000040" in job(tmp_path, "exit 9").stdout


def test_no_restart_if_restarts_cannot_be_counted(tmp_path: Path) -> None:
    (tmp_path / "run" / ".restarts.new").mkdir(parents=True)  # nothing can be written there, as on a full disk
    done = job(tmp_path, "exit 9")
    assert done.returncode == 4
    assert "Free some space, and submit it again" in done.stdout
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("left", "code"), [("0:58", 2), ("5:00", 2), ("10:00:00", 0), ("1-00:00:00", 0), ("INVALID", 0)])
def test_time_limit_without_training_time_is_refused(tmp_path: Path, left: str, code: int) -> None:
    # Slurm signals the ranks alone, and by hand one may signal the script as well.
    for python in ("trap '' USR1; kill -USR1 $PPID; exit 75", "exit 75"):
        done = job(tmp_path, python, squeue=f"echo {left}")
        assert done.returncode == code
        assert ("give a longer --time" in done.stdout.replace("\n", " ")) == (code == 2)
        assert ("stopped, with nothing new to save. The job is requeued" in done.stdout) == (code == 0)
        assert (tmp_path / "requeued").exists() == (code == 0)
    trained = "mkdir -p $(dirname $0)/run/checkpoints/step-00000001; trap '' USR1; kill -USR1 $PPID; exit 75"
    assert job(tmp_path, trained, squeue=f"echo {left}").returncode == 0


def test_time_limit_requeues_although_a_rank_ignores_sigterm(tmp_path: Path) -> None:
    once = (
        f'if mkdir "{tmp_path}/$(basename $0).called" 2>/dev/null; then kill -KILL $$; fi'  # a busy controller, or a signal
    )
    python = "trap '' TERM; kill -TERM $PPID; sleep 0.2; kill -TERM $PPID; for i in {1..12}; do sleep 1; done; exit 3"
    done = job(tmp_path, python, squeue=f"{once}; kill -TERM $$; echo TimeLimit", scontrol=once)
    assert done.returncode == 0, done.stdout
    assert "the time limit came before the run could save. The job is requeued (restart 1" in done.stdout
    assert (tmp_path / "requeued").exists()


def test_exit_code_is_kept_if_a_signal_arrives_at_the_end(tmp_path: Path) -> None:
    python = "trap '' USR1; for i in 1 2 3; do kill -USR1 $PPID; done; exit 3"
    assert [job(tmp_path, python).returncode for _ in range(10)] == [3] * 10


@pytest.mark.parametrize("text", ["PATH[$(touch canary)]", "08", "1 2", ""])
def test_exit_file_without_a_number_is_ignored(tmp_path: Path, text: str) -> None:
    done = job(tmp_path, f"echo '{text}' >\"$RAPHAEL_EXIT_FILE\"; exit 3")
    assert done.returncode == (0 if text == "08" else 3), done.stdout  # 8 is a crash: requeued
    assert not (ROOT / "canary").exists()


def test_error_is_reported_when_rank0_is_killed(tmp_path: Path) -> None:
    why = "printf 'run.dir: given $(touch canary), \\\\n is wrong\\n' >\"$RAPHAEL_EXIT_FILE.why\""
    done = job(tmp_path, f'echo 2 >"$RAPHAEL_EXIT_FILE"; {why}; exit 15')
    assert done.returncode == 2
    assert r"exit code 2. A restart would not help: run.dir: given $(touch canary), \n is wrong" in done.stdout
    assert not (ROOT / "canary").exists()


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


@pytest.mark.parametrize("script", ["sample_raphael.sh", "prove.sh"])
def test_job_uses_every_gpu_of_its_nodes(script: str) -> None:
    node = {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "64", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "9"}
    (command,) = dry(script, "--config", "a b", **node)
    kill = "1" if script.startswith("sample") else "0"  # of prove's ranks those that remain report the others
    expected = (
        f"srun --nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=8 --mem=0 --kill-on-bad-exit={kill} python3 -m "
    )
    assert command.startswith(expected)
    assert command.endswith(r"--config a\ b ")
    (alone,) = dry(script)
    assert alone.startswith("python3 -m raphael_dist")
    (crowded,) = dry(script, **node | {"SLURM_CPUS_ON_NODE": "4"})
    assert "--cpus-per-task=1 --mem=0 --kill-on-bad-exit=" + kill + " --overcommit " in crowded


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
    with pytest.raises(UserError, match=r"SLURM_NTASKS='8;x' \(set by srun\) must be a number"):
        discover({**srun, "SLURM_NTASKS": "8;x"})


def report(rank: int, **changes: object) -> dict:
    """Return the report of a healthy rank on its own node."""
    device = {"name": "cpu", "network": "eth0", "versions": {"torch": "2.13.0"}}
    others = {f"n{i}": 1.0 for i in range(4) if i != rank}
    actual = {"rank": rank, "node": f"n{rank}", "problems": [], "joined": True, "device": device, "clock": 0.0}
    return {**actual, "data": {"mb_per_s": 100}, "checkpoints": {"mb_per_s": 50, "free_gib": 9}, "pairs": others, **changes}


def problem(phase: str, what: str) -> list[dict[str, str]]:
    return [{"phase": phase, "what": what, "fix": "mend it"}]


NODES = ["n0", "n1", "n2", "n3"]


@pytest.mark.parametrize(
    ("changed", "node", "text"),
    [
        ({2: None}, "n2", "no report"),
        ({1: {"problems": problem("data", "unreadable")}}, "n1", "unreadable; mend it"),
        ({3: {"clock": 60.0}}, "n3", "differs by +60.0 s"),
        ({3: {"device": {"versions": {"torch": "2.12.0"}}}}, "n3", "torch is 2.12.0, on other nodes 2.13.0"),
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
def test_preflight_names_only_the_faulty_node(changed: dict, node: str, text: str) -> None:
    reports = [report(rank, **changed.get(rank) or {}) for rank in range(4) if changed.get(rank, {}) is not None]
    verdict = judge(reports, 4, NODES)
    assert list(verdict.faults) == [node]
    assert text in verdict.faults[node][0]
    assert not verdict.everywhere


def test_preflight_states_the_difference_of_two_clocks_once() -> None:
    verdict = judge([report(0), report(1, clock=60.0)], 2, NODES[:2])
    assert list(verdict.faults) == ["n1"]
    assert "its clock differs by +60.0 s from that of n0" in verdict.faults["n1"][0]


@pytest.mark.parametrize("slurm", [True, False])
def test_preflight_names_gpus_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: bool) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    monkeypatch.setattr(host_devices, "NVIDIA_DEVICE", tmp_path / "nvidia0")
    host_devices.check_gpus_are_usable()  # there is none
    if slurm:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    else:
        (tmp_path / "nvidia0").touch()
    with pytest.raises(UserError, match=r"Slurm gave this job 8" if slurm else "nvidia0 exists"):
        Probe(load_config("emoji-tiny"), Ranks(0, 1, 0, 1), tmp_path)._identity()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    host_devices.check_gpus_are_usable()


def test_preflight_leaves_a_missing_data_set_to_the_training(tmp_path: Path) -> None:
    """`sbatch slurm/train_raphael.sh` without arguments: the training lists all that is missing at once."""
    assert Probe(load_config("raphael-3b"), Ranks(0, 1, 0, 1), tmp_path)._data() == {}
    with pytest.raises(UserError, match="missing"):
        Probe(load_config("raphael-3b", [f"data.shards={tmp_path}/a.tar"]), Ranks(0, 1, 0, 1), tmp_path)._data()


def test_preflight_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert "must contain reports of ranks" in capsys.readouterr().err
    with pytest.raises(UserError):
        read_reports(tmp_path)


def test_every_two_nodes_are_partners_once() -> None:
    for count in (1, 2, 3, 4, 7, 8):
        members = [10 * i for i in range(count)]
        met = [tuple(sorted(pair)) for partners in rounds(members) for pair in partners.items()]
        assert sorted(set(met)) == [(a, b) for i, a in enumerate(members) for b in members[i + 1 :]]
        assert len(met) == count * (count - 1)
        assert all(partners[b] == a for partners in rounds(members) for a, b in partners.items())


def test_network_names_interface_and_address() -> None:
    assert network("127.0.0.1") == "lo 127.0.0.1"
    assert network("no such host").startswith("no route to no such host: ")


def test_parts_prepare_every_shard_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [f"data.cache_dir={tmp_path}", "image.vae=none", "image.buckets=[[8,8]]", "model.latent_channels=3"]
    base += [f"text.encoder={save_clip(tmp_path / 'clip', '[pad]')}", "text.max_tokens=6", "model.text_width=32"]
    base += ["--config", "emoji-tiny"]
    for part, built in ((1, 0), (0, 1), (0, 0)):  # one shard of each kind, which is part 0's
        assert prepare_data.main(["--part", str(part), "--parts", "2", *base]) == 0
        assert f"data.shards: {built} of 1 shard" in capsys.readouterr().out
    assert prepare_data.main(["--part", "2", "--parts", "2", *base]) == 2
    assert "--part=2 must be from 0 to 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed (Debian: openmpi-bin)")
def test_mpirun_starts_two_ranks_through_mpi4py(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {k: v for k, v in os.environ.items() if not k.startswith("MASTER_")} | root | {"PYTHONPATH": paths}
    local = [f"run.dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache", "train.max_steps=2", "sample.prompts=[]"]
    command = ["mpirun", "-np", "2", "--oversubscribe", sys.executable, "raphael_dist/train.py", *SMALL, *local]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 ranks on cpu" in (tmp_path / "run" / "train.log").read_text()
