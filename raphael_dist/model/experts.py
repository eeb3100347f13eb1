"""K feed-forward experts, whose weights are stacked so that consecutive experts are a contiguous slice of each parameter.

Shape legend: R rows (token vectors), K experts, D width of a row, F hidden width (2F for the fused GEGLU projection).
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raphael_dist.config.types import fits_grouped_product
from raphael_dist.model.megablocks import megablocks_product

Activation = Literal["gelu", "geglu"]


class Experts(nn.Module):
    """The experts of one MoE layer: expert k computes `e_k(x) = w2_k act(w1_k x + b1_k) + b2_k`.

    This is a base class of the MoE layers, because ZeRO-3 gathers a module's own parameters around its `forward`. Therefore
    the layer that runs the experts must itself own their parameters.

    Args:
        num_experts: number of experts.
        dim: width of a row (a token vector).
        hidden: width between the two linear layers.
        activation: "gelu", or "geglu" (gated GELU).
        seed: seed of the initial weights. Together with an expert's index it fixes that expert's weights.
    """

    # For traces without data: the loop over experts divides the rows evenly and does not read the counts.
    assumes_even_loads = False
    # Whether the layer runs in the Triton kernels of `train.kernels`: for the pairs of rows and experts in use, or for all.
    use_kernel = False
    use_dense_kernel = False

    def __init__(self, num_experts: int, dim: int, hidden: int, activation: Activation = "gelu", seed: int = 0) -> None:
        super().__init__()
        self.num_experts, self.dim, self.hidden, self.activation = num_experts, dim, hidden, activation
        self.use_megablocks = False
        self.megablocks_folder: str | None = None
        self.lora_scale: float | None = None  # with adapters
        fused = 2 * hidden if activation == "geglu" else hidden
        self.w1 = nn.Parameter(torch.empty(num_experts, fused, dim))
        self.b1 = nn.Parameter(torch.empty(num_experts, fused))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.b2 = nn.Parameter(torch.empty(num_experts, dim))
        if not self.w1.is_meta:
            self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        for k in range(self.num_experts):
            draw = torch.Generator(device=self.w1.device).manual_seed((seed * 1_000_003 + k) % 2**63)
            for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
                bound = 1 / math.sqrt(weight.shape[-1])  # nn.Linear's default
                weight[k].uniform_(-bound, bound, generator=draw)
                bias[k].uniform_(-bound, bound, generator=draw)

    def add_lora(self, rank: int, alpha: float) -> None:
        """Add LoRA adapters to w1 and w2 of every expert: w_k becomes `w_k + (alpha / rank) B_k A_k`. B is zero at first.

        The adapters are the parameters w1_lora_A [K, rank, D], w1_lora_B [K, F, rank], w2_lora_A [K, rank, F'] and w2_lora_B
        [K, D, rank] for K experts with w1 [K, F, D] and w2 [K, D, F'] (F' is F / 2 for GEGLU, otherwise F). The adapters
        belong to this module, so that ZeRO-3 gathers them with the weights and expert parallelism shards them in the same
        way.
        """
        self.lora_scale = alpha / rank
        for name in ("w1", "w2"):
            weight = getattr(self, name)
            num_experts, outer, inner = weight.shape
            a, b = weight.new_empty(num_experts, rank, inner), weight.new_zeros(num_experts, outer, rank)
            nn.init.uniform_(a, -1 / math.sqrt(inner), 1 / math.sqrt(inner))  # as peft draws them
            self.register_parameter(f"{name}_lora_A", nn.Parameter(a))
            self.register_parameter(f"{name}_lora_B", nn.Parameter(b))

    def lora(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return the LoRA matrices of the weight `name` ("w1" or "w2") of all K experts, or None if there are no adapters.

        The matrices are A [K, rank, in], and B [K, out, rank], already multiplied by alpha / rank. A caller applies first A
        and then B to a row. The product B A is never added to the weight: bfloat16 would round small changes of a weight
        away, and the product needs as much memory as the weights.
        """
        if self.lora_scale is None:
            return None
        return getattr(self, f"{name}_lora_A"), self.lora_scale * getattr(self, f"{name}_lora_B")

    def act(self, x: Tensor) -> Tensor:
        """Apply the layer's activation to hidden units [..., F]: GELU, or diffusers' gated GELU with result [..., F / 2]."""
        if self.activation == "gelu":
            return F.gelu(x)
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    def at_zero_KD(self) -> Tensor:
        """Return each expert's output for a token of zeros, without its last bias b2: `e_k(0) - b2_k`, [K, D].

        e_k is the function of expert k of K, and D the width of a token. The Space-MoE needs these outputs, because its
        formula runs an expert on an image whose tokens outside a region are set to zero.
        """
        hidden_KF = self.act(self.b1)
        at_zero_KD = torch.einsum("kdf,kf->kd", self.w2, hidden_KF)
        if (lora := self.lora("w2")) is not None:
            at_zero_KD = at_zero_KD + (lora[1] @ (lora[0] @ hidden_KF.unsqueeze(2))).squeeze(2)
        return at_zero_KD

    def apply_sorted(self, x_RD: Tensor, counts_K: Tensor, bias: bool = True) -> Tensor:
        """Apply each expert to its rows (token vectors of width D); return their outputs [R, D], in the same order.

        Experts without rows are run on an empty tensor, so that every parameter gets a gradient on every rank. (Otherwise
        ZeRO would add gradients of different experts to each other.) On a GPU a grouped matrix product reads the counts on
        the device. A loop over experts runs instead on a CPU, and on a GPU if the dtype is float32 or a width is no multiple
        of 8. The loop reads the counts on the host, so the host waits if the tensors are on a GPU.

        Args:
            x_RD: the rows of all experts, sorted by expert.
            counts_K: number of rows of each expert, int64, on the device of the rows.
            bias: whether to add b2, the bias of an expert's second layer.
        """
        rows = x_RD.shape[0]
        if not rows:
            # The backward pass of grouped_mm fails without rows.
            return self._loop(x_RD, [0] * self.num_experts, bias)
        if self.use_megablocks or _use_grouped_mm(x_RD, self.hidden, self.lora("w1")):
            return self._grouped(x_RD, counts_K, bias)
        if self.assumes_even_loads:
            ends = [rows * k // self.num_experts for k in range(self.num_experts + 1)]
            return self._loop(x_RD, [end - start for start, end in pairwise(ends)], bias)
        return self._loop(x_RD, counts_K.tolist(), bias)

    def _loop(self, x_RD: Tensor, counts: list[int], bias: bool) -> Tensor:
        # unbind: one gradient for all experts, where indexing would add up K gradients of the whole stack.
        w1s, b1s, w2s, b2s = (p.unbind(0) for p in (self.w1, self.b1, self.w2, self.b2))
        hidden = map(_linear, torch.split(x_RD, counts), w1s, b1s, self._lora_by_expert("w1"))
        # One activation for all rows: torch.compile would recompile one per expert whenever its number of rows changes.
        activated = torch.split(self.act(torch.cat(list(hidden))), counts)
        biases = b2s if bias else [None] * len(b2s)
        return torch.cat(list(map(_linear, activated, w2s, biases, self._lora_by_expert("w2"))))

    def _lora_by_expert(self, name: str) -> list[tuple[Tensor, Tensor] | None]:
        lora = self.lora(name)
        return [None] * self.num_experts if lora is None else list(zip(lora[0].unbind(0), lora[1].unbind(0), strict=True))

    def _grouped(self, x_RD: Tensor, counts_K: Tensor, bias: bool) -> Tensor:
        grouped = self._grouped_product(counts_K)

        def product(rows: Tensor, name: str) -> Tensor:
            out, lora = grouped(rows, getattr(self, name)), self.lora(name)
            return out if lora is None else out + grouped(grouped(rows, lora[0]), lora[1])

        onehot_RK = expert_of_rows(counts_K, x_RD.shape[0]).to(x_RD.dtype)
        out_RD = product(self.activate(product(x_RD, "w1"), onehot_RK), "w2")
        return add_bias(out_RD, onehot_RK, self.b2) if bias else out_RD

    def _grouped_product(self, counts_K: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        if self.use_megablocks:
            return megablocks_product(counts_K, self.megablocks_folder)
        return _torch_product(counts_K)

    def activate(self, y_RF: Tensor, onehot_RK: Tensor) -> Tensor:
        """Add the first bias of each row's expert and apply the activation: `act(y + b1_k)` for expert k.

        Args:
            y_RF: for each row (token) x, the product `w1_k x` with the first weight of its expert.
            onehot_RK: the expert of each row, one-hot, in the dtype of y.
        """
        return self.act(add_bias(y_RF, onehot_RK, self.b1))

    def sparse(self, x_RD: Tensor, w_RK: Tensor, per_row: int) -> Tensor:
        """Return the weighted sum over experts for each row, [R, D], by Triton kernels that skip experts with weight 0.

        The result equals that of `dense`: `sum_k w[r,k] (e_k(x[r]) - b2_k)` for row r, expert e_k and its last bias b2_k.

        Args:
            x_RD: rows (tokens).
            w_RK: weight of each expert for each row, at least 0.
            per_row: largest possible number of experts with w > 0 in a row.
        """
        from raphael_dist.model.kernels.sparse_experts import sparse_experts

        if not x_RD.shape[0]:
            return self.dense(x_RD, w_RK)
        return sparse_experts(x_RD, w_RK, self.w1, self.b1, self.w2, per_row)

    def dense_by_kernel(self, x_RD: Tensor, w_RK: Tensor) -> Tensor:
        """Return the result of `dense` for the same arguments, by Triton kernels that write and read hidden units once."""
        from raphael_dist.model.kernels.dense_experts import dense_experts

        if not x_RD.shape[0]:
            return self.dense(x_RD, w_RK)
        return dense_experts(x_RD, w_RK, self.w1, self.b1, self.w2)

    def dense(self, x_RD: Tensor, w_RK: Tensor) -> Tensor:
        """Return `sum_k w[r,k] (e_k(x[r]) - b2_k)` for each row r, [R, D]: the weighted outputs without the last bias.

        e_k is expert k, b2_k the bias of its second layer, x = `x_RD` the rows (tokens), and w = `w_RK` the weight of each
        expert for each row. Every expert processes every row, so shapes are static. The weights are multiplied with the
        experts' outputs and not with the hidden units, because the outputs are narrower.
        """
        fused_RKF = torch.unflatten(F.linear(x_RD, self.w1.flatten(0, 1), self.b1.flatten()), 1, self.b1.shape)
        fused_KRF = fused_RKF.transpose(0, 1)
        if (lora := self.lora("w1")) is not None:
            fused_KRF = fused_KRF + (x_RD @ lora[0].transpose(1, 2)) @ lora[1].transpose(1, 2)
        out_KRD = _gelu_product(fused_KRF, self.w2)
        if (lora := self.lora("w2")) is not None:
            out_KRD = out_KRD + _gelu_product(fused_KRF, lora[0]) @ lora[1].transpose(1, 2)
        return (out_KRD * w_RK.t().unsqueeze(-1)).sum(dim=0)


class _GeluProduct(torch.autograd.Function):
    """Computes `gelu(a_k) w_k^T` for every expert k, [K, R, D], from `a` [K, R, F] and the weights w [K, D, F].

    The function saves `a` and w, and computes gelu(a) again in the backward pass. Autograd would also save gelu(a), and a
    copy of w if the weights of all experts were flattened to one matrix.
    """

    @staticmethod
    def forward(ctx: Any, a_KRF: Tensor, w_KDF: Tensor) -> Tensor:
        ctx.save_for_backward(a_KRF, w_KDF)
        return F.gelu(a_KRF) @ w_KDF.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_KRD: Tensor) -> tuple[Tensor, Tensor | None]:
        a_KRF, w_KDF = ctx.saved_tensors
        grad_w = grad_KRD.transpose(1, 2) @ F.gelu(a_KRF) if ctx.needs_input_grad[1] else None
        return torch.ops.aten.gelu_backward(grad_KRD @ w_KDF, a_KRF), grad_w


def _gelu_product(a_KRF: Tensor, w_KDF: Tensor) -> Tensor:
    out_KRD: Tensor = _GeluProduct.apply(a_KRF, w_KDF)  # type: ignore[no-untyped-call]
    return out_KRD


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora: tuple[Tensor, Tensor] | None) -> Tensor:
    out = F.linear(x, weight, bias)
    return out if lora is None else out + F.linear(F.linear(x, lora[0]), lora[1])


def expert_of_rows(counts_K: Tensor, rows: int) -> Tensor:
    """Return the expert of each row (token), one-hot, bool [R, K], for R rows that are sorted by their K experts.

    `counts_K`: number of rows of each expert, int64, on the device of the result. `rows`: number of all rows, R.
    """
    ends_K = counts_K.cumsum(0)
    row_R1 = torch.arange(rows, device=counts_K.device).unsqueeze(1)
    return (row_R1 < ends_K) & (row_R1 >= ends_K - counts_K)


def add_bias(y_RF: Tensor, onehot_RK: Tensor, bias_KF: Tensor) -> Tensor:
    """Add to each row of y [R, F] the bias of the row's expert; return the sum [R, F].

    `onehot_RK` is the expert of each row, one-hot in the dtype of y. `bias_KF` has the biases of K experts. The matrix
    product `onehot_RK @ bias_KF` looks up the bias of each row. The gradient of the biases is then also a matrix product,
    which sums in float32 on every device. The gradient of the indexing `bias[expert]` would be summed in its own dtype
    (bfloat16: 7 to 24% wrong for 4 to 8 thousand rows).
    """
    return torch.addmm(y_RF, onehot_RK, bias_KF)


def _torch_product(counts_K: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function (x, w) that multiplies each row of x with the matrix of its expert k, `x w_k^T`, [R, out].

    x is [R, in] with rows sorted by expert, w is [K, out, in]. `counts_K`: number of rows of each expert. The function runs
    torch's grouped matrix product.
    """
    ends_K = counts_K.cumsum(0).to(torch.int32)
    return lambda x, w: F.grouped_mm(x, _aligned(w).transpose(1, 2), offs=ends_K)


def _use_grouped_mm(x_RD: Tensor, hidden: int, lora: tuple[Tensor, Tensor] | None = None) -> bool:
    # On a CPU the loop over a few experts is as fast.
    widths = [x_RD.shape[1], hidden]
    if lora is not None:
        widths.append(lora[0].shape[1])
    return x_RD.device.type != "cpu" and fits_grouped_product(str(x_RD.dtype).removeprefix("torch."), widths)


def _aligned(weight: Tensor) -> Tensor:
    # ZeRO makes parameters views of a flat buffer with any offset. The CUDA kernel requires multiples of 16 bytes, at which
    # torch's own storages start.
    return weight if weight.storage_offset() * weight.element_size() % 16 == 0 else weight.clone()
