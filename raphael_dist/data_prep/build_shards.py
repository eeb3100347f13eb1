"""Writes prepared shards: decodes each image once, adds edge maps and, on request, encoded images and captions (features).

A *part* is the input of one shard (inputs.py). For each part, the complete shard NAME.tar is written first, then a report,
NAME.json. A restarted command skips the parts that have a report.
"""

import fcntl
import glob
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from webdataset import TarWriter

from raphael_dist.config.schema import Config
from raphael_dist.data.features.batch_encoder import Encoders
from raphael_dist.data.features.cache_build import ShardBuilder, sample_of
from raphael_dist.data.features.hed import EdgeEncoder, canny_edges
from raphael_dist.data.features.packing import seal
from raphael_dist.data.image import decode_image, reason_of
from raphael_dist.data.open_streams import dataset_of, stores_text
from raphael_dist.data.prefetch import Prefetcher
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.dataset_index import BadSample
from raphael_dist.data.shards.skipped import SkipCounts, most_common_reasons
from raphael_dist.data.shards.tar_scan import EDGE_EXT, FEATURES_EXT, IMAGE_EXTS
from raphael_dist.data_prep.inputs import Part, RawSample
from raphael_dist.errors import UserError
from raphael_dist.storage.files import atomic_path
from raphael_dist.storage.tensorfile import save_tensors
from raphael_dist.text import counted

EDGE_AREA = 512 * 512  # pixels of the image for edge maps; training uses averages over areas
_SHOWN = 3


@dataclass(frozen=True)
class ShardReport:
    """The result of writing one shard (tar file of samples).

    Attributes:
        written: Number of samples in the shard.
        bad: (name, reason) of each sample that was left out. The name is that of the image file or, if the input is a
            shard, the key of the sample.
        skipped: Input files that belong to no sample: from the reason to (how many, name of the first one).
    """

    written: int
    bad: list[tuple[str, str]]
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)


class Preparer:
    """Writes shards (tar files of samples) with edge maps into a folder: one shard for each `Part`, which is its input."""

    def __init__(
        self, out: Path, edges: str, hed: EdgeEncoder | None, config: Config | None, encoders: Encoders | None
    ) -> None:
        """Create the preparer.

        Args:
            out: The output folder.
            edges: Where edge maps come from: "hed" or "canny" (computed by this detector), "stored" (the input has them), or
                "none" (no edge maps).
            hed: The edge detector if `edges` is "hed", else None.
            config: Settings for encoding the samples, such as image sizes. None if nothing is encoded.
            encoders: Encode images and captions, which are then also stored encoded. None: nothing is encoded.
        """
        self.out, self.edges, self._hed, self._config, self._encoders = out, edges, hed, config, encoders
        about: list[object] = [edges, None if hed is None else hed.fingerprint]
        if config is not None and encoders is not None:
            about += [encoders.text.fingerprint, encoders.image.fingerprint, config.image.model_dump(mode="json")]
            about += [config.data.flip, config.data.cached_text, config.data.caption_from, config.data.caption_weights]
        self._settings = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def finished_report(self, part: Part) -> ShardReport | None:
        """Return the stored report about the shard of `part`; None if this shard is not completely written yet.

        `part`: the input of one shard. Raises UserError if the shard was written with other settings or from other input.
        """
        try:
            about = json.loads((self.out / f"{part.name}.json").read_text())
            skipped = SkipCounts(about.get("skipped")).counts
            report = ShardReport(about["written"], [(key, reason) for key, reason in about["bad"]], skipped)
            fingerprint = about["input"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if about.get("settings") != self._settings:
            raise UserError(
                f"--out={self.out} must not contain shards that were made with other settings, but {part.name}.tar has "
                "different edge maps, encoders or settings. Choose another folder, or empty this one."
            )
        if fingerprint != part.fingerprint():
            raise UserError(
                f"--out={self.out} must not mix shards of different inputs, but {part.name}.tar was made from other images "
                "or captions, or with another --held-out, --per-shard or --caption. Choose another folder, or remove this "
                "folder to prepare all shards again."
            )
        return report if report.written == 0 or (self.out / f"{part.name}.tar").is_file() else None

    def make(self, part: Part, report_progress: Callable[[], None] = lambda: None) -> ShardReport:
        """Read the input samples that `part` describes, write them as one shard with a report file, and return the report.

        `report_progress`: called once for each input sample. Raises UserError if a file cannot be written, or there is not
        enough memory. The shard then has no report, so the next start writes it again.
        """
        bad: list[BadSample] = []
        fingerprint = part.fingerprint()  # before reading: a file that changes meanwhile is noticed at the next start
        path = self.out / f"{part.name}.tar"
        try:
            with _work_folder(self.out, part.name) as folder:
                shard = folder / path.name
                written = _write_tar(shard, self._samples(part, bad, report_progress))
                if written and self._encoders is not None:
                    plain, shard = shard, folder / "with features"
                    written = _write_tar(shard, self._with_features(plain, bad))
                if written:
                    shard.replace(path)
                else:
                    path.unlink(missing_ok=True)
            left_out = [(part.file_of.get(sample.key, sample.key), sample.reason) for sample in bad]
            report = ShardReport(written, left_out, part.skipped.counts)
            with atomic_path(self.out / f"{part.name}.json") as temporary:
                temporary.write_text(json.dumps({"settings": self._settings, "input": fingerprint, **asdict(report)}))
        except MemoryError as error:
            raise UserError(
                f"SOURCE: there is not enough memory to make {part.name}.tar. Free some memory and start the same command "
                "again; finished shards are kept."
            ) from error
        except OSError as error:
            raise UserError(
                f"--out: {path} cannot be written: {error.strerror or error}. Check free space and permissions."
            ) from error
        return report

    def _samples(self, part: Part, bad: list[BadSample], report_progress: Callable[[], None]) -> Iterator[RawSample]:
        """Yield those samples of `part` that can be decoded, with edge maps if requested, and append the others to `bad`."""
        with Prefetcher(self._decode, part.read(), depth=16, workers=4) as decoded:
            for sample, image in decoded:
                report_progress()
                if isinstance(sample, BadSample):
                    bad.append(sample)
                elif image is not None and self.edges in ("hed", "canny"):
                    yield RawSample(sample.key, {**sample.members, EDGE_EXT: self._edge_png(image)})
                else:
                    yield sample

    def _decode(self, sample: RawSample | BadSample) -> tuple[RawSample | BadSample, Tensor | None]:
        """Return a sample and its image, uint8 [1, 3, H, W], reduced to the size for edge maps; or (bad sample, None)."""
        if isinstance(sample, BadSample):
            return sample, None
        try:
            image = decode_image(next(sample.members[ext] for ext in IMAGE_EXTS if ext in sample.members))
            if self.edges == "stored" and EDGE_EXT not in sample.members:
                raise ValueError(f"no {EDGE_EXT}")
        except MemoryError:
            raise
        except Exception as error:  # decoders raise nearly anything; whatever it is, this sample is bad
            return BadSample("", sample.key, reason_of(error)), None
        if self.edges == "none":
            sample.members.pop(EDGE_EXT, None)
        scale = min(1.0, (EDGE_AREA / (image.width * image.height)) ** 0.5)
        if scale < 1:
            image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        return sample, torch.from_numpy(np.array(image).transpose(2, 0, 1)[None])

    def _edge_png(self, image: Tensor) -> bytes:
        edges = canny_edges(image)[:, 0] if self._hed is None else self._hed.encode(image.float() / 127.5 - 1)
        buffer = io.BytesIO()
        Image.fromarray((edges[0].cpu() * 255).round().to(torch.uint8).numpy()).save(buffer, "PNG")
        return buffer.getvalue()

    def _with_features(self, plain: Path, bad: list[BadSample]) -> Iterator[RawSample]:
        """Yield the samples of a shard, each with a file of features: the encoded image and captions.

        `plain`: the shard without features. `bad`: samples that cannot be encoded are appended to it.
        """
        assert self._config is not None
        assert self._encoders is not None
        index = build_index([plain], plain.parent / "index")
        dataset = dataset_of(self._config, index, training=True, edges="stored")
        builder = ShardBuilder(
            dataset, self._encoders, self._config.data.flip, stores_text(self._config, self._encoders.text)
        )
        tensors, failed = builder.build(0)
        bad += [BadSample("", index.key(number), reason) for number, reason in failed]
        provenance = json.dumps(self._encoders.provenance(dataset)).encode()
        provenance_tensor = torch.frombuffer(bytearray(provenance), dtype=torch.uint8)
        for number in range(index.num_samples):
            sample = sample_of(tensors, number)
            if sample is not None:
                features = io.BytesIO()
                save_tensors(features, seal({**sample, "provenance": provenance_tensor}))
                yield RawSample(index.key(number), {**dataset.read(number), FEATURES_EXT: features.getvalue()})


@contextmanager
def _work_folder(out: Path, name: str) -> Iterator[Path]:
    """Return a context manager that yields a temporary folder in `out` for writing the shard `name`, and removes it.

    It also removes such folders of processes that were killed. The name of the folder begins with a dot, so that a glob
    pattern for shards, such as *.tar, does not match it.
    """
    for left in out.glob(f".{glob.escape(name)}.*.part"):
        with _locked(left) as is_locked:
            if is_locked:
                shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=f".{name}.", suffix=".part", dir=out) as folder, _locked(Path(folder)):
        yield Path(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Return a context manager that locks a folder while its block runs, and yields whether the folder is locked.

    It is not locked if another process holds the lock, or the folder is missing or cannot be locked.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except OSError:
            is_locked = False
        yield is_locked
    finally:
        os.close(descriptor)


def _write_tar(path: Path, samples: Iterator[RawSample]) -> int:
    """Write samples to the file `path`, a webdataset shard, and return their number. Equal samples give equal bytes."""
    written = 0
    with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write({"__key__": sample.key, **sample.members})
            written += 1
    return written


def summary(reports: Sequence[ShardReport]) -> str:
    """Return a line of text about the written shards: how many samples they have, and why others were left out.

    `reports`: for each shard, its report. Only the most frequent reasons are listed.
    """
    bad = [sample for report in reports for sample in report.bad]
    samples = sum(report.written for report in reports)
    text = f"{counted(samples, 'sample')} in {counted(sum(report.written > 0 for report in reports), 'shard')}"
    if bad:
        reasons = most_common_reasons(bad)[:_SHOWN]
        text += f", {len(bad)} left out: " + "; ".join(f"{count} x {reason}" for reason, count, _ in reasons)
        text += f" (the first is {bad[0][0]!r})"
    return text
