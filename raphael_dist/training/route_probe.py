"""Measures at each validation how certain the gates are and how many routes changed, without gate noise.

A route is the expert that a gate selects for a text token or a timestep.

Shape legend: L transformer blocks, R routes of a block (one per text token or timestep), K experts.
"""

import torch
from torch import Tensor

from raphael_dist.model.batch import Batch
from raphael_dist.model.unet import RaphaelUNet


class RouteProbe:
    """Measures gate entropy and the share of routes that changed since the last call, always on the same held-out inputs.

    A route is the expert that a gate selects for a text token or a timestep. A gate has a high entropy if its choice is
    uncertain.
    """

    def __init__(self) -> None:
        self._routes: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(self, model: RaphaelUNet, batch: Batch) -> dict[str, float]:
        """Return gate entropies, and the shares of routes (selected experts) that changed since the last call.

        The results are metrics by name, e.g. "moe/space/gate_entropy". An entropy is 0 if the gates are certain, and 1 if
        all experts are equally likely. The first call returns entropies only. Returns {} under ZeRO-3, where the gates have
        their weights only during the model's forward pass.

        `batch`: held-out samples; it must be the same at each call.
        """
        if model.gathers_weights:
            return {}
        values: dict[str, float] = {}
        if model.config.space_experts:
            values |= self._measure("space", model.text_logits(batch.text[batch.text_mask]))
        if model.config.time_experts and model.config.time_routing == "learned":
            values |= self._measure("time", model.time_logits(batch.timestep.device))
        return values

    def _measure(self, kind: str, logits_LRK: Tensor) -> dict[str, float]:
        entropy_LR = torch.distributions.Categorical(logits=logits_LRK).entropy()
        routes_LR, before_LR = logits_LRK.argmax(dim=-1), self._routes.get(kind)
        self._routes[kind] = routes_LR
        even = torch.tensor(float(max(2, logits_LRK.shape[-1]))).log()  # the entropy of an even choice
        values = {f"moe/{kind}/gate_entropy": float(entropy_LR.mean() / even)}
        if before_LR is not None:
            values[f"moe/{kind}/routes_changed"] = float((routes_LR != before_LR).float().mean())
        return values
