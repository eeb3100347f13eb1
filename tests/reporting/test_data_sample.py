"""The doctor's look at the training data: sources and their weights, remote and missing shards, long captions."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raphael_dist.cli import doctor
from raphael_dist.config.schema import Config, config_from_tree, load_config
from raphael_dist.errors import UserError
from raphael_dist.reporting import data_sample
from raphael_dist.reporting.data_sample import sample_data
from tests.data.shards.test_shards import write_shard
from tests.lib.planted_run import plant

LONG = " ".join(["word"] * 60)


def shard(path: Path, count: int, seed: int, caption: str = "a red heart") -> str:
    """Write a shard with images of noise of 8 x 8 cells; `seed` decides which."""
    samples = []
    for number in range(count):
        cells = np.random.default_rng([seed, number]).integers(0, 255, (8, 8, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(cells).resize((64, 64), Image.Resampling.NEAREST).save(file, "PNG")
        samples.append((f"{number:04d}", {"png": file.getvalue(), "txt": caption.encode()}))
    return str(write_shard(path, samples))


def config_of(**data: object) -> Config:
    tree = load_config("emoji-tiny").model_dump(mode="json")
    tree["edge"]["weight"] = 0
    return config_from_tree({**tree, "data": {**tree["data"], "shards": [], "sources": [], **data}})


def test_samples_are_divided_among_sources_by_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_sample, "COUNT", 16)
    names = [shard(tmp_path / f"{name}.tar", 20, seed) for seed, name in enumerate(("a", "b", "c"))]
    weights = [12.0, 3.0, 0.1]
    sources = [{"shards": [name], "weight": weight} for name, weight in zip(names, weights, strict=True)]
    counts = []
    inspected = data_sample._inspect

    def counting(config: Config, patterns: list[str], count: int) -> object:
        counts.append((Path(patterns[0]).name, count))
        return inspected(config, patterns, count)

    monkeypatch.setattr(data_sample, "_inspect", counting)
    result = sample_data(config_of(sources=sources))
    assert counts == [("a.tar", 13), ("b.tar", 3), ("c.tar", 1)]
    assert (result.samples, result.duplicates, result.captions, result.truncated) == (17, 0, 17, 0)
    assert result.notes == ()


def test_duplicates_and_long_captions_of_every_source_count(tmp_path: Path) -> None:
    one, two = shard(tmp_path / "a.tar", 10, 0), shard(tmp_path / "b.tar", 10, 0, caption=LONG)
    result = sample_data(config_of(sources=[{"shards": [one]}, {"shards": [two]}]))
    assert (result.samples, result.duplicates) == (20, 10)
    assert (result.captions, result.truncated) == (20, 10)


def test_source_that_cannot_be_read_is_named_and_the_others_are_checked(tmp_path: Path) -> None:
    local = shard(tmp_path / "a.tar", 5, 0)
    sources = [{"shards": shards} for shards in (["https://host/b.tar"], [local], [str(tmp_path / "absent.tar")])]
    result = sample_data(config_of(sources=sources))
    assert result.samples == 5
    remote, absent = result.notes
    assert remote.startswith("Samples were not checked: data.sources=['https://host/b.tar'] has only remote addresses")
    assert absent.startswith("Samples were not checked: data.sources=")
    assert "absent.tar" in absent
    with pytest.raises(UserError, match="only remote addresses"):
        sample_data(config_of(sources=sources[:1]))


def test_encoder_that_is_absent_costs_the_count_of_tokens_only(tmp_path: Path) -> None:
    config = config_of(shards=[shard(tmp_path / "a.tar", 5, 0)])
    config = config.model_copy(update={"text": config.text.model_copy(update={"encoder": str(tmp_path / "none")})})
    result = sample_data(config)
    assert (result.samples, result.truncated) == (5, None)
    assert result.notes[0].startswith("The tokens of captions were not counted: text.encoder=")


def test_doctor_reports_long_captions_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [{"shards": [shard(tmp_path / "a.tar", 8, 0, LONG)], "weight": 1.0}, {"shards": ["absent.tar"], "weight": 1.0}]
    run = plant(tmp_path / "run", options={"data.shards": [], "data.sources": sources})
    assert doctor.main([str(run)]) == doctor.FOUND
    out = capsys.readouterr().out
    assert "1. 100% of the captions (8 of 8 in the checked samples) are longer than text.max_tokens=28" in out
    assert "Samples were not checked: data.sources='absent.tar'" in out


def test_data_that_cannot_be_decoded_costs_only_its_own_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: Config) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(data_sample, "sample_data", fail)
    assert doctor.main([str(plant(tmp_path / "run"))]) == 0
    out = capsys.readouterr().out
    assert "in the data were not checked: ZeroDivisionError: division by zero." in out
