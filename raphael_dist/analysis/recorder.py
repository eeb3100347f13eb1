"""Records a model's routes and regions while it draws images, without changing the model or its outputs.

Routes are the chosen experts; a region is the part of the image that attends to a text token. Hooks read the chosen experts
from the inputs of the layers, and attention maps from their outputs. Recording also works for images that
are drawn in the course of training, with expert parallelism and with every ZeRO stage.

Shape legend: B samples, L transformer blocks, Y text tokens, N image tokens, S forward passes, h and w map height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raphael_dist.model.layers import TransformerBlock
from raphael_dist.model.routing import region_mask_BNY

Arguments = tuple[Any, ...]  # of the forward pass of a module


@dataclass
class Record:
    """Recorded routes (chosen experts) and regions (image tokens with much attention to a text token) of one sample.

    A space expert is chosen for each text token, a time expert for each timestep. There are L transformer blocks, S forward
    passes, Y text tokens and N image tokens.

    Attributes:
        timesteps: timesteps of the forward passes.
        time_LS: time expert of each block and pass, int64 [L, S]; None without a Time-MoE.
        space_LY: space expert of each block and text token, int64 [L, Y]; None without a Space-MoE.
        regions: for each block, the region of each text token in pass `at`, bool [Y, N].
        maps: for each block, the attention map in pass `at`, float32 [N, Y], if requested.
        sizes: (h, w) of each block's image tokens, with h * w = N.
        at: the pass whose regions are recorded, counted from 0.
    """

    timesteps: list[float] = field(default_factory=list)
    time_LS: Tensor | None = None
    space_LY: Tensor | None = None
    regions: list[Tensor] = field(default_factory=list)
    maps: list[Tensor] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    at: int = 0


class Recorder:
    """A context manager that records which experts a `RaphaelUNet` chooses for one sample of each batch.

    It also records the region of each text token: the image tokens with much attention to this token. Run the forward passes
    inside the `with` block.

    Attributes:
        record: the experts and regions of this sample, complete when the `with` block has ended.
    """

    def __init__(self, model: nn.Module, *, sample: int = 0, at: int = 0, maps: bool = False) -> None:
        """Prepare to record.

        Args:
            model: the U-Net.
            sample: index of the sample in each batch.
            at: number of the forward pass (counted from 0) whose regions are recorded. Experts are recorded in all passes.
            maps: whether to record the attention maps of that pass, too.
        """
        self._model, self._sample, self._maps = model, sample, maps
        own_modules = (module for name, module in model.named_modules() if not name.startswith("control."))
        self._blocks = [module for module in own_modules if isinstance(module, TransformerBlock)]
        self._order: list[int] = []  # block numbers in order of execution, which differs from the order of names
        self._time: list[list[int]] = []
        self._space: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self.record = Record(at=at)

    def __enter__(self) -> "Recorder":
        self._handles.append(self._model.register_forward_pre_hook(self._begin_pass))
        for number, block in enumerate(self._blocks):
            self._handles.append(block.register_forward_pre_hook(self._route_hook(number)))
            if block.needs_attention_map:
                self._handles.append(block.attn2.register_forward_hook(self._map_hook(block.mask_threshold)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        if any(self._time):
            self.record.time_LS = torch.tensor(self._time).T
        if self._space:
            self.record.space_LY = torch.stack([self._space[number] for number in self._order])

    def _is_recorded_pass(self) -> bool:
        return len(self.record.timesteps) - 1 == self.record.at

    def _begin_pass(self, model: nn.Module, args: Arguments) -> None:
        self.record.timesteps.append(float(args[1][self._sample]))
        self._order, self._time = [], [*self._time, []]

    def _route_hook(self, number: int) -> Callable[[nn.Module, Arguments], None]:
        """Return a hook that records the experts of a transformer block. `number`: index of the block in `self._blocks`."""

        def record_route(block: nn.Module, args: Arguments) -> None:
            plan, size_hw = args[3], args[4]
            self._order.append(number)
            if plan.time_expert_B is not None:
                self._time[-1].append(int(plan.time_expert_B[self._sample]))
            if plan.space_weight_BYK is not None:
                self._space[number] = plan.space_weight_BYK[self._sample].detach().argmax(dim=-1).cpu()
            if self._is_recorded_pass():
                self.record.sizes.append(size_hw)

        return record_route

    def _map_hook(self, threshold: float) -> Callable[[nn.Module, Arguments, tuple[Tensor, Tensor]], None]:
        """Return a hook that records the attention map, the second output of a cross-attention, and the regions in it.

        `threshold`: a region has the image tokens whose attention is at least this share of the largest one.
        """

        def record_map(attention: nn.Module, args: Arguments, output: tuple[Tensor, Tensor]) -> None:
            if self._is_recorded_pass():
                map_BNY = output[1][self._sample : self._sample + 1]
                self.record.regions.append(region_mask_BNY(map_BNY, threshold)[0].T.bool().cpu())
                if self._maps:
                    self.record.maps.append(map_BNY[0].float().cpu())

        return record_map
