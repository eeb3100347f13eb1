"""Hostile command lines, configuration files and batch-script variables; interrupted tools; unusual surroundings."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster.test_slurm_scripts import NUMBERS
from tests.lib.launch import ROOT, rank_env
from tests.torture.kinds import fault
from tests.torture.trial import SLOW_MACHINE, WORLD, Outcome, Trial, refused, survived

FIELDS = (
    "train.max_steps", "train.global_batch_size", "optim.lr", "optim.betas", "model.channels", "image.buckets", "run.dir",
    "run.seed", "run.init_from", "data.shards", "data.cache_dir", "text.encoder", "train.dtype", "sample.prompts", "nope.x",
    "model.nope", "diffusion.beta_end", "parallel.placement", "run.allow_change", "ema.decay",
)  # fmt: skip
VALUES = (
    "2020-99-99", "9" * 5000, "[" * 3000, "{" * 3000, "a\0b", "nan", ".inf", "-1", "1e999", "0x10",
    "!!python/object:os.system x",
    "!!binary zzz", "*a", "&a [*a]", "[[[[1]]]]", "null", "", "true", "\ud800", "a" * 100_000, "{a: 1, a: 2}", "- 1",
    "1:2:3",
    "0o17", "1_000", "'", '"', "%", "@", "`id`", "$(id)", "../../etc/passwd", "\x1b[2J", "2001-01-01 00:00:00", "~", "=",
    "<<: x", "? x", "[1, 2", "1e-400", "-0.0", "9223372036854775808",
)  # fmt: skip
LIMIT = 3 << 30


def limited() -> None:
    """Limit the memory and CPU time of a process."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))


def command(*arguments: str, timeout: float = 120, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the training command with --dry-run."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    preset = [] if "--config" in arguments else ["--config=emoji-tiny"]
    return subprocess.run(
        [sys.executable, str(ROOT / "raphael_dist/train.py"), "--dry-run", *preset, *arguments],
        env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout, preexec_fn=limited, errors="replace",
    )  # fmt: skip


def judge(done: subprocess.CompletedProcess[str], what: str) -> str | None:
    """Require a plan, or exit code 2 with one line for each mistake; return the first line."""
    if done.returncode == 0:
        return None
    assert done.returncode == 2, f"{what[:200]}: exit code {done.returncode}\n{done.stderr[-2000:]}"
    if done.stderr.startswith("usage:"):  # argparse
        assert done.stderr.count("\n") < 12, done.stderr
        return done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines, f"{what[:200]}: {done.stderr[-3000:]}"
    assert max(map(len, lines)) < 6000, f"{what[:200]}: {max(map(len, lines))} characters in a line"
    return lines[0]


@fault("invalid settings on the command line", "settings", "commands")
def overrides(trial: Trial) -> Outcome:
    lines, passed = [], 0
    for _ in range(8):
        name, value = trial.draw.choice(FIELDS), trial.draw.choice(VALUES)
        override = f"{name}={value}"
        if "\0" in override or "\ud800" in override:  # arguments cannot hold a NUL, a file can
            path = trial.folder / "override.yaml"
            section, field = name.split(".")
            path.write_text(f'{section}: {{{field}: "a\\0b"}}\n')
            line = judge(command("--config", str(path)), override)
        else:
            line = judge(command(override), override)
        lines += [line] if line else []
        passed += line is None
    assert not list(trial.folder.glob("canary"))
    return (
        refused(f"{len(lines)} of 8; e.g. {trial.draw.choice(lines)[:140]}") if lines else survived("all of them are valid")
    )


def bomb(trial: Trial) -> tuple[str, str]:
    """Return a kind and the text of a hostile YAML file."""
    draw = trial.draw
    kinds = {
        "aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
        + "data: {shards: *i}\n",
        "deep": "run: " + "[" * draw.choice([500, 5000, 50_000]),
        "deep maps": "".join(" " * i + f"k{i}:\n" for i in range(3000)),
        "python": "run: !!python/object/apply:os.system ['touch canary']\n",
        "itself": "run: &r {dir: *r}\n",
        "long number": f"train: {{max_steps: {'7' * 5000}}}\n",
        "long float": f"optim: {{lr: 0.{'3' * 300_000}}}\n",
        "date": "train: {max_steps: 2020-99-99}\n",
        "many keys": "".join(f"k{i}: 1\n" for i in range(20_000)),
        "list": "[1, 2]\n",
        "scalar": "train\n",
        "tabs": "train:\n\tmax_steps: 1\n",
        "two documents": "train: {max_steps: 1}\n---\ntrain: {max_steps: 2}\n",
        "sections": "train: 5\nmodel: [1]\nrun: null\n",
        "keys": "1: 2\n? [a, b]\n: c\ntrue: false\n",
        "noise": draw.randbytes(300).decode("latin-1"),
        "nul": 'run: {dir: "a\\0b"}\n',
        "anchors": "train: &a {max_steps: 1}\nmodel: *a\n",
    }
    kind = draw.choice(sorted(kinds))
    return kind, kinds[kind]


@fault("a hostile configuration file", "settings", "commands")
def yaml_files(trial: Trial) -> Outcome:
    lines = []
    for i in range(4):
        kind, text = bomb(trial)
        path = trial.folder / f"{i}.yaml"
        path.write_text(text)
        line = judge(command("--config", str(path), cwd=trial.folder), kind)
        assert line is None or "Traceback" not in line
        lines += [f"{kind}: {line.replace(str(trial.folder), '')[:100]}"] if line else []
    assert not (trial.folder / "canary").exists(), "code in a file was run"
    return refused(lines[0]) if lines else survived("all of them are valid")


@fault("a batch-script variable that would run code", "settings", "commands")
def arithmetic(trial: Trial) -> Outcome:
    canary, line = trial.folder / "canary", ""
    for _ in range(4):
        script, names = trial.draw.choice(sorted(NUMBERS.items()))
        name = trial.draw.choice(names)
        attack = trial.draw.choice(
            [f"PATH[$(touch {canary})]", f"a[`touch {canary}`]", f"1+$(touch {canary})", "08x", "1e3", " 1", "1 2", "٣",
             "-5",
             f"x={canary}", "9" * 40, "${IFS}", "1\n2", "0x1F", "2#101", "BASH_VERSINFO", "RANDOM", "_", "@", "*"]
        )  # fmt: skip
        clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        env = {**clean, "DRY_RUN": "1", "PYTHON": "python3", "SLURM_JOB_ID": "5", name: attack, "RAPHAEL_HOME": str(ROOT)}
        done = subprocess.run(
            ["bash", str(ROOT / "slurm" / script)], env=env, cwd=trial.folder, capture_output=True, text=True, timeout=60
        )
        assert not canary.exists(), f"{name}={attack!r} in {script} ran"
        assert done.returncode == 2, f"{name}={attack!r} in {script}: {done.returncode}\n{done.stderr}"
        assert done.stderr.count("\n") == 1, done.stderr
        line = done.stderr.strip()
    return refused(line)


def convert_command(source: Path, target: Path) -> list[str]:
    """Return a conversion's command line."""
    return [
        sys.executable,
        str(ROOT / "tools/convert_checkpoint.py"),
        "--from",
        "auto",
        str(source),
        "--to",
        "canonical",
        str(target),
    ]


@fault("a conversion that is killed or interrupted", "tools", "ranks")
def conversion(trial: Trial) -> Outcome:
    trial.begin(at=6)
    target, number = trial.folder / "converted", trial.draw.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        convert_command(trial.run, target), env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    begun, deadline = target.with_name(f".converting-{target.name}"), time.monotonic() + 60
    on_writing, wait = trial.draw.random() < 0.7, trial.draw.uniform(0, 6)
    if not on_writing:
        deadline = time.monotonic() + wait
    while time.monotonic() < deadline and process.poll() is None and not (on_writing and begun.exists()):
        time.sleep(0.002)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    what = f"{number.name}, exit code {process.returncode}"
    if process.returncode != 0:
        assert not target.exists(), "an incomplete conversion was published"
        if number == signal.SIGINT and process.returncode == 130:
            assert output.strip().splitlines()[-1] == "interrupted", output[-2000:]
            assert "Traceback" not in output, output[-2000:]
            assert not begun.exists(), "an interrupted conversion left files"
        again = subprocess.run(
            convert_command(trial.run, target), env=env, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert again.returncode == 0, again.stderr
    expected = trial.shared.get(f"converted {trial.setting}")
    if expected is None:
        expected = trial.shared["folder"] / f"converted-{len(trial.shared)}"
        done = subprocess.run(
            convert_command(trial.oracle / "checkpoints/step-00000006", expected),
            env=env, cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        trial.shared[f"converted {trial.setting}"] = expected
    files = [{p.name: p.read_bytes() for p in folder.glob("*.safetensors")} for folder in (target, expected)]
    assert files[0] == files[1]
    assert files[0]
    assert trial.newest() == 6, "the source was changed"
    shutil.rmtree(target)
    return survived(f"{what}; converted at the second try")


PLACES = (
    "a folder with spaces",
    "Ärger/日本語",
    "a" * 200 + "/" + "b" * 200,
    "'quote\"",
    "$(touch canary)",
    "-dash",
    "link",
)


@fault("an unusual run directory, locale or Python cache", "surroundings", "ranks")
def places(trial: Trial) -> Outcome:
    """Ranks start a new Python, which reads these when it starts."""
    name, locale = trial.draw.choice(PLACES), trial.draw.choice(["C", "POSIX", "C.UTF-8", "nonsense"])
    run, code = trial.folder / name, trial.folder / "code"
    if name == "link":
        (trial.folder / "elsewhere").mkdir()
        run.symlink_to("elsewhere")
    for part in ("raphael_dist", "tests"):  # whose byte code may be damaged
        shutil.copytree(ROOT / part, code / part, ignore=shutil.ignore_patterns("data"))
    spec = {"folder": str(trial.outputs), "run_dir": str(run), "stage": trial.setting.stage, "sections": trial.sections}
    (trial.folder / "spec.json").write_text(json.dumps(spec))
    trial.outputs.mkdir()
    for path in code.rglob("*.pyc"):
        path.write_bytes(path.read_bytes()[: trial.draw.choice([0, 8, 16, 40])])
    output = start_ranks(trial.folder / "spec.json", code, {"LC_ALL": locale, "LANG": locale})
    assert "Traceback" not in output
    trial.run = run
    trial.check_equals_oracle()
    assert not (code / "canary").exists()
    return survived(f"{name[:40]!r}, LC_ALL={locale}, byte code cut off")


def start_ranks(spec: Path, code: Path, env: dict[str, str]) -> str:
    """Run the ranks of a spec, each as a Python of its own, with the package in `code`; return what they printed."""
    base = {**rank_env(WORLD), **env, "PYTHONPATH": str(code)}
    command = [sys.executable, "-m", "tests.workers.spec", str(spec)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "cwd": code}
    ranks = [subprocess.Popen(command, env={**base, "RANK": str(r), "LOCAL_RANK": str(r)}, **pipe) for r in range(WORLD)]
    try:
        outputs = [rank.communicate(timeout=SLOW_MACHINE)[0].decode(errors="replace") for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    codes = [rank.returncode for rank in ranks]
    assert codes == [0] * WORLD, f"exit codes {codes}:\n{outputs[0][-3000:]}"
    return "".join(outputs)
