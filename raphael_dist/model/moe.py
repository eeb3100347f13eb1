"""Time-MoE (Sec. 7.3) and Space-MoE (Sec. 3.1) with all experts on one rank. Expert parallelism uses subclasses of them.

Shape legend: B samples, N image tokens, Y text tokens, K experts, D width, R rows (B * N).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from raphael_dist.config.types import ExpertBackend
from raphael_dist.model.experts import Experts
from raphael_dist.model.norms import LayerNorm
from raphael_dist.model.routing import one_hot

# Above this share of (token, expert) pairs in use, two dense products are faster than gathering on the CPU. Measured with
# tools/bench.py space: 0.68 at width 320, 0.85 at 32 and 64; at 128 gathering is always faster.
DENSE_DENSITY = 0.8


class TimeMoE(Experts):
    """The Time-MoE layer: each sample goes through one expert, which its timestep selects (Sec. 7.3)."""

    def forward(self, h_BND: Tensor, expert_B: Tensor, samples_K: Tensor, factor_B: Tensor) -> Tensor:
        """Run each sample through its expert; return the expert's output times `factor_B`, [B, N, D].

        The input is not added to the output: `TransformerBlock` adds the residual.

        Args:
            h_BND: N image tokens of width D for each of B samples.
            expert_B: expert of each sample, int64.
            samples_K: number of samples of each expert, int64. The host does not read it, so nothing waits for the device.
            factor_B: factor on each sample's output, through which the gate gets its gradient (`routing.choose`).
        """
        if self.use_kernel:
            return self._without_sorting(h_BND, expert_B, factor_B)
        order_B = torch.argsort(expert_B, stable=True)
        out_RD = self.apply_sorted(h_BND[order_B].flatten(0, 1), samples_K * h_BND.shape[1])
        out_BND = torch.empty_like(h_BND).index_copy(0, order_B, out_RD.view_as(h_BND))
        return out_BND * factor_B.to(out_BND.dtype)[:, None, None]

    def _without_sorting(self, h_BND: Tensor, expert_B: Tensor, factor_B: Tensor) -> Tensor:
        """Return the result of `forward`, computed by the Space-MoE's Triton kernels.

        These kernels do not require the samples to be sorted by expert.
        """
        w_B1K = one_hot(expert_B, self.num_experts).to(h_BND.dtype).unsqueeze(1)
        w_RK = w_B1K.expand(-1, h_BND.shape[1], -1).flatten(0, 1)
        out_BND = (self.sparse(h_BND.flatten(0, 1), w_RK, per_row=1) + w_RK @ self.b2).view_as(h_BND)
        return out_BND * factor_B.to(out_BND.dtype)[:, None, None]


class SpaceMoE(Experts):
    """The Space-MoE layer: each image token goes through the experts of the text tokens whose regions contain it.

    A text token's region is the set of image tokens that attend to it most (`routing.region_mask_BNY`). The paper's formula
    is `out = 1/n_y sum_i e_{route(y_i)}(h o Mhat_i)`, with image tokens h, n_y text tokens y_i, experts e_k, and the region
    of y_i as a mask Mhat_i of 0 and 1 (Sec. 3.1). Let c_k be the share of the text tokens that are routed to expert k, and
    w_k[j] the share of the text tokens that are routed to expert k and whose region contains image token j. Then this equals
    `out[j] = sum_k w_k[j] (e_k(h[j]) - e_k(0)) + sum_k c_k e_k(0)` (docs/architecture.md).

    A shared expert (not in the paper; arXiv 2512.01252) processes every image token; its output is added. With expert
    parallelism every rank has a whole copy of it. The constructor's argument `shared` is its hidden width; 0: none.
    """

    shared: nn.Sequential | None

    def __init__(self, num_experts: int, dim: int, hidden: int, backend: ExpertBackend, seed: int, shared: int = 0) -> None:
        super().__init__(num_experts, dim, hidden, "gelu", seed)
        self.norm = LayerNorm(dim)
        self.shared = None
        if shared:
            self.shared = nn.Sequential(nn.Linear(dim, shared), nn.GELU(), nn.Linear(shared, dim))
        self.backend: str = backend
        self.use_megablocks = backend == "megablocks"

    def forward(self, h_BND: Tensor, mask_BNY: Tensor, weight_BYK: Tensor) -> tuple[Tensor, Tensor]:
        """Run each image token through the experts of the text tokens whose regions contain it.

        Args:
            h_BND: N image tokens of width D for each of B samples.
            mask_BNY: float32, 1 where image token n is in the region of text token y, else 0.
            weight_BYK: float32, for each of Y text tokens and K experts: 1 / (number of text tokens) at the token's expert,
                else 0 (`routing.space_weights_BYK`).

        Returns:
            The output [B, N, D], and the share of image tokens that need each expert [B, K], without gradient.
        """
        x_BND = self.norm(h_BND)
        w_BNK = mask_BNY @ weight_BYK
        used_BK = (w_BNK.detach() > 0).float().mean(dim=1)
        # Everything else is computed before `routed_sum`. Recomputation stops at the last saved tensor, so the exchange at
        # the end of `routed_sum`, which returns outputs of other ranks, is not repeated.
        shared_BND = 0 if self.shared is None else self.shared(x_BND)
        if self.backend == "reference":
            return reference_space_moe(self, x_BND, mask_BNY, weight_BYK) + shared_BND, used_BK
        x_RD, w_RK = x_BND.flatten(0, 1), w_BNK.flatten(0, 1).to(x_BND.dtype)
        zero_KD = self.at_zero_KD()
        constant_BD = weight_BYK.sum(dim=1).to(x_BND.dtype) @ self.gathered(zero_KD + self.b2)
        out_RD = self.routed_sum(x_RD, w_RK, zero_KD)
        return out_RD.view_as(x_BND) + constant_BD.unsqueeze(1) + shared_BND, used_BK

    def routed_sum(self, x_RD: Tensor, w_RK: Tensor, zero_KD: Tensor) -> Tensor:
        """Return the weighted sum over experts `sum_k w[r,k] (e_k(x[r]) - e_k(0))` for each image token r, [R, D].

        Args:
            x_RD: image tokens of all samples.
            w_RK: weight of each expert for each token, at least 0.
            zero_KD: for each expert e_k on this rank, `e_k(0) - b2_k`, its output for a token of zeros without last bias.
        """
        if self.use_kernel:
            return self.sparse(x_RD, w_RK, self.num_experts) - w_RK @ zero_KD
        if self.use_dense_kernel:
            return self.dense_by_kernel(x_RD, w_RK) - w_RK @ zero_KD
        run = SPACE_BACKENDS[self._choose_backend((w_RK.detach() > 0).float())]
        return run(self, x_RD, w_RK) - w_RK @ zero_KD

    def gathered(self, own_KD: Tensor) -> Tensor:
        """Return one vector for each of the layer's K experts, [K, D], given the vectors of this rank's experts, `own_KD`.

        In this class all experts are on this rank, so the result is `own_KD`. With expert parallelism a subclass gathers the
        vectors of other ranks. The vectors are the experts' outputs for a token of zeros.
        """
        return own_KD

    def _choose_backend(self, used: Tensor) -> str:
        if self.backend in SPACE_BACKENDS:
            return self.backend
        # On a GPU the host would wait for the density in every layer; the dense backend has static shapes. MegaBlocks'
        # product serves the Time-MoE only: here the pairs would have to be counted.
        sparse = self.backend == "auto" and used.device.type == "cpu" and bool(used.mean() <= DENSE_DENSITY)
        return "grouped" if sparse else "dense"


def grouped_space_moe(experts: Experts, x_RD: Tensor, w_RK: Tensor) -> Tensor:
    """Return the weighted sum of the experts' outputs without their last biases, which the caller adds, [R, D].

    For row (token) r it is `sum_k w[r,k] (e_k(x[r]) - b2_k)`: `w_RK` is the weight of each expert for each row, e_k is
    expert k, and b2_k its last bias. Only (row, expert) pairs with w > 0 are computed. Shapes depend on the number of these
    pairs, so the CPU waits for the GPU once per layer.
    """
    needed_KR = (w_RK.detach() > 0).t()
    expert_P, row_P = needed_KR.nonzero(as_tuple=True)
    y_PD = experts.apply_sorted(x_RD[row_P], needed_KR.sum(dim=1), bias=False)
    return torch.zeros_like(x_RD).index_add(0, row_P, y_PD * w_RK[row_P, expert_P].unsqueeze(-1))


# Functions of the experts, rows x [R, D] and weights w [R, K] that return `sum_k w[r,k] (e_k(x[r]) - b2_k)`, [R, D].
SPACE_BACKENDS: dict[str, Callable[[Experts, Tensor, Tensor], Tensor]] = {
    "grouped": grouped_space_moe,
    "dense": lambda experts, x_RD, w_RK: experts.dense(x_RD, w_RK),  # looked up late: train.compile replaces the method
}


def reference_space_moe(experts: Experts, x_BND: Tensor, mask_BNY: Tensor, weight_BYK: Tensor) -> Tensor:
    """Compute the Space-MoE by the formula of Sec. 3.1 as printed: every text token runs its expert on the masked image.

    It is slow and serves as a reference for `SpaceMoE`. Returns [B, N, D].

    Args:
        experts: the K experts.
        x_BND: normalised image tokens.
        mask_BNY: float32, 1 where image token n is in the region of text token y, else 0.
        weight_BYK: float32, weight of each text token at its expert, else 0.
    """
    chosen_S = weight_BYK.detach().argmax(dim=-1).flatten()
    factor_S = weight_BYK.sum(dim=-1).flatten()
    order_S = torch.argsort(chosen_S, stable=True)
    masked_SND = torch.einsum("bnd,bny->bynd", x_BND, mask_BNY.to(x_BND.dtype)).flatten(0, 1)
    counts = torch.bincount(chosen_S, minlength=experts.num_experts) * x_BND.shape[1]
    y_SND = experts.apply_sorted(masked_SND[order_S].flatten(0, 1), counts).view_as(masked_SND)
    y_SND = torch.empty_like(y_SND).index_copy(0, order_S, y_SND) * factor_S.to(y_SND.dtype)[:, None, None]
    return torch.unflatten(y_SND, 0, weight_BYK.shape[:2]).sum(dim=1)
