"""How features are written down: small, and exact to what rounding in training does anyway.

Of one sample (the cache holds rows of many):

| tensor | type and shape | holds |
|---|---|---|
| mean | float16 [C, h, w] | the mean of its latents' distribution |
| std | uint8 [C, h, w] | their deviation on a scale of logarithms; none where the encoder is deterministic |
| mean_flip, std_flip | the same | those of the mirrored image, with data.flip |
| edge | float16 [h, w] | its edge map at the latents' size, in 0..1 |
| small | uint8 [3, Hs, Ws] | the picture made smaller, with upscale.factor |
| weights | float32 [K] | how likely each of its K captions is to be drawn |
| tokens, mask, end | 16 bits [K, Y, D], bool [K, Y], int64 [K] | their tokens; the attended ones; the end-of-text token |
| captions, caption_ends | uint8 [bytes], int64 [K] | or their text, UTF-8 |

Tokens are bfloat16 where the text encoder computes in it, which loses nothing, else float16. Padding is kept: the model's
cross-attention looks at it, and an encoder gives other numbers there for every caption. The edge loss looks at averages of
the map over a latent's pixels and larger areas (model/edge.py), so the rest is not kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Text = tuple[Tensor, Tensor, Tensor | int]  # tokens float32 [Y, D]; mask bool [Y], true at attended tokens; end
Pick = Callable[[Sequence[float]], int]  # from the captions' weights to the number of one
PACKING_VERSION = 2  # 1: edge maps of the image's size, float16 deviations
# One byte for log2 of a deviation from 2^-26 to 2^5.75 in steps of 1/8, so wrong by 4.4% at most; 0 is 0.
_STEPS, _LOWEST = 8, -26


@dataclass
class SampleFeatures:
    """A sample with one of its captions: encoded as far as it was stored so, raw where not.

    image uint8 [3, H, W], or mean and std float32 [C, h, w], the distribution of its latents; caption, or text where its
    tokens are known; edge float32 [h, w] in 0..1 at the latents' size, or None; small uint8 [3, Hs, Ws], the picture made
    smaller, or None. seconds: what it took, by kind of work.
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
    """Return deviations, float32, as uint8."""
    code = (std.clamp_min(2.0**_LOWEST).log2() - _LOWEST) * _STEPS + 1
    return torch.where(std > 0, code.round().clamp(1, 255), 0).to(torch.uint8)


def unpack_std(code: Tensor) -> Tensor:
    """Return the deviations, float32, that `pack_std` made uint8 of."""
    return torch.where(code > 0, torch.exp2((code.float() - 1) / _STEPS + _LOWEST), 0.0)


def pool_edges(edge_BHW: Tensor, factor: int) -> Tensor:
    """Return edge maps at the latents' size, float32 [B, h, w] in 0..1: averages over `factor` x `factor` pixels.

    uint8 maps are taken as 0..255, others as 0..1.
    """
    edge = edge_BHW.float() / 255 if edge_BHW.dtype == torch.uint8 else edge_BHW.float()
    return F.avg_pool2d(edge[:, None], factor)[:, 0] if factor > 1 else edge


def unpack(tensors: dict[str, Tensor], pick: Pick, flip: bool) -> SampleFeatures:
    """Return a sample's features (the table above) with one caption, mirrored if `flip`. KeyError: a tensor is missing."""
    suffix = "_flip" if flip else ""
    mean, std, edge = tensors[f"mean{suffix}"].float(), tensors.get(f"std{suffix}"), tensors.get("edge")
    small = tensors.get("small")
    found = SampleFeatures(
        mean=mean,
        std=torch.zeros_like(mean) if std is None else unpack_std(std),
        edge=None if edge is None else edge.float().flip(-1) if flip else edge.float(),
        small=None if small is None else small.flip(-1) if flip else small,
    )
    number = pick(tensors["weights"].tolist())
    if "tokens" in tensors:
        found.text = tensors["tokens"][number].float(), tensors["mask"][number], int(tensors["end"][number])
    else:
        first, last = int(tensors["caption_ends"][number - 1]) if number else 0, int(tensors["caption_ends"][number])
        found.caption = bytes(tensors["captions"][first:last].numpy()).decode()
    return found


def pack_captions(captions: Sequence[str]) -> dict[str, Tensor]:
    """Return `captions` and `caption_ends` of the table above."""
    encoded = [caption.encode() for caption in captions]
    text = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
    return {"captions": text, "caption_ends": torch.tensor([len(one) for one in encoded]).cumsum(0)}
