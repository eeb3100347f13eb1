"""The doctor: a healthy run has no finding, and each planted problem is found by its rule, and by no other."""

import ast
import re
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from raphael_dist.cli import doctor
from raphael_dist.data.features.tokens import truncation_line
from raphael_dist.reporting import rules, summary
from raphael_dist.reporting.data_sample import DataSample
from raphael_dist.reporting.rules import RULES, RunEvidence, diagnose
from raphael_dist.reporting.run_events import KINDS, UNCLEAN, History, read_history
from raphael_dist.reporting.run_files import read_run
from tests.lib import planted_run
from tests.lib.planted_run import BEGIN, LINES, Tag, log_line, plant

ROOT = Path(__file__).parents[2]
START = (
    "resumed at step 100: runs/x, 87 images, 2 ranks on cpu, ZeRO-2, global batch 16, micro-batch 8, micro-steps per step: 1"
)
HANG = "there was no progress for 600 s at step 100: rank 1 is behind"
# For each rule: what is planted, and a part of what it must report.
PLANTED: dict[rules.Rule, tuple[dict, str]] = {
    rules.loss_not_finite: ({"tags": {"train/loss": lambda i: float("nan") if i == 20 else 0.3 + 0.7 * 0.8**i}}, "step 210"),
    rules.loss_not_falling: ({"tags": {"train/loss": lambda i: 1.0 + 0.01 * (i % 3)}}, "does not fall: 1.01 at the start"),
    rules.loss_rising: (
        {"tags": {"train/loss": lambda i: 0.3 + 0.7 * 0.8**i + 0.03 * max(0, i - 30) + 0.005 * (-1) ** i}},
        "rises again: 0.298 up to step 300, 0.505 in the last eighth",
    ),
    rules.dead_experts: ({"tags": {"moe/space/L02/load_min": lambda i: 0.001}}, "space experts in blocks 2"),
    rules.overloaded_experts: ({"tags": {"moe/time/L01/load_max": lambda i: 3.9}}, "time experts in blocks 1"),
    rules.data_bound: ({"tags": {"time/data_wait_frac": lambda i: 0.6}}, "waits for data 60% of the time"),
    rules.slow_ranks: (
        {
            "tags": {"time/slowest_rank_ratio": lambda i: 2.4},
            "log": [
                (
                    9.5,
                    "WARNING",
                    "step 90: slow ranks for 20 steps or more: rank 1 on n7 (its own work takes 2.4 times the median)",
                )
            ],
        },
        "rank 1 on n7",
    ),
    rules.always_clipped: ({"tags": {"optim/grad_norm": lambda i: 7.0}}, "100% of the logged steps"),
    rules.skipped_steps: ({"tags": {"train/skipped": lambda i: float(i)}}, "39 of 400 steps"),
    rules.wrong_schedule: ({"options": {"optim.warmup_steps": 300}}, "optim.warmup_steps=300"),
    rules.checkpoints_fail: (
        {"log": [(5.5, "WARNING", "the checkpoint of step 50 was not written, and the previous one remains: no space")]},
        "saves of a checkpoint failed (number: 1); the last: the checkpoint of step 50 was not written",
    ),
    rules.truncated_captions: (
        {"log": [(0.1, "WARNING", truncation_line("captions", 30, 87, 28))]},
        "34% of the captions (30 of 87 that were encoded before the warnings in the logs)",
    ),
    rules.empty_edge_maps: ({"tags": {"train/loss_edge": lambda i: 1e-6}}, "edge maps seem to be empty"),
    rules.crashes: (
        {"log": [(10.5, "INFO", START), (20.5, "INFO", START), (29.5, "ERROR", HANG), (30.5, "INFO", START)]},
        "the run was killed or crashed 2 times and hung 1 time",
    ),
    rules.stalled: ({"complete": False}, "logged nothing for"),
}


def evidence_of(folder: Path, **fields: object) -> RunEvidence:
    run = read_run(folder)
    now = BEGIN + timedelta(minutes=LINES if read_history(run, BEGIN).of("complete") else 10_000)
    return RunEvidence(run, read_history(run, now), now, **fields)  # type: ignore[arg-type]


def history_of(folder: Path, now: datetime = BEGIN + timedelta(minutes=LINES)) -> History:
    return read_history(read_run(folder), now)


def test_healthy_run_has_no_finding(tmp_path: Path) -> None:
    data = DataSample(samples=200, edges=200, empty_edges=3, duplicates=2)
    evidence = evidence_of(plant(tmp_path / "run"), free_bytes=1 << 40, checkpoint_bytes=1 << 30, data=data)
    assert diagnose(evidence) == []
    assert rules.coverage(evidence) == ([what for what, _ in RULES.values()], [])


@pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)
def test_planted_problem_is_found_by_its_rule_alone(rule: rules.Rule, tmp_path: Path) -> None:
    spec, part = PLANTED[rule]
    evidence = evidence_of(plant(tmp_path / "run", **spec))
    finding = rule(evidence)
    assert finding is not None
    assert part in finding.problem
    assert finding.remedy
    assert diagnose(evidence) == [finding]


@pytest.mark.parametrize(
    ("loss", "options", "rule"),
    [
        (lambda i: 0.3 + 0.7 * 0.8**i + 2.0 * max(0, i - 34), {}, rules.loss_rising),  # ends above its start
        (lambda i: 0.3 + 0.7 * 0.8**i + 2.0 * (i == 39), {}, None),  # a single spike at the end
        (lambda i: 0.3 + 0.7 * 0.8**i + 0.08 * (i * 7 % 5 - 2), {}, None),  # noise
        (lambda i: 0.3 + 0.7 * 0.8**i + 0.03 * (i > 30), {}, None),  # by a tenth only
        (lambda i: 0.5 + 0.05 * i, {}, rules.loss_not_falling),  # never fell
        (lambda i: (0.3 if i < 20 else 0.4) + 0.3 * 0.5 ** (i % 20), {}, rules.loss_rising),
        (lambda i: (0.3 if i < 20 else 0.4) + 0.3 * 0.5 ** (i % 20), {"train.stages": [{"until": 200, "set": {}}]}, None),
    ],
)
def test_loss_that_rises_again_is_told_from_noise_and_stages(
    loss: Tag, options: dict, rule: rules.Rule | None, tmp_path: Path
) -> None:
    evidence = evidence_of(plant(tmp_path / "run", {"train/loss": loss}, options=options))
    assert diagnose(evidence) == ([rule(evidence)] if rule else [])
    answer = summary.convergence(evidence.run)
    assert ("and rises again: the training loss went" in answer) == (rule is rules.loss_rising)


def test_rules_about_disk_and_data_find_what_is_planted(tmp_path: Path) -> None:
    folder = plant(tmp_path / "run")
    full = evidence_of(folder, free_bytes=3 << 30, checkpoint_bytes=2 << 30)
    assert "3.00 GiB left" in diagnose(full)[0].problem
    data = DataSample(samples=200, edges=200, empty_edges=90, duplicates=50)
    problems = [finding.problem for finding in diagnose(evidence_of(folder, data=data))]
    assert problems == ["90 of 200 edge maps are empty", "50 of 200 images look like another image"]
    data = DataSample(samples=200, edges=0, empty_edges=0, duplicates=0, captions=800, truncated=200)
    assert [finding.problem for finding in diagnose(evidence_of(folder, data=data))] == [
        "25% of the captions (200 of 800 in the checked samples) are longer than text.max_tokens=28"
    ]


@pytest.mark.parametrize(
    ("counts", "part"),
    [
        ([(1, 8)], ""),  # the first batch had one: this says little about the others
        ([(8, 8)], "100% of the captions (8 of 8 "),
        ([(1, 8), (1, 300)], ""),
        ([(1, 8), (40, 192)], "20% of the captions (41 of 200 "),  # of all processes
    ],
)
def test_truncated_captions_of_the_logs_are_no_share_of_the_data(
    counts: list[tuple[int, int]], part: str, tmp_path: Path
) -> None:
    log = [(0.1 + i, "WARNING", truncation_line("captions", *count, 28)) for i, count in enumerate(counts)]
    folder = plant(tmp_path / "run", log=log)
    findings = diagnose(evidence_of(folder))
    assert [part in finding.problem for finding in findings] == ([True] if part else [])
    data = DataSample(samples=200, edges=0, empty_edges=0, duplicates=0, captions=200, truncated=0)
    assert diagnose(evidence_of(folder, data=data)) == []  # a sample of all data is a better measure


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = plant(tmp_path / "run")
    (folder / "checkpoints" / "damaged-step-00000300").mkdir()
    assert "damaged-step-00000300" in diagnose(evidence_of(folder))[0].problem


@pytest.mark.parametrize(
    ("lr", "options", "part"),
    [
        (lambda i: 1e-3 if i < 20 else 0.0, {}, "since step 210 of 400"),
        (lambda i: 1e-3, {}, "ended at 100% of its peak"),
        (lambda i: 1e-3, {"optim.lr_schedule": "constant"}, ""),
        (lambda i: 1e-3 * (1 - i / 41), {"model.gate_noise_steps": 500}, "the noise never falls to 0"),
    ],
)
def test_wrong_schedules_are_found(tmp_path: Path, lr: object, options: dict, part: str) -> None:
    findings = diagnose(evidence_of(plant(tmp_path / "run", {"optim/lr": lr}, options=options)))  # type: ignore[dict-item]
    assert [part in finding.problem for finding in findings] == ([True] if part else [])


def test_dead_experts_are_not_judged_by_few_samples_or_few_lines(tmp_path: Path) -> None:
    dead = {"moe/space/L02/load_min": lambda i: 0.0}
    few = plant(tmp_path / "few", dead, options={"train.global_batch_size": 2, "train.log_every": 1})
    assert diagnose(evidence_of(few)) == []
    revived = plant(tmp_path / "revived", {"moe/space/L02/load_min": lambda i: 0.0 if i < 36 else 0.5})
    assert diagnose(evidence_of(revived)) == []
    counted = plant(tmp_path / "counted", {"moe/dead_experts": lambda i: 3.0})
    assert diagnose(evidence_of(counted))[0].problem == "3 experts are dead"


def test_doctor_prints_findings_and_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([str(plant(tmp_path / "good")), "--no-data"]) == 0
    assert "No problem was found." in capsys.readouterr().out
    bad = plant(tmp_path / "bad", {"optim/grad_norm": lambda i: 7.0})
    assert doctor.main([str(bad), "--no-data"]) == doctor.FOUND == 1
    out = capsys.readouterr().out
    assert "1. Gradients are clipped at 100%" in out
    assert "What to do: lower optim.lr" in out
    assert "Not checked, since the run directory has no data about it: duplicate images." in out


def test_doctor_looks_at_the_data_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([str(plant(tmp_path / "run"))]) in (0, 1)
    assert "Not checked" not in capsys.readouterr().out
    assert doctor.main([str(plant(tmp_path / "other", options={"data.shards": ["absent.tar"]})), "--no-data"]) == 0


@pytest.mark.parametrize("command", [["doctor"], ["report", "--out", "x.html"]])
def test_folder_that_is_no_run_is_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from raphael_dist.__main__ import main

    monkeypatch.chdir(tmp_path)
    for name in ("absent", "."):
        assert main([command[0], name, *command[1:]]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"error: RUN={name} must be a run directory, but")
        assert captured.err.count("\n") == 1
        assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def log_templates() -> set[str]:
    """Return the texts of the package with 7 in place of each value, also as a step's line and of a folder step-7."""
    texts: set[str] = set()
    for path in (ROOT / "raphael_dist").rglob("*.py"):
        if path.parent.name == "reporting":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.add("".join(str(part.value) if isinstance(part, ast.Constant) else "7" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(re.sub(r"%[srd]", "7", node.value))
    return {f"{prefix}{text}" for prefix in ("", "step 7: ") for text in texts} | {t.replace("7", "step-7") for t in texts}


def test_each_kind_of_event_is_a_line_that_the_package_logs() -> None:
    templates = log_templates()
    unknown = [
        (kind, pattern)
        for kind, alternatives in KINDS.items()
        for pattern in (alternatives.split("|") if "(" not in alternatives else [alternatives])
        if not any(re.match(pattern, text) for text in templates)
    ]
    assert unknown == []


def test_history_counts_processes_that_ended_without_a_stop_line(tmp_path: Path) -> None:
    log = [(10.5, "INFO", START), (20.5, "INFO", "stopped by a signal or the time limit at step 200"), (20.6, "INFO", START)]
    history = history_of(plant(tmp_path / "run", log=log))
    assert [event.kind for event in history.events] == [
        "start",
        UNCLEAN,
        "restart",
        "stopped",
        "restart",
        "complete",
    ]
    assert [event.step for event in history.faults] == [100]


def test_log_of_another_rank_is_read(tmp_path: Path) -> None:
    folder = plant(tmp_path / "run")
    (folder / "logs" / "rank-00003.log").write_text(
        log_line(3, "ERROR", "there was no progress for 600 s at step 20") + "half a li"
    )
    assert [(event.kind, event.step) for event in history_of(folder).faults] == [("hang", 20)]


def test_what_all_ranks_log_is_one_fault(tmp_path: Path) -> None:
    """Eight ranks hang, are started again, and move a damaged checkpoint; later, the same happens again."""
    folder = plant(tmp_path / "run")
    for rank in range(8):
        lines = []
        for minute in (10.5, 20.5):
            lines += [log_line(minute + rank / 60, "ERROR", HANG.replace("100", str(100 - rank % 2)))]
            if rank == 0:
                lines += [log_line(minute + 0.3, "WARNING", "skipping checkpoint runs/x/checkpoints/step-00000090: bad")]
            moved = [f"the damaged checkpoint was moved to runs/x/checkpoints/damaged-step-{step:08d}" for step in (90, 80)]
            lines += [log_line(minute + 0.31 + rank / 600, "WARNING", text) for text in moved]
            lines += [log_line(minute + 0.4, "INFO", START)] if rank == 0 else []
        name = "train.log" if rank == 0 else f"logs/rank-{rank:05d}.log"
        with open(folder / name, "a") as file:
            file.write("".join(lines))
    faults = [(event.kind, event.step) for event in history_of(folder).faults]
    assert [kind for kind, _ in faults] == ["hang", "damaged checkpoint", "damaged checkpoint"] * 2
    assert [step for kind, step in faults if kind == "damaged checkpoint"] == [90, 80] * 2


def test_faults_of_different_samples_and_starts_are_counted_each(tmp_path: Path) -> None:
    log = [(10.5, "WARNING", f"sample {name} cannot be used, so another replaces it") for name in "ab"]
    log += [(10.6, "ERROR", HANG), (10.8, "INFO", START), (10.9, "ERROR", HANG), (11.1, "INFO", START)]
    faults = history_of(plant(tmp_path / "run", log=log)).faults
    assert [event.kind for event in faults] == ["bad data", "bad data", "hang", "hang"]


@pytest.mark.parametrize("lines", [0, 1, 2, LINES])
def test_run_that_died_and_was_not_started_again_is_reported(
    lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planted_run, "LINES", lines)
    folder = plant(tmp_path / "run", complete=False)
    evidence = evidence_of(folder)
    assert [event.kind for event in evidence.history.faults] == [UNCLEAN]
    finding = rules.stalled(evidence)
    assert finding is not None
    assert "the run is not complete and has logged nothing for" in finding.problem
    assert rules.crashes(evidence) is None  # it would say the same
    soon = history_of(folder, BEGIN + timedelta(minutes=lines + 9))
    assert soon.faults == []
