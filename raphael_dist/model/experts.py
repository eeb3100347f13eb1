"""K feed-forward experts held as stacked tensors, so that any set of experts is a contiguous slice of each parameter.

Shape legend: R rows, K experts, D width, F hidden width (2F for the fused GEGLU projection).
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raphael_dist.errors import UserError

Activation = Literal["gelu", "geglu"]


class Experts(nn.Module):
    """The experts of one layer: `e_k(x) = w2_k act(w1_k x + b1_k) + b2_k`.

    A base class, because ZeRO-3 gathers a module's own parameters around its `forward`: the layer that decides how the
    experts run must be the module that owns them.

    Args:
        num_experts: experts held here; `first_expert` is the global id of the first of them.
        dim: width of a row. hidden: width between the two layers.
        seed: with the global id it fixes an expert's initial weights, so every placement starts from the same model.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        activation: Activation = "gelu",
        seed: int = 0,
        first_expert: int = 0,
    ) -> None:
        super().__init__()
        self.num_experts, self.dim, self.hidden, self.activation = num_experts, dim, hidden, activation
        self.use_megablocks = False
        fused = 2 * hidden if activation == "geglu" else hidden
        self.w1 = nn.Parameter(torch.empty(num_experts, fused, dim))
        self.b1 = nn.Parameter(torch.empty(num_experts, fused))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.b2 = nn.Parameter(torch.empty(num_experts, dim))
        if not self.w1.is_meta:
            self._initialise(seed, first_expert)

    @torch.no_grad()
    def _initialise(self, seed: int, first_expert: int) -> None:
        for k in range(self.num_experts):
            draw = torch.Generator(device=self.w1.device).manual_seed((seed * 1_000_003 + first_expert + k) % 2**63)
            for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
                bound = 1 / math.sqrt(weight.shape[-1])  # nn.Linear's default
                weight[k].uniform_(-bound, bound, generator=draw)
                bias[k].uniform_(-bound, bound, generator=draw)

    def act(self, x: Tensor) -> Tensor:
        """GELU, or the gated GELU of diffusers' feed-forward layer, over the last dimension."""
        if self.activation == "gelu":
            return F.gelu(x)
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    def at_zero_KD(self) -> Tensor:
        """Return `e_k(0) - b2_k` of every expert, [K, D] (docs/architecture.md, the identity)."""
        return torch.einsum("kdf,kf->kd", self.w2, self.act(self.b1))

    def apply_sorted(self, x_RD: Tensor, counts: Sequence[int], bias: bool = True) -> Tensor:
        """Apply expert k to its rows; the rows lie sorted by expert, `counts[k]` of them for expert k.

        Without `bias`, b2 is left out. Every expert takes part, with zero rows if it has none, so that every parameter has a
        gradient on every rank (ZeRO would otherwise add up gradients of different experts).
        """
        # Without a single row grouped_mm fails in its backward.
        if x_RD.shape[0] and (self.use_megablocks or _use_grouped_mm(x_RD, self.hidden)):
            return self._grouped(x_RD, counts, bias)
        parts = [self._one(k, rows, bias) for k, rows in enumerate(x_RD.split(list(counts)))]
        return torch.cat(parts)

    def _one(self, k: int, x_RD: Tensor, bias: bool) -> Tensor:
        hidden_RF = self.act(F.linear(x_RD, self.w1[k], self.b1[k]))
        return F.linear(hidden_RF, self.w2[k], self.b2[k] if bias else None)

    def _grouped(self, x_RD: Tensor, counts: Sequence[int], bias: bool) -> Tensor:
        product = megablocks_product(counts) if self.use_megablocks else _torch_product(counts, x_RD.device)
        counts_K = torch.tensor(counts, device=x_RD.device)
        expert_R = torch.repeat_interleave(counts_K, output_size=x_RD.shape[0])
        hidden_RF = self.act(product(x_RD, self.w1) + self.b1[expert_R])
        out_RD = product(hidden_RF, self.w2)
        return out_RD + self.b2[expert_R] if bias else out_RD

    def wide(self, x_RD: Tensor, w_RK: Tensor) -> Tensor:
        """Return `sum_k w[r,k] (e_k(x[r]) - b2_k)`, [R, D], as two dense products over all experts' hidden units."""
        fused_RKF = F.linear(x_RD, self.w1.flatten(0, 1), self.b1.flatten()).unflatten(1, self.b1.shape)
        hidden_RKF = self.act(fused_RKF) * w_RK.unsqueeze(-1)
        return hidden_RKF.flatten(1) @ self.w2.transpose(1, 2).flatten(0, 1)


def _torch_product(counts: Sequence[int], device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return `(x, w) -> x w_k^T` for rows sorted by expert, w [K, out, in], by torch's grouped product."""
    ends_K = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    return lambda x, w: F.grouped_mm(x, _aligned(w).transpose(1, 2), offs=ends_K)


def megablocks_product(counts: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the same product by MegaBlocks (bfloat16 on a GPU). Raises UserError when it is not installed."""
    try:
        from megablocks import grouped_gemm_util

        gmm = grouped_gemm_util.ops.gmm
    except (ImportError, AttributeError):
        raise UserError(
            "model.space_backend: megablocks needs MegaBlocks with its grouped GEMM and a GPU; "
            'pip install "raphael_dist[megablocks]" grouped_gemm, or use auto'
        ) from None
    sizes_K = torch.tensor(counts, dtype=torch.int64)
    return lambda x, w: gmm(x, w, sizes_K, trans_b=True)


def _use_grouped_mm(x_RD: Tensor, hidden: int) -> bool:
    # The CUDA kernel takes bfloat16 rows of whole 16 bytes alone; on the CPU a loop over a few experts is as fast.
    return x_RD.is_cuda and x_RD.dtype == torch.bfloat16 and x_RD.shape[1] % 8 == 0 and hidden % 8 == 0


def _aligned(weight: Tensor) -> Tensor:
    # ZeRO makes parameters views of a flat buffer that may begin anywhere; the CUDA kernel wants multiples of 16 bytes.
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()
