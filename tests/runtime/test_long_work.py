"""Long work: no rank waits for it in a collective, and none waits for ever. With real ranks."""

import os
from pathlib import Path

import pytest

from raphael_dist import train
from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.errors import EXIT_HUNG, HungError


def results(folder: Path, ranks: list[int]) -> list[tuple[float, str]]:
    """Return the seconds and the outcome of each rank."""
    lines = [(folder / f"result-{rank}.txt").read_text().split(" ", 1) for rank in ranks]
    return [(float(seconds), text) for seconds, text in lines]


@pytest.mark.parametrize("at", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_long_work_may_exceed_the_time_out_of_collectives(forks, tmp_path, at):
    forks.must(tmp_path, 3, worker="long_work", case="long", at=at, collective_s=4)
    for rank, (seconds, text) in enumerate(results(tmp_path, [0, 1, 2])):
        assert text == f"done by rank {rank}"
        assert seconds > 5.5, "the others continued before the work was done"


def test_slow_save_may_exceed_the_time_out_of_collectives(forks, tmp_path):
    forks.must(tmp_path, 2, worker="slow_save", at=1, collective_s=4, seconds=8)
    saved = CheckpointReader(tmp_path / "checkpoints" / "step-00000001")
    assert saved.integrity_error() is None
    assert len(saved.manifest["files"]) == 2


def test_result_of_rank_0_is_returned_on_all_ranks(forks, tmp_path):
    forks.must(tmp_path, 3, worker="long_work", case="long", at=0, collective_s=4, share=True)
    assert [text for _, text in results(tmp_path, [0, 1, 2])] == ["done by rank 0"] * 3


def test_stopped_rank_is_named_with_its_last_report(forks, tmp_path):
    codes = forks.run(tmp_path, 3, worker="long_work", case="stops", at=1, collective_s=60, silence_s=3)
    assert codes == [EXIT_HUNG, -9, EXIT_HUNG]
    for seconds, text in results(tmp_path, [0, 2]):
        assert seconds < 30
        assert "no sign of progress for 3 s from rank 1 on " in text
        assert text.endswith(": indexing: shard 3 of 7")


def test_ranks_end_when_the_owner_of_the_store_stops(forks, tmp_path):
    """Requests to the store have no time-out, and the store lives in rank 0."""
    codes = forks.run(tmp_path, 3, worker="long_work", case="stops", at=0, collective_s=60, silence_s=3)
    assert codes == [-9, EXIT_HUNG, EXIT_HUNG]
    for seconds, text in results(tmp_path, [1, 2]):
        assert seconds < 30
        assert "rank 0" in text
        assert text.endswith(": indexing: shard 3 of 7")


@pytest.mark.parametrize("at", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_failure_of_one_rank_ends_the_work_of_all(forks, tmp_path, at):
    codes = forks.run(tmp_path, 3, worker="long_work", case="fails", at=at, collective_s=30)
    assert codes == [2, 2, 2]
    for seconds, text in results(tmp_path, [0, 1, 2]):
        assert text == "UserError: data.shards: no such shard"
        assert seconds < 20, "the work of the others continued"


def test_hang_in_long_work_ends_the_command_with_exit_code_76(monkeypatch, tmp_path, capsys):
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
def test_user_error_of_any_rank_is_left_in_the_exit_file(monkeypatch, tmp_path, rank):
    """srun then ends the other ranks, perhaps rank 0 before it printed the error, which exits with the signal's code."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("RAPHAEL_EXIT_FILE", str(tmp_path / "code"))
    assert train.main(["--config=emoji-tiny", "train.max_step=1"]) == 2
    assert (tmp_path / "code").read_text() == "2\n"
