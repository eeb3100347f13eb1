"""Long work: nobody waits for it in a collective, and nobody waits for ever. With real ranks."""

import os
from pathlib import Path

import pytest

from raphael_dist import train
from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.errors import EXIT_HUNG, HungError


def results(folder: Path, ranks: list[int]) -> list[tuple[float, str]]:
    """Return the seconds and the outcome of each rank."""
    found = [(folder / f"result-{rank}.txt").read_text().split(" ", 1) for rank in ranks]
    return [(float(seconds), text) for seconds, text in found]


@pytest.mark.parametrize("at", [0, 1])
def test_a_rank_may_work_longer_than_a_collective_may_wait(forks, tmp_path, at):
    forks.must(tmp_path, 3, worker="long_work", case="long", at=at, collective_s=2)
    for rank, (seconds, text) in enumerate(results(tmp_path, [0, 1, 2])):
        assert text == f"done by rank {rank}"
        assert seconds > 6, "the others went on before the work was done"


def test_a_disk_may_take_longer_to_save_than_a_collective_may_wait(forks, tmp_path):
    forks.must(tmp_path, 2, worker="slow_save", at=1, collective_s=3, seconds=6)
    saved = CheckpointReader(tmp_path / "checkpoints" / "step-00000001")
    assert saved.damage() is None
    assert len(saved.manifest["files"]) == 2


def test_what_rank_0_returns_reaches_all(forks, tmp_path):
    forks.must(tmp_path, 3, worker="long_work", case="long", at=0, collective_s=2, share=True)
    assert [text for _, text in results(tmp_path, [0, 1, 2])] == ["done by rank 0"] * 3


def test_a_rank_that_stops_is_named_with_what_it_did(forks, tmp_path):
    codes = forks.run(tmp_path, 3, worker="long_work", case="stops", at=1, collective_s=60, silence_s=3)
    assert codes == [EXIT_HUNG, -9, EXIT_HUNG]
    for seconds, text in results(tmp_path, [0, 2]):
        assert seconds < 30
        assert "no sign of progress for 3 s from rank 1 on " in text
        assert text.endswith(": indexing: shard 3 of 7")


def test_the_ranks_end_when_the_one_that_keeps_the_store_stops(forks, tmp_path):
    """Requests to the store have no time-out, and the store lives in rank 0."""
    codes = forks.run(tmp_path, 3, worker="long_work", case="stops", at=0, collective_s=60, silence_s=3)
    assert codes == [-9, EXIT_HUNG, EXIT_HUNG]
    for seconds, text in results(tmp_path, [1, 2]):
        assert seconds < 30
        assert "rank 0" in text
        assert text.endswith(": indexing: shard 3 of 7")


@pytest.mark.parametrize("at", [0, 2])
def test_a_failure_reaches_all_and_stops_their_work(forks, tmp_path, at):
    codes = forks.run(tmp_path, 3, worker="long_work", case="fails", at=at, collective_s=30)
    assert codes == [2, 2, 2]
    for seconds, text in results(tmp_path, [0, 1, 2]):
        assert text == "UserError: data.shards: no such shard"
        assert seconds < 20, "the work of the others went on"


def test_the_command_leaves_at_once_with_the_code_of_a_hang(monkeypatch, tmp_path, capsys):
    """Even when its threads still wait for the rank that hangs."""

    class LeftError(BaseException):
        pass

    def hang(*_):
        raise HungError("indexing: no sign of progress for 3 s from rank 1 on node7")

    def leave(code):
        raise LeftError(code)

    monkeypatch.setattr(train, "run", hang)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setenv("RAPHAEL_EXIT_FILE", str(tmp_path / "code"))
    with pytest.raises(LeftError, match=str(EXIT_HUNG)):
        train.main(["--config=emoji-tiny", f"run.dir={tmp_path}"])
    assert (tmp_path / "code").read_text() == f"{EXIT_HUNG}\n"
    assert "error on rank 0: indexing: no sign of progress for 3 s from rank 1 on node7" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_mistake_is_told_by_whichever_rank_finds_it_first(monkeypatch, tmp_path, rank):
    """srun ends the others then, rank 0 before it has said anything, and its own code is that of the signal."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("RAPHAEL_EXIT_FILE", str(tmp_path / "code"))
    assert train.main(["--config=emoji-tiny", "train.max_step=1"]) == 2
    assert (tmp_path / "code").read_text() == "2\n"
