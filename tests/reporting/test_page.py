"""The HTML report: sections and sentences, its size, bad input; and in a real browser: figures, sliders, routes."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raphael_dist.cli import report
from raphael_dist.reporting import summary
from raphael_dist.reporting.page import MAX_BYTES, SECTIONS, build_page
from raphael_dist.reporting.plan_comparison import PlanRow
from raphael_dist.reporting.run_events import UNCLEAN, Event, History
from raphael_dist.reporting.run_facts import examine
from raphael_dist.reporting.series import BUCKETS, thinned, timeline_data
from tests.lib.planted_run import plant, routes

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
START = (
    "resumed at step 100: runs/x, 87 images, 2 ranks on cpu, ZeRO-2, global batch 16, micro-batch 8, micro-steps per step: 1"
)


def page_of(out: Path, *runs: Path) -> str:
    assert report.main([*map(str, runs), "--out", str(out), "--cluster", "none"]) == 0
    return out.read_text()


def text_of(page: str) -> str:
    """Return the text that a reader sees."""
    words: list[str] = []

    class Reader(HTMLParser):
        hidden = 0

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.hidden += tag in ("script", "style")

        def handle_endtag(self, tag: str) -> None:
            self.hidden -= tag in ("script", "style")

        def handle_data(self, data: str) -> None:
            words.append("" if self.hidden else data)

    Reader().feed(page)
    return " ".join(" ".join(words).split())


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A healthy run, and one of another learning rate with a dead expert that waits for data and failed."""
    folder = tmp_path_factory.mktemp("runs")
    bad = {"moe/space/L02/load_min": lambda i: 0.0, "time/data_wait_frac": lambda i: 0.4}
    failed = [(10.5, "INFO", START), (12.5, "WARNING", "step 120 was skipped, because the loss is not finite")]
    return [plant(folder / "one"), plant(folder / "two", bad, failed, {"optim.lr": 0.004}, grids=0)]


def test_reader_can_answer_from_the_text_alone(two_runs: list[Path], tmp_path: Path) -> None:
    text = text_of(page_of(tmp_path / "r.html", *two_runs))
    for answer in (
        "Did it converge? one: It has levelled off: the training loss went from 1 to 0.3",
        "At step 400 of 400 the learning rate is at 5% of its peak.",
        "Is any expert dead? one: No expert is dead",
        "two: Yes, at least one in each of these: space experts in blocks 2.",
        "What limits its speed? one: Computation and communication. 40 images per second.",
        "two: Waiting for data, most of it for decoding",
        "How often did it fail? one: Never: no fault is in the logs. Starts: 1. The run is complete at step 400.",
        "two: Faults: 2 (killed or crashed: 1, skipped step: 1). Starts: 2.",
        "What differs between the runs? (one / two) optim.lr: 0.002 / 0.004.",
    ):
        assert answer in text, answer
    assert [title for title in SECTIONS.values() if title not in text] == []
    assert "There is no sample grid" in text
    assert "The run has no routes" in text


def test_noise_is_not_taken_for_an_answer(tmp_path: Path) -> None:
    """A loss that jumps between lines has not levelled off, and a run far slower than its plan says so."""
    noisy = plant(tmp_path / "noisy", {"train/loss": lambda i: 1.5 if i == 0 else 0.5 + 0.15 * (i * 7 % 5 - 2) + 0.01 * i})
    examined = examine(noisy, with_data=False, cluster="none")
    assert summary.convergence(examined.run).startswith("Unclear, the loss varies more between log lines than it changes")
    slow = replace(examined, plan=[PlanRow("images per second", 40.0, 100.0)])
    assert "The planner predicts 100 images per second" in summary.speed(slow)
    assert "The planner predicts" not in summary.speed(replace(examined, plan=[PlanRow("images per second", 40.0, 70.0)]))


def test_page_is_small_and_asks_no_server(tmp_path: Path) -> None:
    run = plant(tmp_path / "run", grids=0)
    noise = np.random.default_rng(0).integers(0, 255, (1400, 1400, 3), np.uint8)  # the images that compress worst
    Image.fromarray(noise).save(tmp_path / "noise.png", compress_level=0)
    for step in range(1, 61):
        (run / "samples" / f"step-{step:08d}.png").symlink_to(tmp_path / "noise.png")
        big = routes() | {"words": ["a"] * 40, "space": [[0] * 4] * 40, "regions": [[[32, 32, "01" * 512]] * 4] * 40}
        (run / "samples" / f"step-{step:08d}.routes.json").write_text(json.dumps(big))
    page = page_of(tmp_path / "r.html", run)
    assert 1_000_000 < len(page.encode()) < MAX_BYTES
    body = re.sub(r"/\*!? ?https://github\S+.*?\*/", "", page)  # the name in uPlot's licence comment
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(http""", body)
    assert "default-src 'none'" in page


def test_text_of_others_cannot_become_markup(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script>"
    run = plant(
        tmp_path / "run", log=[(2.5, "WARNING", f"step 20 was skipped, because {hostile}")], options={"run.project": hostile}
    )
    (run / "samples" / "step-00000400.routes.json").write_text(json.dumps(routes() | {"prompt": hostile}))
    page = page_of(tmp_path / "r.html", run)
    assert hostile not in page
    assert page.count("<script") == 3


def test_secrets_of_addresses_are_hidden(tmp_path: Path) -> None:
    run = plant(tmp_path / "run", options={"data.shards": ["https://me:hunter2@host/a.tar"]})
    assert "hunter2" not in page_of(tmp_path / "r.html", run)


def test_options_that_differ_are_marked(two_runs: list[Path], tmp_path: Path) -> None:
    page = page_of(tmp_path / "r.html", *two_runs)
    marked = re.findall(r'<tr class="bad"><td>([a-z_]+\.[a-z_]+)</td><td class=n>(.*?)</td><td class=n>(.*?)</td>', page)
    assert marked == [("optim.lr", "0.002", "0.004")] * 2  # among the options that differ, and among all
    assert "1 option with different values (marked)." in text_of(page)
    assert "No option differs." in text_of(page_of(tmp_path / "same.html", two_runs[0], two_runs[0]))
    assert "differ (marked)" not in page_of(tmp_path / "one.html", two_runs[0])


def test_versions_that_differ_are_marked(two_runs: list[Path], tmp_path: Path) -> None:
    other = plant(tmp_path / "other", grids=0)
    (other / "versions.json").write_text(json.dumps({"python": "3.11", "torch": "2.12", "numpy": "2.3"}))
    section = page_of(tmp_path / "r.html", two_runs[0], other).partition('<section id="versions">')[2]
    rows = re.findall(r'<tr(?: class="(.*?)")?><td>(.*?)</td><td.*?>(.*?)</td><td.*?>(.*?)</td>', section)
    assert rows == [
        ("", "python", "3.11", "3.11"),
        ("bad", "torch", "2.13", "2.12"),
        ("bad", "numpy", "absent", "2.3"),
    ]


def test_timeline_has_each_start_and_fault_at_its_minute_and_step() -> None:
    begin = datetime(2026, 1, 1, 12)
    at = lambda minute, kind, step: Event(begin + timedelta(minutes=minute), kind, step, "")  # noqa: E731
    events = [
        at(0, "start", 0), at(3, "saved", 20), at(4.5, UNCLEAN, 30), at(6, "restart", 20), at(7, "skipped step", 25),
        at(9, "stopped", 40),
    ]  # fmt: skip
    progress = [(begin + timedelta(minutes=minute), step) for minute, step in ((1, 10), (4, 30), (6, 20), (8, 40))]
    assert timeline_data([("run", History(events, progress))]) == [
        {"label": "step", "kind": "step", "x": [1, 4, 6, 8], "y": [10, 30, 20, 40]},
        {"label": "restart", "kind": "restart", "x": [6], "y": [20]},
        {"label": "fault", "kind": "fault", "x": [4.5, 7], "y": [30, 25]},
    ]
    curves = timeline_data([("a", History(events[:1], progress)), ("b", History([], []))])
    assert [curve["label"] for curve in curves] == ["a: step"]


def test_plan_is_compared_with_the_run(two_runs: list[Path], tmp_path: Path) -> None:
    examined = examine(two_runs[0], "none", with_data=False)
    assert "There is no prediction: --cluster none" in text_of(build_page([examined]))
    rows = [PlanRow("images per second", 40.0, 80.0), PlanRow("peak memory of a rank, GiB", 1.5, None)]
    text = text_of(build_page([replace(examined, plan=rows, plan_note="")]))
    assert "quantity measured planned measured / planned images per second 40 80 0.50" in text
    assert "peak memory of a rank, GiB 1.5 unknown unknown" in text
    assert "There is no prediction" not in text


def test_entropies_of_loads_and_of_gates_are_named_apart(tmp_path: Path) -> None:
    run = plant(tmp_path / "run", {"moe/space/gate_entropy": lambda i: 0.5})
    page = page_of(tmp_path / "r.html", run)
    titles = re.findall(r"<figcaption>(Entropy .*?)</figcaption>", page)
    assert titles == [
        "Entropy of the experts&#x27; loads (1: even)",
        "Entropy of the gates&#x27; probabilities (1: undecided, 0: certain)",
    ]


@pytest.mark.parametrize("name", ["config.yaml", "versions.json", "train.log", "samples"])
def test_section_says_what_is_missing(name: str, tmp_path: Path) -> None:
    run = plant(tmp_path / "run")
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    sentences = {
        "config.yaml": "config.yaml is not in the run directory.",
        "versions.json": "There is no versions.json.",
        "train.log": "There is no train.log: starts, stops and faults are unknown.",
        "samples": "There is no sample grid",
    }
    assert sentences[name] in text_of(page_of(tmp_path / "r.html", run))


NULL = '{"step": 1, "train/loss": null}\n'


@pytest.mark.parametrize("content", [None, "", "half a li", "[1]\n3\n", NULL])
def test_run_without_metrics_is_one_line(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = plant(tmp_path / "run")
    (run / "metrics.jsonl").unlink() if content is None else (run / "metrics.jsonl").write_text(content)
    assert report.main([str(run), "--out", str(tmp_path / "r.html"), "--cluster", "none"]) == 2
    err = capsys.readouterr().err
    assert "a report requires metrics.jsonl with at least one line, but the run has no such line" in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_out_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = plant(tmp_path / "run")
    (tmp_path / "file").write_text("")
    for out, part in (("r.txt", "must end in .html"), ("file/r.html", "cannot be written")):
        assert report.main([str(run), "--out", str(tmp_path / out), "--cluster", "none"]) == 2
        assert part in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_damaged_grids_and_routes_are_left_out(tmp_path: Path) -> None:
    run = plant(tmp_path / "run", grids=3)
    (run / "samples" / "step-00000133.png").write_bytes(b"\x89PNG broken")
    (run / "samples" / "step-00000133.routes.json").write_text("[]")
    data = data_of(page_of(tmp_path / "r.html", run))
    assert [entry["step"] for entry in data["samples"][0]] == [266, 400]
    assert [entry["step"] for entry in data["routes"][0]] == [266, 400]


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found
    return json.loads(found[1])


def test_thinned_curve_keeps_spikes_and_order() -> None:
    series = [(step, 1.0) for step in range(10_000)]
    series[5000] = (5000, 99.0)
    thin = thinned(series)
    assert len(thin) <= 2 * BUCKETS
    assert (5000, 99.0) in thin
    assert thin == sorted(thin)
    assert thinned(series[:300]) == series[:300]


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs a browser: Debian's package chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_browser_draws_every_figure_without_an_error(browser: Any, two_runs: list[Path], tmp_path: Path, width: int) -> None:
    page_of(tmp_path / "r.html", *two_runs)
    page = browser.new_page(viewport={"width": width, "height": 800})
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    page.goto((tmp_path / "r.html").as_uri())
    figures = page.locator("figure[data-chart]")
    assert figures.count() == 12
    for number in range(figures.count()):
        assert figures.nth(number).locator("canvas").count() == 1
        assert is_drawn(figures.nth(number))
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
    assert page.locator("img.grid").evaluate("image => image.complete && image.naturalWidth") == 200
    assert problems == []
    page.close()


def is_drawn(figure: Any) -> bool:
    """Return whether a curve or points are drawn: coloured pixels."""
    script = """figure => {
        const canvas = figure.querySelector("canvas");
        const d = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        for (let i = 0; i < d.length; i += 4)
            if (d[i + 3] > 200 && Math.max(d[i], d[i + 1], d[i + 2]) - Math.min(d[i], d[i + 1], d[i + 2]) > 60) return true;
        return false; }"""
    return bool(figure.evaluate(script))


def test_sliders_and_routes_can_be_clicked_through(browser: Any, two_runs: list[Path], tmp_path: Path) -> None:
    page_of(tmp_path / "r.html", *two_runs)
    page = browser.new_page()
    page.goto((tmp_path / "r.html").as_uri())
    samples = page.locator("[data-samples]")
    assert "step 400 (2 of 2)" in samples.inner_text()
    samples.locator("input").fill("0")
    assert "step 200 (1 of 2)" in samples.inner_text()
    box = page.locator("[data-routes]")
    for name in ("heart", "2: 1", "500: 1"):
        box.get_by_role("button", name=name, exact=True).click()
    path = '"heart" → region of 75% in block 2 (at timestep 400) → space expert 1 → timestep 500: time expert 1'
    assert box.locator(".path").inner_text() == path
    assert "a red <heart>" in box.inner_text()
    page.close()
