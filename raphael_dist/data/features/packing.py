"""The format in which encoded samples (features) are stored: tensors that are rounded to 16 bits, some to 8 bits.

The tensors of one sample with K captions of Y tokens and width D, and latents [C, h, w]:

| tensor | type and shape | content |
|---|---|---|
| mean | float16 [C, h, w] | mean of the latents' distribution |
| std | uint8 [C, h, w] | standard deviation of this distribution, on a logarithmic scale; absent if it is always 0 |
| mean_flip, std_flip | the same | mean and std of the mirrored image, with data.flip |
| edge | float16 [h, w] | edge map at the latents' size, in 0..1 |
| small | uint8 [3, Hs, Ws] | the downscaled image, with upscale.factor |
| weights | float32 [K] | relative probability of each caption |
| tokens, mask, end | 16 bits [K, Y, D], bool [K, Y], int64 [K] | tokens, False at padding, index of the end-of-text token |
| captions, caption_ends | uint8 [bytes], int64 [K] | instead of tokens: the captions as UTF-8, the end of each (exclusive) |

Tokens are bfloat16 if the text encoder computes in bfloat16, so that nothing is lost, otherwise float16. The tokens of the
padding are stored, too: the model's cross-attention reads them, and they differ between captions. Edge maps have the size of
the latents, since the edge loss uses averages over a latent's pixels or larger areas (model/edge_supervision.py).
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Text = tuple[Tensor, Tensor, Tensor | int]  # tokens float32 [Y, D]; mask bool [Y], False at padding; end
Pick = Callable[[Sequence[float]], int]  # draws the number of a caption, given the captions' weights
PACKING_VERSION = 3
# One byte for log2 of a deviation from 2^-26 to 2^5.75 in steps of 1/8: the error is at most 4.4%. 0 stands for 0.
_STEPS, _LOWEST = 8, -26


@dataclass(eq=False)
class SampleFeatures:
    """The features of a sample: its image and one of its captions, each encoded or raw, and its edge map.

    Attributes:
        image: RGB image, uint8 [3, H, W]; None if `mean` and `std` are set.
        mean, std: Mean and standard deviation of the image's latents, float32 [C, h, w]; None if `image` is set.
        caption: The caption as a string; not used if `text` is set.
        text: The encoded caption: tokens float32 [Y, D], mask bool [Y], and index of the end-of-text token; or None.
        edge: Edge map at the latents' size, float32 [h, w] in 0..1, or None.
        small: The downscaled image for super-resolution, uint8 [3, Hs, Ws], or None.
        seconds: Seconds spent, by kind of work, such as "reading" and "decoding".
    """

    image: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    caption: str = ""
    text: Text | None = None
    edge: Tensor | None = None
    small: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def pack_std(std: Tensor) -> Tensor:
    """Round standard deviations of latents, float32, to 8 bits on a logarithmic scale; return uint8 of the same shape."""
    code = (std.clamp_min(2.0**_LOWEST).log2() - _LOWEST) * _STEPS + 1
    return torch.where(std > 0, code.round().clamp(1, 255), 0).to(torch.uint8)


def unpack_std(code: Tensor) -> Tensor:
    """Return the standard deviations, float32, for the codes, uint8, that `pack_std` returned."""
    return torch.where(code > 0, torch.exp2((code.float() - 1) / _STEPS + _LOWEST), 0.0)


def pool_edges(edge_BHW: Tensor, factor: int) -> Tensor:
    """Average edge maps over squares of `factor` x `factor` pixels, so that they have the size of the latents.

    Args:
        edge_BHW: Edge maps, uint8 in 0..255 or floating point in 0..1.
        factor: Image height divided by latent height (and width by width), such as 8.

    Returns:
        Edge maps, float32 [B, h, w] in 0..1.
    """
    edge = edge_BHW.float() / 255 if edge_BHW.dtype == torch.uint8 else edge_BHW.float()
    return F.avg_pool2d(edge[:, None], factor)[:, 0] if factor > 1 else edge


def unpack(tensors: dict[str, Tensor], pick: Pick, flip: bool) -> SampleFeatures:
    """Convert the stored tensors of one sample to features, with one of its captions.

    Args:
        tensors: The tensors of the sample by name ("mean", "std", "tokens", ...), in the format of the table at the top of
            packing.py.
        pick: Function that draws the index of a caption, given the weights of the sample's captions.
        flip: Return the features of the mirrored image.

    Raises:
        KeyError: A tensor is missing.
    """
    suffix = "_flip" if flip else ""
    mean, std, edge = tensors[f"mean{suffix}"].float(), tensors.get(f"std{suffix}"), tensors.get("edge")
    small = tensors.get("small")
    features = SampleFeatures(
        mean=mean,
        std=torch.zeros_like(mean) if std is None else unpack_std(std),
        edge=None if edge is None else edge.float().flip(-1) if flip else edge.float(),
        small=None if small is None else small.flip(-1) if flip else small,
    )
    number = pick(tensors["weights"].tolist())
    if "tokens" in tensors:
        features.text = tensors["tokens"][number].float(), tensors["mask"][number], int(tensors["end"][number])
    else:
        first, last = int(tensors["caption_ends"][number - 1]) if number else 0, int(tensors["caption_ends"][number])
        features.caption = bytes(tensors["captions"][first:last].numpy()).decode()
    return features


def seal(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one sample and a tensor `crc`: the CRC-32 of their names, types, shapes and contents."""
    return {**tensors, "crc": torch.tensor(_crc(tensors))}


def check_seal(tensors: dict[str, Tensor]) -> None:
    """Remove the tensor `crc` from `tensors`; raise ValueError if the other tensors do not have this CRC-32 (see `seal`)."""
    crc = tensors.pop("crc", None)
    if crc is None or int(crc) != _crc(tensors):
        raise ValueError("the tensors do not match their checksum")


def _crc(tensors: Mapping[str, Tensor]) -> int:
    names = sorted(tensors)
    header = json.dumps([(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in names])
    return checksum((tensors[name] for name in names), zlib.crc32(header.encode()))


def checksum(tensors: Iterable[Tensor], value: int = 0) -> int:
    """Return the CRC-32 of the bytes of these tensors, one after the other. `value`: CRC-32 of the bytes before them."""
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return value


def pack_captions(captions: Sequence[str]) -> dict[str, Tensor]:
    """Store captions as UTF-8 bytes in tensors.

    Returns:
        `captions`, uint8 [bytes], all captions as UTF-8, joined; `caption_ends`, int64 [K], the end of each (exclusive).
    """
    encoded = [caption.encode() for caption in captions]
    data = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
    return {"captions": data, "caption_ends": torch.tensor([len(text) for text in encoded]).cumsum(0)}
