"""Ablation campaigns (tools/ablate.py): variants, order, results, errors and continuation."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ablations import campaign as running
from ablations.results import Interval, interval
from ablations.size import Size, size_of
from ablations.variants import WIDTH, choose, read_base
from raphael_dist.errors import EXIT_INTERRUPTED, EXIT_NON_FINITE, EXIT_USER_ERROR, UserError
from raphael_dist.evaluation.lettering import score_texts
from raphael_dist.evaluation.study import Result, write_results
from raphael_dist.training.metrics_files import read_metrics
from tests.lib.launch import ROOT
from tools import ablate

SMALL = str(ROOT / "tests" / "fixtures" / "small.yaml")
REAL_RUN = running.Processes.run
LOSS = {"full": 0.5, "no-space": 0.6, "no-time": 0.5, "no-edge": 0.3, "space-2": 0.55, "alpha-0.8": 0.7}


class Trainer:
    """Replaces the processes that a campaign starts: records them and writes the files of a finished run."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, int]] = []
        self.fields: list[dict[str, str]] = []
        self.codes: dict[tuple[str, int], int] = {}
        self.benchmarks: list[Path] = []

    def __call__(self, arguments: list[str], folder: Path) -> int:
        if "--out" in arguments:
            out = Path(arguments[arguments.index("--out") + 1])
            out.mkdir()
        if "evaluate" in arguments:
            assert arguments[arguments.index("--captions") + 1] == "prompts=words.txt"
            correct = 3 if folder.parent.name == "full" else 1
            score = score_texts(["BIRD"] * 4, ["BIRD"] * correct + ["B1RD"] * (4 - correct))
            write_results(out, [Result(7.5, 4, text=score)])
            return 0
        if "emoji_benchmark.py" in arguments[0]:
            self.benchmarks.append(folder)
            rows = [{"what": "style accuracy", "value": 0.5}, {"what": "loss at timestep 50", "value": 0.1}]
            (out / "results.json").write_text(json.dumps({"this model": rows}))
            return 0
        fields = dict(override.split("=", 1) for override in arguments if "=" in override)
        name, seed = folder.parent.name, int(fields["run.seed"])
        self.runs.append((name, seed))
        self.fields.append(fields)
        (folder / "output.txt").write_text("step 1\nerror: data.shards: not there\nmore\n")
        code = self.codes.get((name, seed), 0)
        if code == 0:
            steps = int(fields["train.max_steps"])
            rows = [{"step": s, "train/loss": 1 / s, "throughput/samples_per_s": 10.0 * s} for s in range(1, steps + 1)]
            # Seeds differ by more than variants do; the last term makes the differences of two seeds differ.
            last = LOSS[name] + seed + 0.01 * (seed % 2) * (name != "full")
            rows += [{"step": s, "val/loss": last + steps - s, "moe/dead_experts": steps - s} for s in (steps // 2, steps)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return code


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    fake = Trainer()
    monkeypatch.setattr(running.Processes, "run", lambda _, arguments, folder: fake(arguments, folder))
    monkeypatch.setattr(running, "size_of", lambda _: Size(1_000_000, 2_000_000_000))
    return fake


def command(out: Path, *more: str) -> list[str]:
    return ["--config", SMALL, "--out", str(out), "--images", "95", *more]


def test_variants_change_named_fields_and_are_unique() -> None:
    base = read_base(SMALL, ["optim.lr=0.1", "model.mask_threshold=0.2"])
    names = [variant.name for variant in choose(base, ["experts", "alpha", "edges"])]
    # 6 space experts, alpha 0.2 and T_c 500 are the base's own; 0 space experts are `no-space`.
    assert names == ["full", "no-space", *(f"space-{n}" for n in (1, 2, 3, 4, 5, 7, 8)),
                     "alpha-0", "alpha-0.4", "alpha-0.6", "alpha-0.8", "edges-250", "edges-750", "edges-1000"]  # fmt: skip
    config = base.config(choose(base, ["alpha-0.4"])[1].overrides)
    assert (config.model.mask_threshold, config.optim.lr, config.model.space_experts) == (0.4, 0.1, 6)


def test_matched_widths_give_equal_counts() -> None:
    base = read_base(SMALL, [])
    chosen = {variant.name: variant for variant in choose(base, ["dense-parameters", "dense-flops", "finer"])}
    sizes = {name: size_of(base.config(variant.overrides)) for name, variant in chosen.items()}
    whole = sizes["full"]
    assert sizes["dense-parameters"].parameters == pytest.approx(whole.parameters, rel=2e-3)
    assert sizes["dense-flops"].flops == pytest.approx(whole.flops, rel=2e-3)
    assert sizes["finer"].flops == pytest.approx(whole.flops, rel=2e-2)
    assert whole.flops > 1.1 * size_of(base.config({"model.space_experts": "0", "model.time_experts": "0"})).flops
    assert chosen["dense-parameters"].overrides[WIDTH] != chosen["dense-flops"].overrides[WIDTH]


def test_seeds_are_run_in_order_with_equal_images(
    tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert ablate.main(command(out, "--variants", "no-edge,no-space", "--seeds", "2")) == 0
    order = ["full", "no-space", "no-edge"]
    assert trainer.runs == [(name, seed) for seed in (0, 1) for name in order]
    assert {fields["train.max_steps"] for fields in trainer.fields} == {"10"}  # 95 images are 10 steps of 10
    assert [fields.get("edge.weight") for fields in trainer.fields] == [None, None, "0"] * 2
    # By hand: no-edge is better by 0.2 with seed 0, and by 0.19 with seed 1; t of one degree of freedom is 12.706.
    rows = {row["variant"]: row for row in json.loads((out / "results.json").read_text())["variants"]}
    assert rows["no-edge"]["difference"]["mean"] == pytest.approx(-0.195)
    assert rows["no-edge"]["difference"]["half"] == pytest.approx(12.706 * 0.005, rel=1e-3)
    assert rows["full"]["loss"]["mean"] == pytest.approx(1.0)
    table = capsys.readouterr().out
    assert "By held-out loss, the best first: `no-edge`, `full`, `no-space`." in table
    assert "without edge loss: better, against the paper" in table
    assert "without Space-MoE: worse, as in the paper" in table
    assert len(json.loads((out / "results.json").read_text())["runs"]) == 6
    assert (out / "variants.png").stat().st_size > 5000
    run = json.loads((out / "results.json").read_text())["runs"][0]
    assert (run["train_loss"], run["images_per_s"]) == (pytest.approx(0.1), pytest.approx(55.0))


def test_variants_have_seeds_of_their_own_and_full_has_the_most() -> None:
    chosen = choose(read_base(SMALL, []), ["main", "dense-flops:5"], seeds=2)
    seeds = {variant.name: variant.seeds for variant in chosen}
    assert (seeds["full"], seeds["dense-flops"], seeds["no-space"]) == (5, 5, 2)
    runs = list(running.Campaign(Path("out"), read_base(SMALL, []), chosen, 95, 1, False, None, 1).runs())
    assert len(runs) == 5 + 5 + 4 * 2
    assert [variant.name for variant, seed in runs if seed == 2] == ["full", "dense-flops"]


def test_curves_and_routing_are_written_over_images_seen(tmp_path: Path, trainer: Trainer) -> None:
    more = ["--variants", "no-edge", "--seeds", "2", "--read", "prompts=words.txt"]
    assert ablate.main(command(tmp_path, *more)) == 0
    assert {fields["train.val_every"] for fields in trainer.fields} == {"1"}
    assert "full,1,50,moe/dead_experts,5\nfull,1,100,moe/dead_experts,0\n" in (tmp_path / "curves.csv").read_text()
    assert "no-edge,0,50,val/loss,5.3\n" in (tmp_path / "curves.csv").read_text()
    assert (tmp_path / "curves.png").stat().st_size > 5000
    rows = {row["variant"]: row for row in json.loads((tmp_path / "results.json").read_text())["variants"]}
    assert rows["no-edge"]["benchmark"]["text read exactly"]["mean"] == 0.25
    assert rows["no-edge"]["differences"]["text read exactly"]["mean"] == -0.5
    assert rows["no-edge"]["benchmark"]["character error rate"]["mean"] == 3 / 16
    table = (tmp_path / "results.md").read_text()
    assert "Routing at the end" in table
    assert "-0.500 +- 0.000 | +0.125 +- 0.000 |" in table


def test_campaign_stops_at_its_time_limit_and_continues(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real process is terminated, which saves; the same command then runs what is left."""
    waits = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); time.sleep(600)"
    fake = running.Processes.run
    monkeypatch.setattr(running.Processes, "run", lambda self, _, folder: REAL_RUN(self, ["-c", waits], folder))
    monkeypatch.setattr(ablate, "parse_time", lambda _: 3.0)
    arguments = command(tmp_path, "--variants", "no-edge", "--seeds", "1")
    began = time.monotonic()
    assert ablate.main([*arguments, "--max-time", "8"]) == 128 + signal.SIGINT
    assert time.monotonic() - began < 60
    monkeypatch.setattr(running.Processes, "run", fake)
    assert ablate.main(arguments) == 0
    assert trainer.runs == [("full", 0), ("no-edge", 0)]


def test_campaign_continues_and_grows(tmp_path: Path, trainer: Trainer) -> None:
    out = tmp_path / "out"
    trainer.codes["no-time", 0] = EXIT_INTERRUPTED
    assert ablate.main(command(out, "--variants", "no-time,alpha-0.8", "--seeds", "1")) == 128 + signal.SIGINT
    assert trainer.runs == [("full", 0), ("no-time", 0)]
    trainer.codes.clear()
    trainer.runs.clear()
    more = ["--variants", "no-time,alpha-0.8,space-2", "--benchmark", "run.log_level=error"]
    assert ablate.main(command(out, "--seeds", "1", *more)) == 0
    assert trainer.runs == [("no-time", 0), ("space-2", 0), ("alpha-0.8", 0)]
    assert len(trainer.benchmarks) == 4, "the benchmark of the finished run is missing"
    assert "style accuracy" in (out / "results.md").read_text()
    assert {path.name for path in out.glob("*.png")} == {"variants.png", "curves.png"}
    trainer.runs.clear()
    assert ablate.main(command(out, "--variants", "no-time", "--table")) == 0
    assert not trainer.runs
    assert "`alpha-0.8`" in (out / "results.md").read_text(), "the table leaves out other variants"


def test_diverged_run_is_reported_and_the_campaign_continues(tmp_path: Path, trainer: Trainer) -> None:
    trainer.codes["no-space", 0] = EXIT_NON_FINITE
    assert ablate.main(command(tmp_path, "--variants", "no-space,no-time", "--seeds", "1")) == 0
    assert trainer.runs[-1] == ("no-time", 0)
    assert "| `no-space` | without Space-MoE | 1 (1 diverged) |" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--variants", "no-spaec"], "--variants=no-spaec | (did you mean 'no-space'?)"),
        (["--seeds", "0"], "--seeds=0 "),
        (["--variants", "no-space:x"], "--variants=no-space:x | 'x'"),
        (["run.seed=3"], "run.seed=3 | --seeds"),
        (["edge.weight=0"], "edge.weight is 0"),
        (["data.val_shards=[]"], "data.val_shards is empty"),
        (["train.micro_batch_size=2"], "train.micro_batch_size=3| is 2 now"),
        (["--table", "--images", "10"], "images=100| is 10 now"),
        (["--variants", "alpha-0.8"], "alpha-0.8, seed 0 failed: data.shards: not there"),
        (
            ["--variants", "no-space", "parallel.space_ep=2"],
            "no-space|parallel.space_ep|model.space_experts",
        ),
    ],
)
def test_campaign_mistakes_are_one_line(
    more: list[str], words: str, tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.codes["alpha-0.8", 0] = EXIT_USER_ERROR
    assert ablate.main(command(tmp_path, "--variants", "full", "--seeds", "1")) == 0
    capsys.readouterr()
    # argparse keeps the last of an option.
    assert ablate.main(command(tmp_path, "--variants", "full", *more)) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert all(word in error for word in words.split("|"))
    assert error.count("\n") == 1


def test_changed_variant_is_refused(tmp_path: Path, trainer: Trainer) -> None:
    arguments = command(tmp_path, "--variants", "no-edge", "--seeds", "1")
    assert ablate.main(arguments) == 0
    path = tmp_path / "runs" / "no-edge" / "seed-0" / "finished.json"
    path.write_text(path.read_text().replace('"edge.weight": "0"', '"edge.weight": "0.5"'))
    with pytest.raises(UserError, match=r"no-edge.*0\.5"):
        ablate.run(ablate.parse(arguments))


def test_interval_is_students_t() -> None:
    mean = interval([1.0, 2.0, 4.0])
    assert mean is not None
    assert mean.half == pytest.approx(4.3027 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-4)
    assert (interval([]), interval([3.0])) == (None, Interval(3.0, None, 1))
    assert [Interval(m, h, 2).side for m, h in ((1, 0.5), (-1, 0.5), (1, 2), (1, None))] == [1, -1, 0, 0]


def test_parallel_jobs_end_with_the_first_failure(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real processes instead of runs: both wait for each other, then one fails and the other is terminated."""
    program = """
import pathlib, signal, sys, time
own, other, code = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
signal.signal(signal.SIGTERM, lambda *_: (own.with_suffix(".ended").touch(), sys.exit(75)))
own.touch()
while not other.exists():
    time.sleep(0.01)
if not code:
    time.sleep(600)
print("error: data.shards: not there", flush=True)
sys.exit(code)
"""

    def run(processes: running.Processes, _: list[str], folder: Path) -> int:
        names = ["full", "no-edge"]
        own, other = folder.parent.name, names[1 - names.index(folder.parent.name)]
        files = [str(tmp_path / f"{name}.{folder.name}") for name in (own, other)]
        return REAL_RUN(processes, ["-c", program, *files, "2" if own == "no-edge" else "0"], folder)

    monkeypatch.setattr(running.Processes, "run", run)
    arguments = command(tmp_path / "out", "--variants", "no-edge", "--seeds", "2", "--jobs", "2")
    assert ablate.main(arguments) == EXIT_USER_ERROR
    assert "no-edge, seed 0 failed: data.shards: not there" in capsys.readouterr().err
    assert (tmp_path / "full.ended").exists(), "the other run was not terminated"
    assert not (tmp_path / "full.seed-1").exists(), "a run was started after the failure"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_campaign_on_two_ranks_resumes_its_run(tmp_path: Path) -> None:
    """Real runs: the first is interrupted, and the same command gives the same result as without."""
    more = [
        *("--ranks", "2", "--seeds", "1", "--variants", "full"),
        f"data.cache_dir={tmp_path / 'cache'}",
        "sample.prompts=[]",
    ]
    arguments = ["--config", SMALL, "--images", "120", *more]

    def logged(out: Path) -> dict[str, Any]:
        file = out / "runs" / "full" / "seed-0" / "metrics.jsonl"
        return dict(read_metrics(file)["train/loss"]) if file.is_file() else {}

    started = subprocess.Popen([sys.executable, "tools/ablate.py", *arguments, "--out", str(tmp_path / "killed")], cwd=ROOT)
    deadline = time.monotonic() + 900
    while len(logged(tmp_path / "killed")) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started.terminate()
    assert started.wait(timeout=300) == 128 + signal.SIGINT
    assert 4 <= len(logged(tmp_path / "killed")) < 12
    for out in ("killed", "whole"):
        assert ablate.main([*arguments, "--out", str(tmp_path / out)]) == 0
    assert "resumed at step" in (tmp_path / "killed" / "runs" / "full" / "seed-0" / "output.txt").read_text()
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    results = [json.loads((tmp_path / out / "results.json").read_text())["runs"][0] for out in ("killed", "whole")]
    assert results[0]["losses"] == results[1]["losses"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_campaign_logs_gates_of_each_arm_over_images(tmp_path: Path) -> None:
    more = [f"data.cache_dir={tmp_path / 'cache'}", "sample.prompts=[]"]
    arguments = ["--config", SMALL, "--images", "40", "--variants", "dense-flops", "--seeds", "1", *more]
    assert ablate.main([*arguments, "--out", str(tmp_path / "out"), "--max-time", "1:00:00"]) == 0
    rows = [line.split(",") for line in (tmp_path / "out" / "curves.csv").read_text().splitlines()[1:]]
    tags = {name: {tag for variant, _, _, tag, _ in rows if variant == name} for name in ("full", "dense-flops")}
    assert tags["full"] >= {"val/loss", "moe/space/density", "moe/time/load_min", "moe/time/gate_entropy"}
    assert tags["dense-flops"] & tags["full"] == {tag for tag in tags["full"] if tag.startswith("val/")}
    images = [int(seen) for variant, _, seen, tag, _ in rows if (variant, tag) == ("full", "moe/space/routes_changed")]
    assert images == [20, 30, 40], "from the second validation on"
    assert "Routing at the end" in (tmp_path / "out" / "results.md").read_text()
