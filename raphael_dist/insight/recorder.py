"""Sees the routes and regions of a model while it draws, without a change to the model or to what it computes.

Hooks read what the layers are given: which expert each text token and each sample goes to, and the attention maps. So this
works while training samples, with experts spread over ranks and with every stage of ZeRO.
Shape legend: B samples, L transformer blocks, Y text tokens, N image tokens, S forward passes, h and w map height and width.
"""

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from raphael_dist.model.layers import TransformerBlock
from raphael_dist.model.routing import region_mask_BNY


@dataclass
class Record:
    """What one sample of the batches went through.

    timesteps: of the forward passes. time_LS: time expert per block and pass, int64 [L, S], or None without a Time-MoE.
    space_LY: space expert per block and text token, int64 [L, Y], or None without a Space-MoE. regions: per block, bool
    [Y, N]: the region of each text token in pass `at`. maps: the attention maps there, float32 [N, Y], where they are kept.
    sizes: per block, (h, w) with h * w = N.
    """

    timesteps: list[float] = field(default_factory=list)
    time_LS: Tensor | None = None
    space_LY: Tensor | None = None
    regions: list[Tensor] = field(default_factory=list)
    maps: list[Tensor] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    at: int = 0


class Recorder:
    """Records sample number `sample` of every batch that a `RaphaelUNet` is given inside the block.

    at: the forward pass, counted from 0, whose regions are kept. maps: keep its attention maps too.
    """

    def __init__(self, model: nn.Module, *, sample: int = 0, at: int = 0, maps: bool = False) -> None:
        self._model, self._sample, self._maps = model, sample, maps
        own = (m for name, m in model.named_modules() if not name.startswith("control."))
        self._blocks = [m for m in own if isinstance(m, TransformerBlock)]
        self._order: list[int] = []  # in which the blocks run, which is not that of their names
        self._time: list[list[int]] = []
        self._space: dict[int, Tensor] = {}
        self._handles: list[Any] = []
        self.record = Record(at=at)

    def __enter__(self) -> "Recorder":
        hook = self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._handles.append(hook)
        for number, block in enumerate(self._blocks):
            self._handles.append(block.register_forward_pre_hook(self._enter(number)))
            if block.wants_map:
                self._handles.append(block.attn2.register_forward_hook(self._see_map(block)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        if any(self._time):
            self.record.time_LS = torch.tensor(self._time).T
        if self._space:
            self.record.space_LY = torch.stack([self._space[number] for number in self._order])

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.record.timesteps.append(float(args[1][self._sample]))
        self._order, self._time = [], [*self._time, []]

    def _enter(self, number: int) -> Any:
        """Return a hook for a block's arguments (h, text, end, plan, size)."""

        def see(block: nn.Module, args: tuple[Any, ...]) -> None:
            plan, size_hw = args[3], args[4]
            self._order.append(number)
            if plan.time_expert_B is not None:
                self._time[-1].append(int(plan.time_expert_B[self._sample]))
            if plan.space_weight_BYK is not None:
                self._space[number] = plan.space_weight_BYK[self._sample].detach().argmax(dim=-1).cpu()
            if len(self.record.timesteps) - 1 == self.record.at:
                self.record.sizes.append(size_hw)

        return see

    def _see_map(self, block: TransformerBlock) -> Any:
        def see(attention: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            if len(self.record.timesteps) - 1 == self.record.at:
                map_BNY = output[1][self._sample : self._sample + 1]
                self.record.regions.append(region_mask_BNY(map_BNY, block.mask_threshold)[0].T.bool().cpu())
                if self._maps:
                    self.record.maps.append(map_BNY[0].float().cpu())

        return see
