"""Sparse upcycling (not in the paper): makes a model with experts from a dense one. At step 0 both compute the same.

- Every time expert is a copy of the feed-forward layer, so routing does not change the result.
- The last layer of every space expert (and of the shared expert) is zero, so the Space-MoE adds nothing at first. The first
  layers of the experts have different random weights. So the gradients of the last layers are not zero and differ between
  experts, and the experts differ after the first step.
- Gates, edge modules and the norm before the space experts are newly initialised. All other weights are copied.
"""

from math import prod

import torch
from torch import Tensor, nn

from raphael_dist.checkpoint.progress import START
from raphael_dist.checkpoint.reader import check_architecture
from raphael_dist.checkpoint.tensors import default_weights, stacked
from raphael_dist.config.schema import Config
from raphael_dist.convert.source_checkpoint import block_levels, check_same_prediction, parameter_shapes
from raphael_dist.convert.write_plan import Source
from raphael_dist.errors import UserError
from raphael_dist.model.edge_supervision import EdgeModule
from raphael_dist.model.moe import SpaceMoE
from raphael_dist.model.routing import Gate

_FEED_FORWARD = {"w1": "ff.net.0.proj.weight", "b1": "ff.net.0.proj.bias", "w2": "ff.net.2.weight", "b2": "ff.net.2.bias"}
_OF_EXPERTS = {
    "space_experts", "time_experts", "gate_width", "time_activation", "expert_width", "shared_expert", "time_routing",
}  # fmt: skip


class UpcycledSource:
    """The weights of a model with experts, computed from a dense checkpoint (without experts) when they are read.

    The object has the interface of a checkpoint at step 0 with the weights of the new model and without Adam moments.
    """

    whole = False

    def __init__(self, source: Source, config: Config, *, any_text_width: bool = False) -> None:
        """Upcycle the dense checkpoint `source` to the model of `config`.

        `any_text_width`: allow that the text tokens of the two models have different widths. The caller must then not read
        the layers that take text tokens as input, because these layers have other shapes in the source. Raises UserError if
        the two models differ in more than experts and edge modules.
        """
        self._source, self.config, self.path = source, config, source.path
        self.progress, self.dataset = START, ""
        self._check({"text_width"} if any_text_width else set())
        self.shapes = parameter_shapes(config)
        other = {n for n, shape in source.shapes.items() if self.shapes.get(n, shape) != shape}
        assert any_text_width or not other
        self._blocks = {block: i for i, block in enumerate(block_levels(config))}
        self._kind = default_weights(source.kinds())
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of values that can be read: only "master" (weights).

        The weights are computed from the EMA (moving average) of the dense checkpoint if it has one.
        """
        return ("master",)

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of the flattened parameter `name` of the new model, float32 [numel].

        `kind` is not used: the object has only one kind of values, "master" (weights).
        """
        if name in self._source.shapes:
            return self._source.read(self._kind, name, start, numel)
        owner = stacked(name)
        if owner and owner[0].endswith("time_moe"):
            return self._copies(owner[0].removesuffix("time_moe") + _FEED_FORWARD[owner[1]], start, numel)
        return self._new(name).view(-1)[start : start + numel]

    def _copies(self, name: str, start: int, numel: int) -> Tensor:
        each, pieces = prod(self._source.shapes[name]), []
        while numel:
            first = start % each
            size = min(numel, each - first)
            pieces.append(self._source.read(self._kind, name, first, size))
            start, numel = start + size, numel - size
        return torch.cat(pieces)

    def _new(self, name: str) -> Tensor:
        owner, rest = _owner(name)
        if self._last[0] != owner:
            module = self._module(owner)
            self._last = (owner, {n: p.detach() for n, p in module.named_parameters()})
        return self._last[1][rest]

    def _module(self, owner: str) -> nn.Module:
        """Make the module that the new model has under the name `owner`: a Space-MoE, edge module or gate.

        Its weights are initialised as in a new run, except that the last layers of a Space-MoE are zero.
        """
        m, seed = self.config.model, self.config.run.seed
        if owner.endswith(".space_moe"):
            experts, hidden, dim = self.shapes[f"{owner}.w1"]
            block = seed * 1000 + self._blocks[owner.removesuffix(".space_moe")]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(block + 750)
                shared = self.shapes.get(f"{owner}.shared.0.bias", (0,))[0]
                layer = SpaceMoE(experts, dim, hidden, "auto", seed=2 * block + 1, shared=shared)
            for last in (layer.w2, layer.b2, *([] if layer.shared is None else layer.shared[-1].parameters())):
                nn.init.zeros_(last)
            return layer
        with torch.random.fork_rng(devices=[]):
            if owner.endswith(".edge"):
                torch.manual_seed(seed * 1000 + self._blocks[owner.removesuffix(".edge")])
                return EdgeModule(self.config.edge.channels)
            kind, index = owner.split(".")
            torch.manual_seed(seed * 1000 + int(index) + (500 if kind == "text_gates" else 250))
            if kind == "text_gates":
                return Gate(m.text_width, m.gate_width, m.space_experts)
            return Gate(4 * m.channels[0], m.gate_width, m.time_experts)

    def _check(self, free: set[str]) -> None:
        """Raise UserError unless the dense and the new model differ only in experts, edge modules and the settings `free`.

        `free`: names of settings in the section `model`.
        """
        source, dense, model = self._source.config, self._source.config.model, self.config.model
        # Checked also without time experts: the feed-forward layer has this width and activation.
        if model.time_activation != dense.time_activation or model.expert_width != dense.expert_width:
            raise UserError(
                f"model.time_activation={model.time_activation} and model.expert_width={list(model.expert_width)} must be "
                f"those of the feed-forward layers of {self.path}, which become experts. Set "
                f"model.time_activation={dense.time_activation} and model.expert_width={list(dense.expert_width)}."
            )
        check_same_prediction("--from", self.path, source, self.config.diffusion.prediction)
        same = model.model_copy(update={field: getattr(dense, field) for field in _OF_EXPERTS | free})
        check_architecture(source, self.config.model_copy(update={"model": same, "edge": source.edge}), str(self.path))


def _owner(name: str) -> tuple[str, str]:
    """Split the name of a parameter of a Space-MoE, edge module or gate into the name of this module and the rest."""
    for mark in (".space_moe.", ".edge."):
        if mark in name:
            block, _, rest = name.partition(mark)
            return block + mark[:-1], rest
    gates, index, rest = name.split(".", 2)
    return f"{gates}.{index}", rest
