"""Files in a folder of the user that are not used are counted, and a folder that cannot be listed is refused."""

import errno
import os
from pathlib import Path

import pytest

from raphael_dist.data.folder_files import files_below
from raphael_dist.data.image import IMAGE_SUFFIXES
from raphael_dist.data_prep.caption_tables import find_table
from raphael_dist.data_prep.inputs import parts_of
from raphael_dist.errors import UserError
from tests.data.shards.test_shards import good, write_shard
from tests.data_prep.test_data_prep import draw, folder_of

HIDDEN = "hidden file or folder of the system"


def counts(folder: Path) -> dict[str, tuple[int, str]]:
    skipped = parts_of([str(folder)], 10, 0.0, None)[0].skipped
    return {reason.partition(";")[0]: count for reason, count in skipped.counts.items()}


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_unused_archives_next_to_shards_are_counted(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [good(0)])
    touch(tmp_path, "B.TAR", "sub/c.tar", "d.tar.zst", "._a.tar", "notes.txt")
    draw(0)[0].save(tmp_path / "e.png")
    assert counts(tmp_path) == {
        "archive whose name does not end in .tar, .tar.gz or .tgz": (2, "B.TAR"),
        "archive in a subfolder": (1, "sub/c.tar"),
        HIDDEN: (1, "._a.tar"),
        "image in a folder with tars": (1, "e.png"),
    }


def test_archives_and_texts_without_image_are_counted(tmp_path: Path) -> None:
    folder_of(tmp_path, 2)
    touch(tmp_path, "b.txt", "sub/z.tar", "sub/y.zip", "sub/c.json", ".b.txt", "d.gif", "d.txt")
    assert counts(tmp_path) == {
        "archive in a folder of images": (2, "sub/y.zip"),
        "txt or json without an image of the same name": (2, "b.txt"),
        "image in another format than " + ", ".join(IMAGE_SUFFIXES): (1, "d.gif"),
    }


def test_subfolder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path, 2)
    folder_of(tmp_path / "private", 2)
    list_folder = os.scandir

    def deny(path: str) -> object:  # a root user may list every folder
        if Path(path).name in ("private", "lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(UserError, match=rf"^{tmp_path}/private must be a folder that can be listed.*Permission denied"):
        counts(tmp_path)
    (tmp_path / "private").rename(tmp_path / "lost+found")
    assert counts(tmp_path) == {}


def test_hidden_tables_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "._captions.csv", ".ipynb_checkpoints/a-checkpoint.parquet", ".old.arrow")
    assert find_table(tmp_path, files_below(tmp_path)) is None
    (tmp_path / "captions.csv").write_text("file,text\na.png,a\n")
    table = find_table(tmp_path, files_below(tmp_path))
    assert table is not None
    assert table[0].name == "captions.csv"
