"""Compares gradients of distributed training with those of training in one process, separately for each expert.

The command `prove` uses these functions to state in its messages which expert's gradient is wrong, and by how much.
"""

from collections.abc import Iterator
from math import prod

from torch import Tensor

from raphael_dist.checkpoint.tensors import stacked


def pieces(name: str, shape: tuple[int, ...], start: int, numel: int) -> Iterator[tuple[str, slice]]:
    """Divide elements [start, start + numel) of the flattened parameter `name` into one range for each of its experts.

    Yields (label, slice) of each range: a text such as "NAME, expert 3", and the elements, counted from `start`. For a
    parameter without experts there is one range. `shape`: shape of the whole parameter.
    """
    each = prod(shape[1:]) if stacked(name) else prod(shape)
    at = 0
    while at < numel:
        expert, offset = divmod(start + at, each)
        length = min(each - offset, numel - at)
        yield f"{name}, expert {expert}" if stacked(name) else name, slice(at, at + length)
        at += length


def differs(actual: Tensor, expected: Tensor, floor: float, tolerance: float) -> str:
    """Compare two gradients; return "" if they agree, else a string such as "0.50 times" or "12% away from".

    Two gradients agree if the L2 norm of their difference is at most `tolerance` times (the norm of `expected` + `floor`).
    `floor` is a small norm, so that gradients that are only rounding errors agree.

    "0.50 times" means that `actual` is `expected` times 0.5. "12% away from" means that `actual` is not proportional to
    `expected`, and the norm of the difference is 12% of the norm of `expected`.
    """
    size = float(expected.norm())
    if float((actual - expected).norm()) <= tolerance * size + tolerance * floor:
        return ""
    factor = float((actual * expected).sum()) / max(size, 1e-30) ** 2
    proportional = float((actual - factor * expected).norm()) <= tolerance * abs(factor) * size + tolerance * floor
    return f"{factor:.2f} times" if proportional else f"{float((actual - expected).norm()) / max(size, 1e-30):.0%} away from"
