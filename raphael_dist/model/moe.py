"""Time-MoE (Sec. 7.3) and Space-MoE (Sec. 3.1) on one rank. Expert parallelism swaps in layers of the same signature.

Shape legend: B samples, N image tokens, Y text tokens, K experts, D width, R rows (B * N).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from raphael_dist.config import SpaceBackend
from raphael_dist.model.experts import Experts

# Above this share of (token, expert) pairs in use, two dense products beat gathering on the CPU. Measured with
# tools/bench.py space: 0.68 at width 320, 0.85 at 32 and 64, never at 128.
WIDE_DENSITY = 0.8


class TimeMoE(Experts):
    """`h' = te_{t_router(t)}(h_c)` (Sec. 7.3): one expert per sample, chosen by its timestep."""

    def forward(self, h_BND: Tensor, expert_B: Tensor, samples_K: Tensor, factor_B: Tensor) -> Tensor:
        """Return [B, N, D]; sample b goes through expert `expert_B[b]` (int64), scaled by `factor_B[b]` (value 1).

        `samples_K[k]` (int64) is the number of samples of expert k; it stays where it is, so that nothing waits for the
        device.
        """
        order_B = torch.argsort(expert_B, stable=True)
        out_RD = self.apply_sorted(h_BND[order_B].flatten(0, 1), samples_K * h_BND.shape[1])
        out_BND = torch.empty_like(h_BND).index_copy(0, order_B, out_RD.view_as(h_BND))
        return out_BND * factor_B.to(out_BND.dtype)[:, None, None]


class SpaceMoE(Experts):
    """`out = 1/n_y sum_i e_{route(y_i)}(h o Mhat_i)` (Sec. 3.1), by the identity in docs/architecture.md.

    With w_k[j] the weight of expert k at image token j and c_k its total weight,
    `out[j] = sum_k w_k[j] (e_k(h[j]) - e_k(0)) + sum_k c_k e_k(0)`.

    shared: hidden width of one more expert that every image token runs, whatever the caption, and that is added to the sum
    (not in the paper; arXiv 2512.01252); 0: none. It is held whole by every rank.
    """

    shared: nn.Sequential | None

    def __init__(self, num_experts: int, dim: int, hidden: int, backend: SpaceBackend, seed: int, shared: int = 0) -> None:
        super().__init__(num_experts, dim, hidden, "gelu", seed)
        self.norm = nn.LayerNorm(dim)
        self.shared = None
        if shared:
            self.shared = nn.Sequential(nn.Linear(dim, shared), nn.GELU(), nn.Linear(shared, dim))
        self.backend: str = backend
        self.use_megablocks = backend == "megablocks"

    def forward(self, h_BND: Tensor, mask_BNY: Tensor, weight_BYK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [B, N, D] and, without gradient, the share of image tokens that need each expert [B, K].

        mask_BNY: float32 zeros and ones. weight_BYK: float32, see `routing.BlockPlan`.
        """
        x_BND = self.norm(h_BND)
        w_BNK = mask_BNY @ weight_BYK
        used_BK = (w_BNK.detach() > 0).float().mean(dim=1)
        # Before `routed_sum`, as the constants below.
        shared_BND = 0 if self.shared is None else self.shared(x_BND)
        if self.backend == "literal":
            return literal_space_moe(self, x_BND, mask_BNY, weight_BYK) + shared_BND, used_BK
        x_RD, w_RK = x_BND.flatten(0, 1), w_BNK.flatten(0, 1).to(x_BND.dtype)
        # Compute the constants before `routed_sum`: recomputation stops at the last saved tensor, so the exchange at the end
        # of `routed_sum`, which brings outputs back from other ranks, is not repeated.
        zero_KD = self.at_zero_KD()
        constant_BD = weight_BYK.sum(dim=1).to(x_BND.dtype) @ self.gathered(zero_KD + self.b2)
        out_RD = self.routed_sum(x_RD, w_RK, zero_KD)
        return out_RD.view_as(x_BND) + constant_BD.unsqueeze(1) + shared_BND, used_BK

    def routed_sum(self, x_RD: Tensor, w_RK: Tensor, zero_KD: Tensor) -> Tensor:
        """Return `sum_k w[r,k] (e_k(x[r]) - e_k(0))`, [R, D]; zero_KD: `e_k(0) - b2_k` of the experts held here."""
        form = FORMS[self._choose_form((w_RK.detach() > 0).float())]
        return form(self, x_RD, w_RK) - w_RK @ zero_KD

    def gathered(self, own_KD: Tensor) -> Tensor:
        """Return the rows of all experts, given those of the experts held here."""
        return own_KD

    def _choose_form(self, used: Tensor) -> str:
        if self.backend in FORMS:
            return self.backend
        # Reading the density is free on the CPU; on a GPU it would stop the launch queue in every layer, and the wide
        # form has static shapes. MegaBlocks' product is for the Time-MoE: here it would need the pairs counted.
        sparse = self.backend == "auto" and used.device.type == "cpu" and bool(used.mean() <= WIDE_DENSITY)
        return "grouped" if sparse else "wide"


def grouped_space_moe(experts: Experts, x_RD: Tensor, w_RK: Tensor) -> Tensor:
    """Return `sum_k w[r,k] (e_k(x[r]) - b2_k)`, [R, D], from the (row, expert) pairs with w > 0 alone.

    Shapes depend on the number of pairs, so on a GPU the host waits once in every layer.
    """
    needed_KR = (w_RK.detach() > 0).t()
    expert_P, row_P = needed_KR.nonzero(as_tuple=True)
    y_PD = experts.apply_sorted(x_RD[row_P], needed_KR.sum(dim=1), bias=False)
    return torch.zeros_like(x_RD).index_add(0, row_P, y_PD * w_RK[row_P, expert_P].unsqueeze(-1))


# Each takes the experts, rows x [R, D] and weights w [R, K], and returns `sum_k w[r,k] (e_k(x[r]) - b2_k)`, [R, D].
FORMS: dict[str, Callable[[Experts, Tensor, Tensor], Tensor]] = {
    "grouped": grouped_space_moe,
    "wide": lambda experts, x_RD, w_RK: experts.wide(x_RD, w_RK),  # the layer's own, which train.compile replaces
}


def literal_space_moe(experts: Experts, x_BND: Tensor, mask_BNY: Tensor, weight_BYK: Tensor) -> Tensor:
    """The formula of Sec. 3.1 as printed: every text token runs its expert over the whole masked image. The reference."""
    chosen_S = weight_BYK.detach().argmax(dim=-1).flatten()
    factor_S = weight_BYK.sum(dim=-1).flatten()
    order_S = torch.argsort(chosen_S, stable=True)
    masked_SND = torch.einsum("bnd,bny->bynd", x_BND, mask_BNY.to(x_BND.dtype)).flatten(0, 1)
    counts = torch.bincount(chosen_S, minlength=experts.num_experts) * x_BND.shape[1]
    y_SND = experts.apply_sorted(masked_SND[order_S].flatten(0, 1), counts).view_as(masked_SND)
    y_SND = torch.empty_like(y_SND).index_copy(0, order_S, y_SND) * factor_S.to(y_SND.dtype)[:, None, None]
    return y_SND.unflatten(0, weight_BYK.shape[:2]).sum(dim=1)
