"""The size of the report: a budget for all runs together, what is left out is stated; and the names of runs."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raphael_dist.cli import report
from raphael_dist.errors import UserError
from raphael_dist.reporting import page as page_module
from raphael_dist.reporting import page_samples, series
from raphael_dist.reporting.page import IMAGE_BYTES, MAX_BYTES, ROUTES_BYTES, build_page, with_labels
from raphael_dist.reporting.page_samples import MAX_STEPS, MIN_SIDE, spread
from raphael_dist.reporting.run_facts import examine
from tests.lib.planted_run import BLOCKS, plant, routes
from tests.reporting.test_page import data_of, page_of, text_of


def with_grids(run: Path, count: int, side: int) -> Path:
    """Write sample grids of noise, the images that compress worst, with large routes."""
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    words = [f"word{number}" for number in range(20)]
    rows = {"words": words, "space": [[0] * BLOCKS] * 20, "regions": [[[32, 32, "01" * 512]] * BLOCKS] * 20}
    for step in range(1, count + 1):
        path = run / "samples" / f"step-{step:08d}.png"
        if step == 1:
            Image.fromarray(noise).save(path, compress_level=0)
        else:
            path.symlink_to("step-00000001.png")
        (run / "samples" / f"step-{step:08d}.routes.json").write_text(json.dumps(routes() | rows))
    return run


def test_page_of_several_runs_with_huge_grids_stays_small(tmp_path: Path) -> None:
    runs = [with_grids(plant(tmp_path / f"run{number}", grids=0), 12, 1100) for number in range(3)]
    page = page_of(tmp_path / "r.html", *runs)
    assert len(page.encode()) < MAX_BYTES
    data, text = data_of(page), text_of(page)
    assert [entries[-1]["step"] for entries in data["samples"]] == [12] * 3
    assert all(len(entries) == 12 for entries in data["samples"])  # scaled down, none is left out
    assert sum(len(json.dumps(entries)) for entries in data["samples"]) < IMAGE_BYTES
    assert all(0 < len(entries) < 12 and entries[-1]["step"] == 12 for entries in data["routes"])
    assert sum(len(json.dumps(entries)) for entries in data["routes"]) < 1.1 * ROUTES_BYTES
    assert text.count("The images are scaled down; the original ones are in") == 3
    shown = len(data["routes"][0])
    assert f"{shown} of 12 steps with routes are shown, because the size of this page is limited." in text


def test_middle_steps_are_left_out_first(tmp_path: Path) -> None:
    run = with_grids(plant(tmp_path / "run", grids=0), 30, 200)
    page = page_of(tmp_path / "r.html", run)
    steps = [entry["step"] for entry in data_of(page)["samples"][0]]
    assert len(steps) == MAX_STEPS
    assert (steps[0], steps[-1]) == (1, 30)
    assert f"{MAX_STEPS} of 30 sample grids are shown, because the size of this page is limited." in text_of(page)
    assert "scaled down" not in text_of(page)


@pytest.mark.parametrize(("limit", "count"), [(100_000, 8), (25_000, 2), (13_000, 1), (500, 0)])
def test_grids_fit_into_any_budget(limit: int, count: int, tmp_path: Path) -> None:
    run = with_grids(plant(tmp_path / "run", grids=0), 12, 1000)
    data: dict = {"samples": []}
    html = page_samples.samples_section([examine(run, "none", with_data=False)], data, limit)
    grids = data["samples"][0] if count else []
    assert len(json.dumps(data)) < limit
    assert len(grids) == count
    assert f"{count} of 12 sample grids are shown" in html


def test_image_that_fits_nowhere_is_none() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 300, 3), np.uint8))
    jpeg, side = page_samples._jpeg_within(noise, 6_000)
    assert jpeg is not None
    assert len(jpeg) <= 6_000
    assert max(Image.open(io.BytesIO(jpeg)).size) == side
    assert MIN_SIDE <= side < 900
    assert page_samples._jpeg_within(noise, 100)[0] is None
    assert max(noise.size) == 900  # unchanged


def test_spread_has_first_and_last() -> None:
    assert [spread(range(10), count) for count in (0, 1, 2, 3, 10, 20)] == [
        [], [9], [0, 9], [0, 4, 9], list(range(10)), list(range(10)),
    ]  # fmt: skip


def test_curves_of_many_runs_are_thinned_and_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [plant(tmp_path / f"run{number}", grids=0) for number in range(2)]
    assert "A curve has at most" not in page_of(tmp_path / "all.html", *runs)
    monkeypatch.setattr(series, "POINTS", 400)
    page = page_of(tmp_path / "few.html", *runs)
    assert "A curve has at most 16 points" in text_of(page)
    curves = [curve for chart in data_of(page)["charts"] for curve in chart["curves"]]
    assert max(len(curve["x"]) for curve in curves) <= 16


def test_too_many_runs_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examined = examine(plant(tmp_path / "run", grids=0), "none", with_data=False)
    assert len(build_page([examined] * 40).encode()) < MAX_BYTES
    monkeypatch.setattr(page_module, "MAX_BYTES", 300_000)
    with pytest.raises(UserError, match=r"the curves and tables of 40 runs take .* MB\. Name fewer runs"):
        build_page([examined] * 40)


def test_long_texts_are_shortened(tmp_path: Path) -> None:
    options = {"run.project": "p" * 300_000}
    log = [(5.0 + i / 1000, "WARNING", f"step {i} was skipped, because {'x' * 2000}") for i in range(500)]
    page = page_of(tmp_path / "r.html", plant(tmp_path / "a", log=log, options=options), plant(tmp_path / "b"))
    assert len(page) < 500_000
    assert "p... (300000 characters)" in page
    assert "The last 100 of 502 events are listed." in text_of(page)


# ---- names of runs --------------------------------------------------------------------------------------------------


def test_runs_of_equal_folder_names_are_distinguished(tmp_path: Path) -> None:
    runs = [plant(tmp_path / name, options={"optim.lr": lr}) for name, lr in (("a/run", 0.002), ("b/run", 0.004))]
    page = page_of(tmp_path / "r.html", *runs)
    text = text_of(page)
    assert "Report of a/run, b/run" in text
    assert "(a/run / b/run) optim.lr: 0.002 / 0.004." in text
    assert "Did it converge? a/run: It has levelled off" in text
    labels = {curve["label"] for chart in data_of(page)["charts"] for curve in chart["curves"]}
    assert {"a/run: training", "b/run: training", "a/run: step", "b/run: step"} <= labels


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        (["x/one"], ["one"]),
        (["x/one", "x/two"], ["one", "two"]),
        (["x/run", "y/run", "y/two"], ["x/run", "y/run", "two"]),
        (["p/x/run", "q/x/run", "q/z/run"], ["p/x/run", "q/x/run", "z/run"]),
        (["x/run", "x/../x/run"], ["run", "run (2)"]),
    ],
)
def test_label_is_the_shortest_distinguishing_path(folders: list[str], labels: list[str], tmp_path: Path) -> None:
    one = examine(plant(tmp_path / "planted", grids=0), "none", with_data=False)
    runs = [replace(one, run=replace(one.run, folder=tmp_path / folder)) for folder in folders]
    assert [examined.run.name for examined in with_labels(runs)] == labels


def test_folder_name_that_is_not_unicode_is_shown(tmp_path: Path) -> None:
    run = plant(tmp_path / "one").rename(tmp_path / "caf\udce9")
    assert report.main([str(run), str(plant(tmp_path / "two")), "--out", str(tmp_path / "r.html"), "--cluster", "none"]) == 0
    assert "caf\\udce9" in (tmp_path / "r.html").read_text()


def test_budget_adds_up() -> None:
    assert IMAGE_BYTES + ROUTES_BYTES < page_module.MAX_BYTES
