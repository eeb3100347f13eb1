"""The campaign of ablations (tools/ablate.py): which models it compares, in which order, what it says, how it goes on."""

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
from raphael_dist.training.metrics import read_metrics
from tests.launch import ROOT
from tools import ablate

SMALL = str(ROOT / "tests" / "data" / "small.yaml")
REAL_RUN = running.Programs.run
LOSS = {"full": 0.5, "no-space": 0.6, "no-time": 0.5, "no-edge": 0.3, "space-2": 0.55, "alpha-0.8": 0.7}


class Trainer:
    """Stands for the processes that a campaign starts: notes them, and writes what a run of the trainer leaves."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, int]] = []
        self.fields: list[dict[str, str]] = []
        self.codes: dict[tuple[str, int], int] = {}
        self.benchmarks: list[Path] = []

    def __call__(self, arguments: list[str], folder: Path) -> int:
        if "emoji" in arguments:
            self.benchmarks.append(folder)
            out = Path(arguments[arguments.index("--out") + 1])
            out.mkdir()
            rows = [{"what": "style accuracy", "value": 0.5}, {"what": "loss at timestep 50", "value": 0.1}]
            (out / "results.json").write_text(json.dumps({"this model": rows}))
            return 0
        fields = dict(one.split("=", 1) for one in arguments if "=" in one)
        name, seed = folder.parent.name, int(fields["run.seed"])
        self.runs.append((name, seed))
        self.fields.append(fields)
        (folder / "output.txt").write_text("step 1\nerror: data.shards: not there\nmore\n")
        code = self.codes.get((name, seed), 0)
        if code == 0:
            steps = int(fields["train.max_steps"])
            rows = [
                {"step": s, "train/loss_denoise": 1 / s, "throughput/samples_per_s": 10.0 * s} for s in range(1, steps + 1)
            ]
            # Seeds differ by more than variants do; the last digit is what a variant does with one seed alone.
            rows.append({"step": steps, "val/loss": LOSS[name] + seed + 0.01 * (seed % 2) * (name != "full")})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return code


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    fake = Trainer()
    monkeypatch.setattr(running.Programs, "run", lambda _, arguments, folder: fake(arguments, folder))
    monkeypatch.setattr(running, "size_of", lambda _: Size(1_000_000, 2_000_000_000))
    return fake


def command(out: Path, *more: str) -> list[str]:
    return ["--config", SMALL, "--out", str(out), "--images", "95", *more]


def test_variants_are_the_base_with_named_fields_changed_and_no_model_comes_twice() -> None:
    base = read_base(SMALL, ["optim.lr=0.1", "model.mask_threshold=0.2"])
    names = [variant.name for variant in choose(base, ["experts", "alpha", "edges"])]
    # 6 space experts, alpha 0.2 and T_c 500 are the base's own; 0 space experts are `no-space`.
    assert names == ["full", "no-space", *(f"space-{n}" for n in (1, 2, 3, 4, 5, 7, 8)),
                     "alpha-0", "alpha-0.4", "alpha-0.6", "alpha-0.8", "edges-250", "edges-750", "edges-1000"]  # fmt: skip
    config = base.config(choose(base, ["alpha-0.4"])[1].overrides)
    assert (config.model.mask_threshold, config.optim.lr, config.model.space_experts) == (0.4, 0.1, 6)


def test_widths_are_chosen_so_that_counts_agree() -> None:
    base = read_base(SMALL, [])
    chosen = {variant.name: variant for variant in choose(base, ["dense-parameters", "dense-flops", "finer"])}
    sizes = {name: size_of(base.config(variant.overrides)) for name, variant in chosen.items()}
    whole = sizes["full"]
    assert sizes["dense-parameters"].parameters == pytest.approx(whole.parameters, rel=2e-3)
    assert sizes["dense-flops"].flops == pytest.approx(whole.flops, rel=2e-3)
    assert sizes["finer"].flops == pytest.approx(whole.flops, rel=2e-2)
    assert whole.flops > 1.1 * size_of(base.config({"model.space_experts": "0", "model.time_experts": "0"})).flops
    assert chosen["dense-parameters"].overrides[WIDTH] != chosen["dense-flops"].overrides[WIDTH]


def test_every_variant_has_one_seed_before_any_has_the_next_and_all_see_as_many_images(
    tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert ablate.main(command(out, "--variants", "no-edge,no-space", "--seeds", "2")) == 0
    order = ["full", "no-space", "no-edge"]
    assert trainer.runs == [(name, seed) for seed in (0, 1) for name in order]
    assert {fields["train.max_steps"] for fields in trainer.fields} == {"10"}  # 95 images are 10 steps of 10
    assert [fields.get("edge.weight") for fields in trainer.fields] == [None, None, "0"] * 2
    # By hand: no-edge is better by 0.2 with seed 0, and by 0.19 with seed 1; t of one degree of freedom is 12.706.
    found = {row["variant"]: row for row in json.loads((out / "results.json").read_text())["variants"]}
    assert found["no-edge"]["difference"]["mean"] == pytest.approx(-0.195)
    assert found["no-edge"]["difference"]["half"] == pytest.approx(12.706 * 0.005, rel=1e-3)
    assert found["full"]["loss"]["mean"] == pytest.approx(1.0)
    table = capsys.readouterr().out
    assert "By held-out loss, the best first: `no-edge`, `full`, `no-space`." in table
    assert "without edge loss: better, against the paper" in table
    assert "without Space-MoE: worse, as in the paper" in table
    assert (out / "results.csv").read_text().count("\n") == 7
    assert (out / "variants.png").stat().st_size > 5000
    run = json.loads((out / "results.json").read_text())["runs"][0]
    assert (run["train_loss"], run["images_per_s"]) == (pytest.approx(0.1), pytest.approx(55.0))


def test_a_campaign_goes_on_where_it_was_and_grows(tmp_path: Path, trainer: Trainer) -> None:
    out = tmp_path / "out"
    trainer.codes["no-time", 0] = EXIT_INTERRUPTED
    assert ablate.main(command(out, "--variants", "no-time,alpha-0.8", "--seeds", "1")) == 128 + signal.SIGINT
    assert trainer.runs == [("full", 0), ("no-time", 0)]
    trainer.codes.clear()
    trainer.runs.clear()
    more = ["--variants", "no-time,alpha-0.8,space-2", "--benchmark", "run.log_level=error"]
    assert ablate.main(command(out, "--seeds", "1", *more)) == 0
    assert trainer.runs == [("no-time", 0), ("space-2", 0), ("alpha-0.8", 0)]
    assert len(trainer.benchmarks) == 4, "the finished run has the benchmark made up for"
    assert "style accuracy" in (out / "results.md").read_text()
    assert {path.name for path in out.glob("*.png")} == {"variants.png", "experts.png", "alpha.png"}
    trainer.runs.clear()
    assert ablate.main(command(out, "--variants", "no-time", "--table")) == 0
    assert not trainer.runs
    assert "`alpha-0.8`" in (out / "results.md").read_text(), "a table is of all that is there"


def test_a_run_that_diverges_is_told_and_does_not_end_the_campaign(tmp_path: Path, trainer: Trainer) -> None:
    trainer.codes["no-space", 0] = EXIT_NON_FINITE
    assert ablate.main(command(tmp_path, "--variants", "no-space,no-time", "--seeds", "1")) == 0
    assert trainer.runs[-1] == ("no-time", 0)
    assert "| `no-space` | without Space-MoE | 1 (1 diverged) |" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--variants", "no-spaec"], "--variants: given 'no-spaec' (did you mean 'no-space'?)"),
        (["--seeds", "0"], "--seeds: given 0, must be 1 or more"),
        (["run.seed=3"], "run.seed: given 3, but a campaign sets it for each run; use --seeds"),
        (["edge.weight=0"], "edge.weight is 0, and a campaign compares with the whole model"),
        (["data.val_shards=[]"], "data.val_shards is empty"),
        (["train.micro_batch=2"], "begun with train.micro_batch = 3, now 2; choose another folder"),
        (["--table", "--images", "10"], "begun with images = 100, now 10"),
        (["--variants", "alpha-0.8"], "alpha-0.8, seed 0: data.shards: not there"),
        (
            ["--variants", "no-space", "parallel.space_ep=2"],
            "no-space: parallel.space_ep = 2 must divide model.space_experts = 0",
        ),
    ],
)
def test_mistakes_are_one_line(
    more: list[str], says: str, tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.codes["alpha-0.8", 0] = EXIT_USER_ERROR
    assert ablate.main(command(tmp_path, "--variants", "full", "--seeds", "1")) == 0
    capsys.readouterr()
    # argparse keeps the last of an option.
    assert ablate.main(command(tmp_path, "--variants", "full", *more)) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_a_variant_that_means_something_else_now_is_refused(tmp_path: Path, trainer: Trainer) -> None:
    arguments = command(tmp_path, "--variants", "no-edge", "--seeds", "1")
    assert ablate.main(arguments) == 0
    path = tmp_path / "runs" / "no-edge" / "seed-0" / "finished.json"
    path.write_text(path.read_text().replace('"edge.weight": "0"', '"edge.weight": "0.5"'))
    with pytest.raises(UserError, match="remove it, or choose another --out"):
        ablate.run(ablate.parse(arguments))


def test_an_interval_is_students() -> None:
    found = interval([1.0, 2.0, 4.0])
    assert found is not None
    assert found.half == pytest.approx(4.3027 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-4)
    assert (interval([]), interval([3.0])) == (None, Interval(3.0, None, 1))
    assert [Interval(m, h, 2).side for m, h in ((1, 0.5), (-1, 0.5), (1, 2), (1, None))] == [1, -1, 0, 0]


def test_jobs_are_runs_at_a_time_and_all_end_with_the_first_that_cannot_go_on(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real processes stand for runs: two wait until both are at work, then one fails, and the other is told to end."""
    program = """
import pathlib, signal, sys, time
own, other, code = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
signal.signal(signal.SIGTERM, lambda *_: (own.with_suffix(".told").touch(), sys.exit(75)))
own.touch()
while not other.exists():
    time.sleep(0.01)
if not code:
    time.sleep(600)
print("error: data.shards: not there", flush=True)
sys.exit(code)
"""

    def run(programs: running.Programs, _: list[str], folder: Path) -> int:
        names = ["full", "no-edge"]
        own, other = folder.parent.name, names[1 - names.index(folder.parent.name)]
        files = [str(tmp_path / f"{name}.{folder.name}") for name in (own, other)]
        return REAL_RUN(programs, ["-c", program, *files, "2" if own == "no-edge" else "0"], folder)

    monkeypatch.setattr(running.Programs, "run", run)
    arguments = command(tmp_path / "out", "--variants", "no-edge", "--seeds", "2", "--jobs", "2")
    assert ablate.main(arguments) == EXIT_USER_ERROR
    assert "no-edge, seed 0: data.shards: not there" in capsys.readouterr().err
    assert (tmp_path / "full.told").exists(), "the other run was not told to end"
    assert not (tmp_path / "full.seed-1").exists(), "a run was begun after the failure"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # at the lowest priority
def test_a_killed_campaign_on_two_ranks_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Real runs: the first is ended in the middle, and the same command makes of it what it would have become."""
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
