"""Odd contents of each file of a run directory: report, doctor and bundle end with a result or one line, no traceback."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raphael_dist.cli import doctor, report
from raphael_dist.reporting import plan_comparison, run_facts, summary
from raphael_dist.reporting.page import MAX_BYTES
from raphael_dist.reporting.route_values import checked_routes
from raphael_dist.reporting.run_facts import examine
from raphael_dist.reporting.run_files import read_run
from tests.lib.planted_run import log_line, plant, routes
from tests.reporting.test_page import data_of, text_of

DEEP = "[" * 3000 + "]" * 3000
HUGE = 10**400
LONG = "9" * 5000
ODD: list[Any] = [None, "abc", True, -5, 1e308, math.nan, -math.inf, HUGE, [], {"a": [{}]}, "\ud800"]


def in_config(key: str) -> Callable[[Path, Any], None]:
    section, _, name = key.partition(".")

    def change(run: Path, value: Any) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        config[section] = {**config[section], name: value} if name else value
        (run / "config.yaml").write_text(json.dumps(config))  # JSON is YAML, except for NaN, which becomes a string

    return change


def in_metrics(tag: str) -> Callable[[Path, Any], None]:
    def change(run: Path, value: Any) -> None:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for row in rows[-30:]:
            row[tag] = value
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return change


def in_routes(key: str) -> Callable[[Path, Any], None]:
    def change(run: Path, value: Any) -> None:
        (run / "samples" / "step-00000400.routes.json").write_text(json.dumps(routes() | {key: value}))

    return change


def in_versions(run: Path, value: Any) -> None:
    (run / "versions.json").write_text(json.dumps({"torch": value, "python": "3.11"}))


def text_in(name: str) -> Callable[[Path, Any], None]:
    def change(run: Path, text: str) -> None:
        (run / name).write_text(text, encoding="utf-8", errors="surrogatepass")

    return change


def more_in(name: str) -> Callable[[Path, Any], None]:
    def change(run: Path, text: str) -> None:
        with open(run / name, "a", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text + "\n")

    return change


def fifo(run: Path, name: str) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)


def folder(run: Path, name: str) -> None:
    (run / name).unlink()
    (run / name).mkdir()


TEXTS = ["", "null", "[]", "\x00", "\udcff", DEEP]
CONFIGS = [
    "a: &a [*a]", f"a: {DEEP}", f"a: {'[' * 200}{']' * 200}", f"train: {{max_steps: 0x{'f' * 6000}}}", "1: 2",
    "? [a]\n: b", "a: !!set {b, c}", "a: 2020-99-99", 'a: "\\ud800"', "train: {max_steps: .nan}", "a: " + "x" * 300_000,
    "\n".join(f"k{i}: {i}" for i in range(1500)),
]  # fmt: skip
ROWS = [
    DEEP, "[]", "3", '{"a": 1}', '{"step": "5"}', '{"step": NaN}', f'{{"step": {LONG}}}', '{"step": 5, "moe/a/b/c": 1}',
    f'{{"step": 5, "moe/space/L{LONG}/load_min": 1}}', '{"step": 410, "train/loss": 1e400}', f'{{"step": 5, "x": {DEEP}}}',
]  # fmt: skip
LINES = [
    "2026-99-99 12:00:00,000 INFO a.b: x", log_line(50, "INFO", f"step {LONG}/400 loss"),
    log_line(50, "INFO", f"resumed at step {LONG}"), log_line(50, "INFO", "from scratch: x, 0 ranks on cpu, ZeRO-9"),
    log_line(50, "WARNING", "text.max_tokens=0: longer captions are truncated (0 of 0)"),
    "9999-12-31 23:59:59,999 INFO a.b: step 5/6 ", log_line(50, "WARNING", "step 5 was skipped " + "x" * 3_000_000),
    "".join(log_line(50 + i / 100, "WARNING", f"step {i} was skipped") for i in range(3000)),
]  # fmt: skip
CASES: dict[str, tuple[Callable[[Path, Any], None], list[Any]]] = {
    **{f"config {key}": (in_config(key), ODD) for key in ("train.max_steps", "train.global_batch_size", "optim", "data")},
    **{f"metrics {tag}": (in_metrics(tag), ODD) for tag in ("step", "train/loss", "checkpoint/failed")},
    "metrics rate": (in_metrics("throughput/samples_per_s"), [0, 1e308, HUGE]),
    "metrics dead": (in_metrics("moe/dead_experts"), [math.nan, math.inf]),
    **{f"routes {key}": (in_routes(key), ODD) for key in ("timesteps", "space")},
    "versions": (in_versions, ODD),
    "config text": (text_in("config.yaml"), TEXTS + CONFIGS),
    "metrics text": (text_in("metrics.jsonl"), TEXTS),
    "metrics line": (more_in("metrics.jsonl"), ROWS),
    "versions text": (text_in("versions.json"), TEXTS),
    "routes text": (text_in("samples/step-00000400.routes.json"), TEXTS),
    "log text": (text_in("train.log"), TEXTS),
    "log line": (more_in("train.log"), LINES),
    "fifo": (fifo, ["train.log", "metrics.jsonl", "config.yaml", "versions.json", "samples/step-00000400.png"]),
    "folder": (folder, ["train.log", "metrics.jsonl", "config.yaml", "samples/step-00000400.routes.json"]),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", CASES)
def test_no_content_of_a_file_ends_in_a_traceback(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, values = CASES[name]
    good, run, page = plant(tmp_path / "good", grids=1), tmp_path / "run", tmp_path / "r.html"
    for value in values:
        shutil.copytree(good, run)
        change(run, value)
        page.unlink(missing_ok=True)
        codes = [report.main([str(run), "--out", str(page), "--cluster", "none"])]
        bundle = ["--bundle", str(tmp_path / "b.tar.gz"), "--cluster", "none"]
        codes.append(doctor.main([str(run), "--no-data", *bundle]))
        output = capsys.readouterr()
        assert codes[0] in (0, 2), (name, str(value)[:50])
        assert codes[1] in (0, 1), (name, str(value)[:50])
        assert output.err.count("\n") == (codes[0] == 2), output.err[:500]
        if codes[0] == 0:
            assert page.stat().st_size < MAX_BYTES
            data_of(page.read_text())  # can be parsed
        shutil.rmtree(run)


def test_value_of_the_wrong_type_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = plant(tmp_path / "run", options={"train.max_steps": "many", "train.log_every": [3]})
    assert doctor.main([str(run), "--no-data"]) == 0
    out = capsys.readouterr().out
    assert "config.yaml: train.max_steps=many is not a number; checks that need it are left out." in out
    assert "This version does not accept the run's configuration: train.max_steps=many" in out
    text = text_of_report(run, tmp_path)
    assert "At step 400 the learning rate is at 5% of its peak." in text
    assert "train.log_every=[3] is not a number" in text


def text_of_report(run: Path, tmp_path: Path) -> str:
    assert report.main([str(run), "--out", str(tmp_path / "r.html"), "--cluster", "none"]) == 0
    return text_of((tmp_path / "r.html").read_text())


def test_odd_line_of_metrics_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = plant(tmp_path / "run")
    more_in("metrics.jsonl")(run, '{"step": "400", "train/loss": 1}\n{"step": 410, "train/loss": "low", "optim/lr": 1e-5}')
    assert len(read_run(run).series["train/loss"]) == 40
    doctor.main([str(run), "--no-data"])
    out = capsys.readouterr().out
    assert "metrics.jsonl has lines without a step, which are left out (number: 1)." in out
    assert "metrics.jsonl has lines where train/loss is a string, which are left out (number: 1)." in out


def test_infinite_values_do_not_hide_the_mean(tmp_path: Path) -> None:
    rate = {"throughput/samples_per_s": lambda i: {38: math.inf, 39: -math.inf, 30: math.nan}.get(i, 40.0)}
    run = read_run(plant(tmp_path / "run", rate))
    assert run.last("throughput/samples_per_s", share=0.5) == 40.0
    assert read_run(plant(tmp_path / "none", {"val/loss": lambda i: math.nan})).last("val/loss") is None


def test_learning_rate_of_zero_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = plant(tmp_path / "run", {"optim/lr": lambda i: 0.0})
    assert "the learning rate is 0, as in all log lines." in text_of_report(run, tmp_path)
    assert doctor.main([str(run), "--no-data"]) == doctor.FOUND
    assert "The learning rate is 0 in all log lines" in capsys.readouterr().out


def test_figures_without_a_value_give_the_reason(tmp_path: Path) -> None:
    zero = plant(tmp_path / "zero", {"train/loss": lambda i: 0.0, "throughput/samples_per_s": lambda i: 0.0})
    examined = examine(zero, "none", with_data=False)
    assert "from 0 to 0 (mean of the last eighth of the log lines)" in summary.convergence(examined.run)
    assert summary.speed(examined) == "Unknown: the logged throughput is 0."


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("timesteps", [900.0, math.nan, 100.0]),
        ("timesteps", [900.0]),
        ("at", None),
        ("space", [[0, 1, 2, 3]]),
        ("time", [[0, 1, 2]] * 3),
        ("regions", [[[2, 2, "100"]] * 4] * 2),
        ("regions", [[[2, 2, "10x0"]] * 4] * 2),
        ("words", ["red", None]),
        ("image", 3),
    ],
)
def test_routes_that_the_page_cannot_draw_are_left_out_with_the_reason(key: str, value: Any, tmp_path: Path) -> None:
    assert checked_routes(routes()) == routes()
    run = plant(tmp_path / "run", grids=1)
    in_routes(key)(run, value)
    text = text_of_report(run, tmp_path)
    assert "Left out, because they cannot be used: step-00000400.routes.json (the values of" in text


def test_failing_planner_costs_the_prediction_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("division by zero")

    run = plant(tmp_path / "run")
    monkeypatch.setattr(run_facts, "compare", fail)
    examined = examine(run, "cpu", with_data=False)
    assert examined.plan == plan_comparison.measured_rows(examined.run)
    assert examined.plan_note == "the planner failed with ZeroDivisionError: division by zero"
    (run / "train.log").write_text(log_line(0, "INFO", "from scratch: runs/x, 0 ranks on cpu, ZeRO-2"))
    assert read_run(run).launch is None
