"""Machines and launchers: closed streams, umasks, memory during a save, wrong answers of servers, endless expansions."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from subprocess import PIPE
from typing import Any

import psutil

from raphael_dist.errors import EXIT_HUNG, EXIT_NOT_SAVED
from raphael_dist.text import counted
from tests.lib.forks import NO_GPU
from tests.lib.launch import ROOT, rank_env
from tests.lib.servers import Faults, http_files
from tests.torture.faults_commands import command, judge, limited
from tests.torture.faults_data import DataTrial, descendants
from tests.torture.kinds import fault
from tests.torture.trial import SLOW_MACHINE, WORLD, Outcome, Trial, refused, survived


@fault("standard streams closed at the start", "surroundings", "data")
def closed_streams(trial: Trial) -> Outcome:
    """Ranks start a new Python, which makes its streams when it starts."""
    case = DataTrial(trial)
    at = case.begin()
    closed = [trial.draw.sample([0, 1, 2], trial.draw.randint(1, 3)) for _ in range(WORLD)]
    base, ranks = rank_env(WORLD), []
    for rank, numbers in enumerate(closed):
        redirections = " ".join(f"{number}{'<' if number == 0 else '>'}&-" for number in numbers)
        words = ["bash", "-c", f'exec "$@" {redirections}', "bash", sys.executable, "raphael_dist/train.py"]
        env = {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen([*words, *case.arguments(trial.run)], cwd=ROOT, env=env, stdout=PIPE, stderr=PIPE))
    try:
        outputs = [b"".join(rank.communicate(timeout=SLOW_MACHINE)).decode() for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    codes = [rank.returncode for rank in ranks]
    assert codes == [0] * WORLD, f"exit codes {codes}:\n{outputs}\n{trial.log}"
    trial.check_equals_oracle()
    return survived(f"{closed}, from step {at}")


@fault("a feature cache of a team under another umask", "data", "data")
def umask(trial: Trial) -> Outcome:
    case = DataTrial(trial)
    case.begin(at=0)
    mask = trial.draw.choice([0o002, 0o007, 0o022, 0o027])
    cache = case.home / "fresh"
    fresh = f"data.cache_dir={cache}"
    codes = case.train(trial.run, None, fresh, around={rank: {"umask": mask} for rank in range(WORLD)})
    assert codes == [0] * WORLD, f"exit codes {codes}:\n{trial.output}"
    trial.check_equals_oracle()
    files = [path for path in cache.rglob("*") if path.is_file()]
    wrong = [str(path) for path in files if path.stat().st_mode & 0o777 != 0o666 & ~mask]
    assert files
    assert not wrong, f"other permissions than those of umask {mask:03o}: {wrong}"
    return survived(f"umask {mask:03o}: {counted(len(files), 'file')}")


@fault("no memory for a save", "surroundings", "data")
def memory_in_save(trial: Trial) -> Outcome:
    case = DataTrial(trial)
    at = case.begin(at=trial.draw.choice([0, 2, 4]))
    rank, where = trial.draw.randrange(WORLD), trial.draw.choice(["prepare", "take", "begin", "kill"])
    arguments = [a for a in case.arguments(trial.run) if not a.startswith("run.hang_timeout_s")]
    arguments += ["run.hang_timeout_s=10", "checkpoint.background=false"]
    codes = trial.forks.run(
        trial.outputs, WORLD, 300, None, worker="short_of_memory", rank=rank, where=where, arguments=arguments
    )
    if where in ("prepare", "take"):
        assert codes == [EXIT_NOT_SAVED] * WORLD, f"exit codes {codes}:\n{trial.output}"
    else:
        assert codes[1 - rank] in (EXIT_HUNG, 1, -9), f"exit codes {codes}:\n{trial.output}"
        assert codes[rank] in (1, -9), f"exit codes {codes}:\n{trial.output}"
    assert where == "kill" or "memory" in trial.output + trial.log, "memory was not named"
    if where in ("prepare", "take"):  # training continued without saving, as on a full disk
        newest = trial.newest()
        assert newest >= at, f"the checkpoint of step {at} is gone"
    else:
        newest = trial.check_lost_at_most_an_interval(at)
    case.finish()
    return survived(f"{where} on rank {rank}, exit codes {codes}; continued from step {newest}")


@fault("a server of shards that gives wrong answers", "data", "data")
def server_lies(trial: Trial) -> Outcome:
    """The run is refused or replaces samples; once the server is sound, all samples are used."""
    case = DataTrial(trial)
    case.begin(at=0)
    how = trial.draw.choice(["endless", "packed", "other bytes", "other size", "to a file", "in a loop", "503"])
    victim, faults = trial.draw.choice(case.shards).name, Faults()
    faults.of[victim] = [how] * 10_000
    with http_files(case.home / "shards", faults) as address:
        shards = f"data.shards=[{','.join(f'{address}/{path.name}' for path in case.shards)}]"
        more = (shards, f"data.shard_cache={case.home}/fetched", f"data.cache_dir={case.home}/fresh", "data.retries=1")
        codes = case.train(trial.folder / "first", None, *more, "data.timeout_s=5")
        line = trial.check_refused(codes) if any(codes) else "the samples of other shards were used"
        assert faults.sent < 256 << 20, f"{faults.sent >> 20} MiB were read of an answer without an end"
        faults.of.clear()
        codes = case.train(trial.run, None, *more)
    assert codes == [0] * WORLD, f"exit codes {codes}:\n{trial.output}"
    assert "24 images" in trial.output, f"samples are lost for good:\n{trial.output}"
    return survived(f"{how}: {line.replace(str(case.home), '')[:140]}; all samples with the sound server")


@fault("a launcher that is killed or terminated", "kills", "data")
def launcher_killed(trial: Trial) -> Outcome:
    case = DataTrial(trial)
    at, wait = case.begin(at=0), trial.draw.uniform(0.0, 0.5)
    launcher = trial.draw.choice(["torch.distributed.run", "deepspeed.launcher.runner"])
    number = trial.draw.choice([signal.SIGKILL, signal.SIGTERM])
    ranks = ["--standalone", f"--nproc_per_node={WORLD}"] if "torch" in launcher else [f"--num_gpus={WORLD}"]
    words = [sys.executable, "-m", launcher, *ranks, "raphael_dist/train.py", *case.arguments(trial.run)]
    environment = {**os.environ, **NO_GPU, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(trial.folder / "launcher.txt", "w") as output:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=output, stderr=output)
    deadline = time.monotonic() + 200
    while process.poll() is None and not (trial.run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(wait)
    family = descendants(process.pid)
    process.send_signal(number)
    left = psutil.wait_procs(family, timeout=90)[1]
    for rank in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()
    process.kill()
    process.wait()
    assert not left, "ranks continue without their launcher"
    newest = trial.check_lost_at_most_an_interval(at)
    assert newest, f"nothing was saved:\n{(trial.folder / 'launcher.txt').read_text()[-3000:]}"
    case.finish()
    return survived(f"{number.name} to {launcher} after {wait:.1f} s; on from step {newest}")


@fault("a shard pattern that expands without end", "settings", "commands")
def endless_pattern(trial: Trial) -> Outcome:
    pattern = trial.draw.choice(
        ["{a,b}" * 36, "{0..9}" * 12, "{0..999999999999}", "{a," * 500 + "}" * 500, "{" * 5000, "{a,{b,{c,d}}}" * 20]
    )
    line = judge(command(f"data.shards={trial.folder}/{pattern}.tar"), pattern)
    assert line, "the pattern was accepted"
    return refused(line.replace(str(trial.folder), "")[:160])


@fault("a pickle or a json that expands without end", "tools", "commands")
def endless_pickle(trial: Trial) -> Outcome:
    kind = trial.draw.choice(["shared", "deep", "json"])
    source = trial.folder / "source"
    if kind == "json":
        source.mkdir()
        (source / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": {"[" * 100_000}\n')
        words = ["tools/prepare_data.py", str(source), "--out", str(trial.folder / "out")]
    else:
        tree: Any = []
        for _ in range(trial.draw.randint(30, 60)):
            tree = [tree] * 8
        data = b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"." if kind == "deep" else pickle.dumps(tree, protocol=2)
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            (source / "global_step1").mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(source / "global_step1" / name, "w") as archive:
                archive.writestr("archive/data.pkl", data)
                archive.writestr("archive/version", "3\n")
        (source / "latest").write_text("global_step1")
        words = [
            "tools/convert_checkpoint.py",
            "--config=emoji-tiny",
            "--from",
            "auto",
            str(source),
            "--to",
            "canonical",
            str(trial.folder / "out"),
        ]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120, preexec_fn=limited, errors="replace"
    )
    assert done.returncode == 2, f"{kind}: exit code {done.returncode}\n{done.stderr[-2000:]}"
    assert not Path(trial.folder / "out").exists()
    line = judge(done, kind)
    return refused(f"{kind}: {(line or '').replace(str(trial.folder), '')[:140]}")
