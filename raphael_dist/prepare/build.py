"""Makes shards of parts: every picture decoded once, edge maps beside it, and features where they are asked for.

A part that is done is not done again: its shard appears whole, then NAME.json with what became of its samples.
"""

import fcntl
import glob
import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from webdataset import TarWriter

from raphael_dist.config import Config
from raphael_dist.data.buckets import nearest_buckets
from raphael_dist.data.cache_build import ShardBuilder, sample_of
from raphael_dist.data.dataset import MAX_PIXELS, decode_image
from raphael_dist.data.encoding import Encoders
from raphael_dist.data.hed import EdgeEncoder, edge_map
from raphael_dist.data.index import BadSample
from raphael_dist.data.open import dataset_of, stores_text
from raphael_dist.data.prefetch import Prefetcher
from raphael_dist.data.shards import build_index
from raphael_dist.data.tar_scan import EDGE_EXT, FEATURES_EXT, IMAGE_EXTS
from raphael_dist.errors import UserError
from raphael_dist.prepare.source import Part, RawSample
from raphael_dist.storage.files import atomic_path

EDGE_AREA = 512 * 512  # pixels of the picture that edge maps are made of: training looks at averages over areas
_TOLD = 3


@dataclass(frozen=True)
class Report:
    """What became of a part's samples: how many were written, and (key, reason) of those that were not."""

    written: int
    bad: list[tuple[str, str]]


class Preparer:
    """Writes the shards of parts into a folder."""

    def __init__(
        self, out: Path, edges: str, hed: EdgeEncoder | None, config: Config | None, encoders: Encoders | None
    ) -> None:
        """edges: hed (with `hed`), canny, stored (those that are there), none. With `encoders` features too, as `config` has
        them.
        """
        self.out, self.edges, self._hed, self._config, self._encoders = out, edges, hed, config, encoders
        about: list[Any] = [edges, None if hed is None else hed.fingerprint]
        if config is not None and encoders is not None:
            about += [encoders.text.fingerprint, encoders.image.fingerprint, config.image.model_dump(mode="json")]
            about += [config.data.flip, config.data.cached_text, config.data.caption_from, config.data.caption_weights]
        self._how = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def done(self, part: Part) -> Report | None:
        """Return what a part's report says, or None where it is still to be made. UserError: it was made otherwise."""
        try:
            about = json.loads((self.out / f"{part.name}.json").read_text())
            report = Report(about["written"], [(key, reason) for key, reason in about["bad"]])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if about.get("how") != self._how:
            raise UserError(
                f"--out: {self.out / part.name}.tar was made with other edge maps, encoders or settings; "
                "choose another folder, or empty this one"
            )
        return report if report.written == 0 or (self.out / f"{part.name}.tar").is_file() else None

    def make(self, part: Part, tell: Callable[[], None] = lambda: None) -> Report:
        """Write a part's shard and its report; `tell` is called for every sample. UserError: it cannot be written."""
        bad: list[BadSample] = []
        path = self.out / f"{part.name}.tar"
        try:
            with _own_folder(self.out, part.name) as aside:
                made = aside / path.name
                written = _write_tar(made, self._samples(part, bad, tell))
                if written and self._encoders is not None:
                    plain, made = made, aside / "with features"
                    written = _write_tar(made, self._with_features(plain, bad))
                if written:
                    made.replace(path)
                else:
                    path.unlink(missing_ok=True)
            report = Report(written, [(one.key, one.reason) for one in bad])
            with atomic_path(self.out / f"{part.name}.json") as temporary:
                temporary.write_text(json.dumps({"how": self._how, **vars(report)}))
        except OSError as error:
            raise UserError(f"--out: cannot write {path}: {error.strerror or error}; check space and rights") from error
        return report

    def _samples(self, part: Part, bad: list[BadSample], tell: Callable[[], None]) -> Iterator[RawSample]:
        """Yield the samples whose picture decodes, with their edge map."""
        with Prefetcher(self._checked, part.read(), depth=16, workers=4) as checked:
            for sample, image in checked:
                tell()
                if isinstance(sample, BadSample):
                    bad.append(sample)
                elif image is not None and self.edges in ("hed", "canny"):
                    yield RawSample(sample.key, {**sample.members, EDGE_EXT: self._edge_png(image)})
                else:
                    yield sample

    def _checked(self, sample: RawSample | BadSample) -> tuple[RawSample | BadSample, Tensor | None]:
        """Return a sample and its picture at the size for edge maps, uint8 [1, 3, H, W], or what is wrong with it."""
        if isinstance(sample, BadSample):
            return sample, None
        try:
            image = decode_image(next(sample.members[ext] for ext in IMAGE_EXTS if ext in sample.members), MAX_PIXELS)
            if self.edges == "stored" and EDGE_EXT not in sample.members:
                raise ValueError(f"no {EDGE_EXT}")
        except Exception as error:  # decoders raise nearly anything; whatever it is, this sample is bad
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            return BadSample("", sample.key, reason), None
        if self.edges == "none":
            sample.members.pop(EDGE_EXT, None)
        scale = min(1.0, (EDGE_AREA / (image.width * image.height)) ** 0.5)
        if scale < 1:
            image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        return sample, torch.from_numpy(np.array(image).transpose(2, 0, 1)[None])

    def _edge_png(self, image: Tensor) -> bytes:
        edges = edge_map(image, "canny")[:, 0] if self._hed is None else self._hed.encode(image.float() / 127.5 - 1)
        buffer = io.BytesIO()
        Image.fromarray((edges[0].cpu() * 255).round().to(torch.uint8).numpy()).save(buffer, "PNG")
        return buffer.getvalue()

    def _with_features(self, plain: Path, bad: list[BadSample]) -> Iterator[RawSample]:
        """Yield the samples of a shard with their features, as training would compute them."""
        assert self._config is not None
        assert self._encoders is not None
        index = build_index([plain])
        dataset = dataset_of(self._config, index, training=True, edges="stored")
        builder = ShardBuilder(
            dataset, self._encoders, self._config.data.flip, stores_text(self._config, self._encoders.text)
        )
        sizes = index.shards[0].sizes
        tensors, failed = builder.build(0, nearest_buckets(sizes[:, 0], sizes[:, 1], dataset.buckets).tolist())
        bad += [BadSample("", index.key(number), reason) for number, reason in failed]
        made_of = json.dumps(self._encoders.made_of(dataset)).encode()
        about = {"made_of": torch.frombuffer(bytearray(made_of), dtype=torch.uint8)}
        for number in range(index.num_samples):
            sample = sample_of(tensors, number)
            if sample is not None:
                features = save({name: tensor.contiguous() for name, tensor in {**sample, **about}.items()})
                yield RawSample(index.key(number), {**dataset.read(number), FEATURES_EXT: features})


@contextmanager
def _own_folder(out: Path, name: str) -> Iterator[Path]:
    """Yield a folder for what is half done, which no pattern of shards matches; what killed processes left of it goes."""
    for left in out.glob(f".{glob.escape(name)}.*.part"):
        with _locked(left) as is_mine:
            if is_mine:
                shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=f".{name}.", suffix=".part", dir=out) as folder, _locked(Path(folder)):
        yield Path(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder until the end of the block, or of this process; yield False where another has it, or none can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_mine = True
        except OSError:
            is_mine = False
        yield is_mine
    finally:
        os.close(descriptor)


def _write_tar(path: Path, samples: Iterator[RawSample]) -> int:
    """Write samples as a webdataset shard whose bytes depend on them alone; return how many."""
    written = 0
    with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write({"__key__": sample.key, **sample.members})
            written += 1
    return written


def summary(reports: Sequence[Report]) -> str:
    """Return what became of all samples, in words: how many are there, and the most frequent reasons of the others."""
    bad = [one for report in reports for one in report.bad]
    text = f"{sum(report.written for report in reports)} samples in {sum(report.written > 0 for report in reports)} shards"
    if bad:
        reasons = Counter(reason for _, reason in bad).most_common(_TOLD)
        text += f", {len(bad)} left out: " + "; ".join(f"{count} x {reason}" for reason, count in reasons)
        text += f" (the first is {bad[0][0]!r})"
    return text
