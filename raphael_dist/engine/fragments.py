"""The part of the fp32 weights and of Adam's moments that this rank stores, by parameter name, for every ZeRO stage.

ZeRO flattens parameters and divides the result among ranks. A fragment is the range of elements [start, start + n) of a
flattened parameter that this rank stores. The moving average, checkpoints and resharding use only fragments, because their
meaning does not depend on the number of ranks or the ZeRO stage.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from raphael_dist.engine.zero_interface import Fragment, Zero, global_shape

MOMENTS = ("exp_avg", "exp_avg_sq")


class Fragments:
    """The parts of trained parameters that this rank stores in fp32, in the order of the model's parameters.

    A fragment is a range of elements of a flattened parameter. Iterating yields the fragments.

    Attributes:
        shapes: shape of every whole trained parameter, by name.
        all: list of the fragments.
        owners: the distinct tensors that the optimizer updates; each contains one or more fragments.
    """

    def __init__(self, module: nn.Module, zero: Zero, optimizer: torch.optim.Optimizer) -> None:
        """Collect the fragments.

        Args:
            module: the model.
            zero: the adapter for DeepSpeed's ZeRO optimizer.
            optimizer: the torch optimizer inside DeepSpeed's, whose state has Adam's moments.
        """
        self._zero, self._optimizer = zero, optimizer
        self.shapes = {name: global_shape(p)[0] for name, p in module.named_parameters() if p.requires_grad}
        self.all = list(zero.fragments(module))
        self.owners = list({id(f.owner): f.owner for f in self.all}.values())

    def __iter__(self) -> Iterator[Fragment]:
        return iter(self.all)

    def masters(self) -> list[Tensor]:
        """Return the fp32 weights of each fragment as views [numel]: changing them changes the weights."""
        return [f.master for f in self.all]

    def optimizer_state(self, owner: Tensor) -> dict[str, Tensor]:
        """Return the optimizer's state ("step", "exp_avg", ...) of a tensor that it updates; {} before the first step.

        `owner`: one of the tensors in the attribute `owners`.
        """
        state: dict[str, Tensor] = self._optimizer.state.get(owner, {})
        return state

    def moment(self, fragment: Fragment, kind: str) -> Tensor | None:
        """Return one of Adam's moments for the weights in a fragment, as a view, float32 [numel].

        A fragment is the part of a parameter that this rank stores. `kind`: "exp_avg" or "exp_avg_sq". Returns None before
        the first step, or if the optimizer has no moments.
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
        """Create Adam's state on this rank: `steps_taken` as the step count, and moments of zero. For SGD, do nothing.

        When a run resumes, the caller then fills the moments; at the start of a run they stay at zero.
        """
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
