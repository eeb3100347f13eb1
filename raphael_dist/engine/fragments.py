"""The part of the fp32 weights and of Adam's moments that this rank stores, by parameter name, for every ZeRO stage.

ZeRO flattens parameters and divides the result among ranks. A fragment is a view of the elements [start, start + n) of the
flattened parameter `name` that this rank stores. The moving average, checkpoints and resharding use only fragments, because
their meaning does not depend on the number of ranks or the ZeRO stage.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from raphael_dist.engine.zero import Fragment, Zero, global_shape

MOMENTS = ("exp_avg", "exp_avg_sq")


class Fragments:
    """All fragments that this rank stores, in the order of the model's parameters. Frozen parameters have none.

    Attributes:
        shapes: shapes of the whole parameters, by name.
        all: the fragments.
        owners: the tensors that the optimizer updates.
    """

    def __init__(self, module: nn.Module, zero: Zero, optimizer: torch.optim.Optimizer) -> None:
        """Collect the fragments.

        Args:
            module: the model.
            zero: the adapter for DeepSpeed's optimizer.
            optimizer: the torch optimizer inside it, whose state has Adam's moments.
        """
        self._zero, self._optimizer = zero, optimizer
        self.shapes = {name: global_shape(p)[0] for name, p in module.named_parameters() if p.requires_grad}
        self.all = list(zero.fragments(module))
        self.owners = list({id(f.owner): f.owner for f in self.all}.values())

    def __iter__(self) -> Iterator[Fragment]:
        return iter(self.all)

    def masters(self) -> list[Tensor]:
        """Return the fp32 weights of each fragment, as a view, float32 [numel]."""
        return [f.master for f in self.all]

    def optimizer_state(self, owner: Tensor) -> dict[str, Tensor]:
        """Return the optimizer's state of a tensor that it updates; empty before the first step."""
        state: dict[str, Tensor] = self._optimizer.state.get(owner, {})
        return state

    def moment(self, fragment: Fragment, kind: str) -> Tensor | None:
        """Return one of Adam's moments for a fragment, as a view, float32 [numel].

        `kind`: one of MOMENTS. Returns None before the first step, or if the optimizer has no moments.
        """
        state = self.optimizer_state(fragment.owner)
        if kind not in state:
            return None
        return state[kind].view(-1).narrow(0, fragment.offset, fragment.numel)

    def moment_addresses(self) -> list[int]:
        """Return the memory addresses of Adam's moments. If they change, views that `moment` returned earlier are stale."""
        states = [self.optimizer_state(owner) for owner in self.owners]
        return [state[kind].data_ptr() for state in states for kind in MOMENTS if kind in state]

    def create_moments(self, steps_taken: int) -> None:
        """Create the optimizer's state as after `steps_taken` steps, with moments of zero, which the caller then fills."""
        if not isinstance(self._optimizer, torch.optim.Adam):  # AdamW is a subclass; SGD has no state
            return
        on_device = self._optimizer.defaults.get("fused") or self._optimizer.defaults.get("capturable")
        # By fragment, not by param_groups: ZeRO-3 empties those between steps.
        for owner in self.owners:
            state = self._optimizer.state[owner]
            state["step"] = torch.tensor(float(steps_taken), device=owner.device if on_device else "cpu")
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(owner)

    @torch.no_grad()
    def sync_model(self) -> None:
        """Copy the fp32 weights into the weights that the model computes with. Collective."""
        self._zero.sync_model()
