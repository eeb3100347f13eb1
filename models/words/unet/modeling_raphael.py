# Copyright the authors of raphael_dist. Licensed under the Apache License, Version 2.0:
# http://www.apache.org/licenses/LICENSE-2.0

"""RaphaelUNet2D, for diffusers and transformers.

Made from the source of raphael_dist 0.1.0, for drawing only; not meant to be edited.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, cast

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

# ---- model.routing ---------------------------------------------------------------------------------------------------


GateGradient = Literal["straight_through", "none", "scaled"]


class Gate(nn.Module):
    """A small network that selects an expert: it maps an embedding to one logit per expert (Sec. 3.1 and 7.3)."""

    def __init__(self, dim: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Return one logit per expert, float32 [..., K], for embeddings x [..., D] of text tokens or timesteps."""
        logits: Tensor = self.net(x)
        return logits.float()


def gate_logits(gates: Sequence[Gate], x: Tensor) -> Tensor:
    """Return the logits of the gates of L transformer blocks for the same input x [..., D], float32 [L, ..., K].

    A gate has one logit for each of K experts. Two matrix products compute the logits of all gates. Running the gates one by
    one would need 3 kernel launches per gate (two layers and GELU), and 6 per gate in the backward pass.
    """
    first, last = ([cast(nn.Linear, gate.net[i]) for gate in gates] for i in (0, 2))
    fused = nn.functional.linear(x, torch.cat([g.weight for g in first]), torch.cat([g.bias for g in first]))
    hidden_LRH = torch.unflatten(nn.functional.gelu(fused).flatten(0, -2), -1, (len(first), -1)).transpose(0, 1)
    w_LHK, b_L1K = torch.stack([g.weight for g in last]).transpose(1, 2), torch.stack([g.bias for g in last]).unsqueeze(1)
    return torch.unflatten(torch.baddbmm(b_L1K, hidden_LRH, w_LHK), 1, x.shape[:-1]).float()


@dataclass(frozen=True)
class BlockRouting:
    """The experts selected for one transformer block and one micro-batch of B samples.

    Attributes:
        time_expert_B: int64, the time expert of each sample; None without a Time-MoE.
        time_samples: number of samples of each time expert, int64 [K] on the model's device. If the time experts are
            sharded over ranks, it is a `GroupSamples` (`parallel.expert_dispatch`) with the counts of all these ranks.
        time_factor_B: float32, factor on the output of each sample's time expert, through which the time gate gets its
            gradient (the second result of `choose`).
        space_weight_BYK: float32, weight of each of K space experts for each of Y text tokens. The weight of the token's
            expert is the factor that `choose` returned, divided by the number of the sample's text tokens (without padding
            tokens if `model.mask_padding`). The weights of the other experts are 0. The text gate gets its gradient through
            these weights. None without a Space-MoE.
        balance_B: float32, load-balance loss of the gates for each sample; None if this loss is off or gradients are
            disabled.
    """

    time_expert_B: Tensor | None
    time_samples: Any
    time_factor_B: Tensor | None
    space_weight_BYK: Tensor | None
    balance_B: Tensor | None = None


def one_hot(index: Tensor, num_classes: int) -> Tensor:
    """Return the one-hot encoding of `index` (int64 [...], from 0), bool [..., num_classes].

    torch's `one_hot` reads the largest index on most devices, so the host would wait.
    """
    return index.unsqueeze(-1) == torch.arange(num_classes, device=index.device)


def choose(logits: Tensor, noise: Tensor | None, gradient: GateGradient) -> tuple[Tensor, Tensor]:
    """Choose experts by route = argmax softmax(logits + noise) (Sec. 3.1).

    Args:
        logits: the gates' logits for K experts, float32 [..., K].
        noise: of the same shape, added to the logits; None: no noise.
        gradient: how the gate gets its gradient (`model.gate_gradient`).

    Returns:
        The chosen expert, int64 [...], and a factor for its output, float32 [...], through which the gate gets its gradient.
        With p, the probability of the chosen expert, the factor is p / p.detach(), whose value is 1 (straight_through), the
        constant 1 (none), or p (scaled).
    """
    probability = torch.softmax(logits if noise is None else logits + noise, dim=-1)
    chosen = probability.detach().argmax(dim=-1)
    p = probability.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    if gradient == "straight_through":
        return chosen, p / p.detach()
    return chosen, p if gradient == "scaled" else torch.ones_like(p)


def band_of_timestep_B(timestep_B: Tensor, num_experts: int, num_timesteps: int) -> Tensor:
    """Return the time expert of each sample's timestep, int64 [B] in 0 .. K-1, for `model.time_routing=boundaries`.

    The `num_timesteps` timesteps are divided into K = `num_experts` equal bands (subranges), one for each expert. This is
    not in the paper; Wan 2.2 has two such experts. Bands have equally many timesteps, not equal ranges of the
    signal-to-noise ratio. Training draws timesteps evenly, also for each group of ranks that share experts, so every expert
    gets about equally many samples.
    """
    return (timestep_B * num_experts // num_timesteps).long().clamp(0, num_experts - 1)


def _mean_weight_BY(taking_part_BY: Tensor) -> Tensor:
    """Return weights with which a sum over a sample's text tokens is the mean over the counted ones, float32 [B, Y].

    The weight is 1 / (number of counted tokens) for counted tokens, else 0. `taking_part_BY`: bool, True for the tokens to
    count, False for others such as padding.
    """
    share_BY = taking_part_BY.float()
    return share_BY / share_BY.sum(dim=-1, keepdim=True).clamp(min=1)


def space_weights_BYK(chosen_BY: Tensor, factor_BY: Tensor, num_experts: int, taking_part_BY: Tensor | None) -> Tensor:
    """Return the weight of each text token for each expert: 1/n_y at the token's expert, else 0 (Sec. 3.1).

    n_y is the number of the sample's text tokens, without those that `taking_part_BY` leaves out.

    Args:
        chosen_BY: expert of each text token, int64. All tensors can have the same further axes in front, such as one for the
            transformer blocks.
        factor_BY: float32, the factor that `choose` returned. The weights are multiplied by it, so that the gate gets a
            gradient.
        num_experts: number of experts, K.
        taking_part_BY: bool, False for tokens that are left out, such as padding; their weights are 0. None: all tokens
            count.

    Returns:
        The weights, float32 [B, Y, K], with the further axes in front.
    """
    onehot_BYK = one_hot(chosen_BY, num_experts).to(factor_BY.dtype)
    if taking_part_BY is None:
        return onehot_BYK * (factor_BY / chosen_BY.shape[-1]).unsqueeze(-1)
    return onehot_BYK * (factor_BY * _mean_weight_BY(taking_part_BY)).unsqueeze(-1)


@torch.no_grad()
def region_mask_BNY(map_BNY: Tensor, threshold: float) -> Tensor:
    """Return each text token's region, Mhat of Sec. 3.1: float32 [B, N, Y] of ones and zeros, without a gradient.

    An image token is in the region of a text token if its attention to this token is at least `threshold` times the largest
    attention of any image token to it.

    Args:
        map_BNY: attention of each of N image tokens to each of Y text tokens.
        threshold: alpha of Sec. 3.1, 0..1.
    """
    map_BNY = map_BNY.float()
    return (map_BNY >= threshold * map_BNY.amax(dim=1, keepdim=True)).float()

# ---- model.unet_interface --------------------------------------------------------------------------------------------


class GateNoise(NamedTuple):
    """Noise for the logits of the gates, float32. It depends only on the seed and the sample's position in training.

    Attributes:
        time_BLK: for the time gates of L transformer blocks, which select one of K experts for each of B samples.
        space_BLYK: for the text gates of the blocks, which select one of K experts for each of a sample's Y text tokens.
    """

    time_BLK: Tensor
    space_BLYK: Tensor


class UNetInput(NamedTuple):
    """Inputs of the U-Net for B samples.

    Attributes:
        x_BCHW: noised latents. For super-resolution, the channels of the small images are appended.
        timestep_B: diffusion timestep of each sample, int64.
        text_BYD: Y text tokens of width D for each sample.
        text_mask_BY: bool, False at padding.
        end_B: index of the end-of-text token, int64.
        noise: noise on the logits of the gates, which select experts, in training; None: no noise.
    """

    x_BCHW: Tensor
    timestep_B: Tensor
    text_BYD: Tensor
    text_mask_BY: Tensor
    end_B: Tensor
    noise: GateNoise | None


class UNetOutput(NamedTuple):
    """Results of one forward pass of the U-Net.

    This is a tuple because DeepSpeed looks for tensors only in tuples, lists and dicts. If DeepSpeed finds no tensor, it
    does not prepare the backward pass, and gradients of earlier micro-steps are added twice.

    Attributes:
        prediction: predicted noise, velocity or flow [B, C, h, w].
        edge_logits: for each transformer block with an edge module, logits of the predicted edges, float32 [B, h, w].
        space_used: for each block, share of image tokens (0..1) that each of K space experts processes, [B, K].
        time_expert: for each block, the time expert of each sample, int64 [B].
        balance: for each block, load-balance loss of the gates, float32 [B]; empty if this loss is off or gradients are
            disabled.
    """

    prediction: Tensor
    edge_logits: tuple[Tensor, ...] = ()
    space_used: tuple[Tensor, ...] = ()
    time_expert: tuple[Tensor, ...] = ()
    balance: tuple[Tensor, ...] = ()


class ControlResiduals(NamedTuple):
    """Tensors that a ControlNet adds to the U-Net's skip connections (outermost first) and to its middle block's output."""

    skips: tuple[Tensor, ...]
    middle: Tensor

# ---- model.norms -----------------------------------------------------------------------------------------------------


class GroupNorm(nn.GroupNorm):
    """GroupNorm of a feature map [B, C, H, W], followed by SiLU if `silu` is True.

    The output has the memory format of the input, except with `use_kernel` (the Triton kernel), which returns channels last.
    """

    def __init__(self, groups: int, channels: int, eps: float, silu: bool) -> None:
        super().__init__(groups, channels, eps=eps)
        self.silu, self.use_kernel = silu, False

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the normalised feature map [B, C, H, W], after SiLU if the module was built with `silu`."""
        h_BCHW = super().forward(x_BCHW)
        return match_format(F.silu(h_BCHW), x_BCHW) if self.silu else h_BCHW


class LayerNorm(nn.LayerNorm):
    """LayerNorm of tokens. With `use_kernel` its backward pass is a Triton kernel."""

    use_kernel = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens x [..., D], each normalised over its D values."""
        return super().forward(x)


def match_format(h_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
    """Return the feature map h in the memory format (contiguous or channels last) of the feature map x.

    Needed because, up to torch 2.13, the output of GroupNorm on CUDA is always contiguous.
    """
    channels_last = x_BCHW.is_contiguous(memory_format=torch.channels_last)
    return h_BCHW.contiguous(memory_format=torch.channels_last) if channels_last else h_BCHW

# ---- model.edge_supervision ------------------------------------------------------------------------------------------


class EdgeModule(nn.Module):
    """Five convolutions that predict the image's edges, as logits, from an attention map (P in Sec. 7.2 of the paper).

    `channels`: width of the layers between the first and the last convolution.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = [1, channels, channels, channels, channels, 1]
        layers: list[nn.Module] = []
        for i in range(5):
            layers += [nn.Conv2d(widths[i], widths[i + 1], kernel_size=3, padding=1), nn.SiLU()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, map_BNY: Tensor, end_B: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """Return the logits of the predicted edges, float32 [B, h, w].

        Args:
            map_BNY: attention of each of N image tokens to each of Y text tokens. Only the map of the end-of-text token is
                used, scaled to a maximum of 1.
            end_B: for each sample, the index of the end-of-text token, int64.
            size_hw: height and width of the feature map whose pixels are the image tokens; h * w = N.
        """
        map_BN = map_BNY.gather(2, end_B[:, None, None].expand(-1, map_BNY.shape[1], 1)).squeeze(2).float()
        map_BN = map_BN / map_BN.amax(dim=1, keepdim=True).clamp(min=1e-12)
        image = map_BN.view(-1, 1, *size_hw).to(next(self.parameters()).dtype)
        logits: Tensor = self.net(image)
        return logits.squeeze(1).float()

# ---- config.types ----------------------------------------------------------------------------------------------------


ExpertBackend = Literal["auto", "grouped", "dense", "reference", "megablocks"]


def fits_grouped_product(dtype: str, widths: Iterable[int]) -> bool:
    """Return whether torch's grouped matrix product on GPUs supports matrices of this dtype with rows of these widths.

    It requires bfloat16, and rows whose size is a multiple of 16 bytes.

    Args:
        dtype: "float32" or "bfloat16".
        widths: lengths of rows, in elements.
    """
    return dtype == "bfloat16" and all(width % 8 == 0 for width in widths)

# ---- model.residual_block --------------------------------------------------------------------------------------------


class ResidualBlock(ResnetBlock2D):
    """diffusers' residual block: `x + conv(silu(norm(conv(silu(norm(x))) + time)))`.

    diffusers' forward pass makes the input of the shortcut contiguous in training. The forward pass of this class
    keeps the memory format of the feature map (see `feature_map_format`).

    Args:
        inner: channels of the input.
        outer: channels of the output.
        embed: width of the timestep embedding.
        groups: groups of each GroupNorm.
    """

    def __init__(self, inner: int, outer: int, embed: int, groups: int) -> None:
        super().__init__(in_channels=inner, out_channels=outer, temb_channels=embed, groups=groups, eps=1e-5)
        self.norm1 = GroupNorm(groups, inner, eps=1e-5, silu=True)
        self.norm2 = GroupNorm(groups, outer, eps=1e-5, silu=True)

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor) -> Tensor:
        """Return the block's output [B, C', H, W] for a feature map [B, C, H, W] and the timestep embeddings [B, E]."""
        time_BC11 = self.time_emb_proj(F.silu(embedding_BE))[:, :, None, None]
        h_BCHW = self.conv1(self.norm1(x_BCHW)) + time_BC11
        h_BCHW = self.conv2(self.norm2(h_BCHW))
        out_BCHW: Tensor = h_BCHW + (x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW))
        return out_BCHW


def feature_map_format(device: torch.device) -> torch.memory_format:
    """Return the memory format for the U-Net's feature maps on `device`: channels last on GPUs, contiguous on CPUs.

    Convolutions are faster on GPUs in channels last. Weights are contiguous on every device, because ZeRO flattens them and
    checkpoints store them in that order.
    """
    return torch.contiguous_format if device.type == "cpu" else torch.channels_last

# ---- model.experts ---------------------------------------------------------------------------------------------------


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
        return _torch_product(counts_K)

    def activate(self, y_RF: Tensor, onehot_RK: Tensor) -> Tensor:
        """Add the first bias of each row's expert and apply the activation: `act(y + b1_k)` for expert k.

        Args:
            y_RF: for each row (token) x, the product `w1_k x` with the first weight of its expert.
            onehot_RK: the expert of each row, one-hot, in the dtype of y.
        """
        return self.act(add_bias(y_RF, onehot_RK, self.b1))

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

# ---- model.moe -------------------------------------------------------------------------------------------------------


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
        order_B = torch.argsort(expert_B, stable=True)
        out_RD = self.apply_sorted(h_BND[order_B].flatten(0, 1), samples_K * h_BND.shape[1])
        out_BND = torch.empty_like(h_BND).index_copy(0, order_B, out_RD.view_as(h_BND))
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

# ---- model.layers ----------------------------------------------------------------------------------------------------


_POSITION_PERIODS = (4.0, 128.0)  # in latent positions


class BlockOutput(NamedTuple):
    """The output of a transformer block for B samples.

    Attributes:
        h_BND: N image tokens of width D for each sample.
        edge_logits: logits of the predicted edges, float32 [B, h, w]; None without an edge module.
        space_used_BK: share of image tokens that each of K space experts processes, 0..1; None without a Space-MoE.
    """

    h_BND: Tensor
    edge_logits: Tensor | None
    space_used_BK: Tensor | None


class MapProcessor:
    """An attention processor of diffusers that also returns the attention map M = softmax(Q K^T / sqrt(d)) (Sec. 3.1).

    The map is averaged over heads.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        use_kernel: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Compute cross-attention from N image tokens to Y text tokens, and also return the attention map.

        Args:
            attn: diffusers' attention layer, whose projections are used.
            hidden_states: image tokens [B, N, D].
            encoder_hidden_states: text tokens [B, Y, text width].
            attention_mask: not used; diffusers passes it.
            use_kernel: whether to use the Triton kernel, which never stores the attention maps of single heads.

        Returns:
            The output [B, N, D], and the attention of each image token to each text token, float32 [B, N, Y].
        """
        projections = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        out, map_BNY = self._attend(*projections, attn.heads, attn.scale, use_kernel)
        projected: Tensor = attn.to_out[1](attn.to_out[0](out))
        return projected, map_BNY

    @staticmethod
    def _attend(
        q_BND: Tensor, k_BYD: Tensor, v_BYD: Tensor, heads: int, scale: float, use_kernel: bool
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (torch.unflatten(x, 2, (heads, -1)).transpose(1, 2) for x in (q_BND, k_BYD, v_BYD))
        map_BHNY = torch.softmax((q @ k.transpose(2, 3)).float() * scale, dim=-1)
        return (map_BHNY.to(v.dtype) @ v).transpose(1, 2).flatten(2), map_BHNY.mean(dim=1)


class TransformerBlock(nn.Module):
    """The transformer block of RAPHAEL (Fig. 3). Without experts it is the block of Stable Diffusion."""

    use_kernel = False  # whether cross-attention with a map runs in the Triton kernel of `train.kernels`

    def __init__(self, config: Any, level: int, edge_channels: int, seed: int) -> None:
        """Build the block.

        Args:
            config: the section `model`, or an object with its fields.
            level: the block's U-Net level, 0 for the outermost; determines its widths.
            edge_channels: width of the module that predicts edges; 0: none.
            seed: fixes the initial weights of the experts.
        """
        super().__init__()
        dim, hidden, head_dim = config.channels[level], config.expert_width[level], config.head_dim
        heads = dim // head_dim
        self.mask_threshold = config.mask_threshold
        self.norm1 = LayerNorm(dim)
        self.attn1 = Attention(dim, heads=heads, dim_head=head_dim)
        self.norm2 = LayerNorm(dim)
        self.attn2 = Attention(dim, cross_attention_dim=config.text_width, heads=heads, dim_head=head_dim)
        self.norm3 = LayerNorm(dim)
        if config.time_experts:
            self.time_moe = TimeMoE(config.time_experts, dim, hidden, config.time_activation, seed=2 * seed)
            self.time_moe.use_megablocks = config.expert_backend == "megablocks"
            self.time_moe.megablocks_folder = config.megablocks_folder
        else:
            self.ff = FeedForward(dim, inner_dim=hidden, activation_fn=config.time_activation)
        self.space_moe = None
        if config.space_experts:
            sizes, shared = (config.space_experts, dim, hidden), math.ceil(config.shared_expert * hidden)
            self.space_moe = SpaceMoE(*sizes, config.expert_backend, seed=2 * seed + 1, shared=shared)
        self.edge = EdgeModule(edge_channels) if edge_channels else None
        self.needs_attention_map = self.space_moe is not None or self.edge is not None
        if self.needs_attention_map:
            self.attn2.set_processor(MapProcessor())  # type: ignore[arg-type]

    def forward(
        self, h_BND: Tensor, text_BYD: Tensor, end_B: Tensor, routing: BlockRouting, size_hw: tuple[int, int]
    ) -> BlockOutput:
        """Run the block: self-attention, cross-attention, Time-MoE, edge prediction, Space-MoE.

        Args:
            h_BND: N image tokens of each sample.
            text_BYD: Y text tokens of each sample.
            end_B: for each sample, the index of the end-of-text token, int64.
            routing: the selected experts of the samples and text tokens.
            size_hw: height and width of the feature map whose pixels are the image tokens; h * w = N.
        """
        h_BND = h_BND + self.attn1(self.norm1(h_BND))
        attended, map_BNY = self._cross_attention(self.norm2(h_BND), text_BYD)
        h_BND = h_BND + attended
        h_BND = h_BND + self._time_layer(self.norm3(h_BND), routing)
        edge_logits, used_BK = None, None
        if self.edge is not None:
            edge_logits = self.edge(map_BNY, end_B, size_hw)
        if self.space_moe is not None:
            assert map_BNY is not None
            mask_BNY = region_mask_BNY(map_BNY, self.mask_threshold)
            out_BND, used_BK = self.space_moe(h_BND, mask_BNY, routing.space_weight_BYK)
            h_BND = h_BND + out_BND
        return BlockOutput(h_BND, edge_logits, used_BK)

    def _cross_attention(self, h_BND: Tensor, text_BYD: Tensor) -> tuple[Tensor, Tensor | None]:
        options = {"use_kernel": self.use_kernel} if self.needs_attention_map else {}
        out = self.attn2(h_BND, encoder_hidden_states=text_BYD, **options)
        return out if self.needs_attention_map else (out, None)

    def _time_layer(self, h_BND: Tensor, routing: BlockRouting) -> Tensor:
        out_BND: Tensor
        if routing.time_expert_B is None:
            out_BND = self.ff(h_BND)
        else:
            out_BND = self.time_moe(h_BND, routing.time_expert_B, routing.time_samples, routing.time_factor_B)
        return out_BND


def image_positions_ND(height: int, width: int, token_size: int, like: Tensor) -> Tensor:
    """Return a sinusoidal position encoding of N image tokens, [N, D], with the device, dtype and D of `like`.

    A quarter of the D values encodes the row, the others the column. Rows and columns are counted from the middle of the
    image, in positions (pixels) of the latents, so they mean the same on every level and in images of every size.

    Args:
        height: height of the feature map in image tokens.
        width: width of the feature map in image tokens; height * width = N.
        token_size: side of an image token, counted in positions of the latents.
        like: tensor [..., D] that determines D, device and dtype of the result, such as the image tokens.
    """
    dim = like.shape[-1]
    rows_HD, columns_WD = (
        _sines((torch.arange(count, device=like.device) + 0.5 - count / 2) * token_size, features)
        for count, features in ((height, dim // 4), (width, dim - dim // 4))
    )
    rows_HWD, columns_HWD = rows_HD[:, None].expand(-1, width, -1), columns_WD.expand(height, -1, -1)
    return torch.cat([rows_HWD, columns_HWD], dim=-1).flatten(0, 1).to(like.dtype)


def _sines(place_P: Tensor, features: int) -> Tensor:
    """Return sines and cosines of P coordinates, [P, features], with geometrically growing periods (`_POSITION_PERIODS`).

    `place_P`: the coordinates, in positions of the latents. `features`: number of values for each coordinate.
    """
    count = (features + 1) // 2
    shortest, longest = _POSITION_PERIODS
    steps = torch.arange(count, device=place_P.device) / max(count - 1, 1)
    angles = 2 * math.pi * place_P[:, None] / (shortest * (longest / shortest) ** steps)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :features]


class SpatialTransformer(nn.Module):
    """A transformer block, with the layers that convert a feature map to its tokens and back.

    Parameter names are those of diffusers' Transformer2DModel. The class has no `forward`: `RaphaelUNet` calls `to_tokens`,
    the block, and `to_feature_map`.
    """

    def __init__(self, config: Any, level: int, edge_channels: int, seed: int) -> None:
        """Build the transformer. The arguments are those of `TransformerBlock`."""
        super().__init__()
        dim = config.channels[level]
        # Side of an image token, counted in positions (pixels) of the latents; 0: no position encoding.
        self.token_size = 2**level if config.image_positions else 0
        self.norm = GroupNorm(config.norm_groups, dim, eps=1e-6, silu=False)
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(config, level, edge_channels, seed)])
        self.proj_out = nn.Linear(dim, dim)

    def to_tokens(self, x_BCHW: Tensor) -> Tensor:
        """Convert a feature map [B, C, h, w] to image tokens [B, N, D], one for each of its N = h * w pixels; D = C."""
        tokens_BND: Tensor = self.proj_in(self.norm(x_BCHW).flatten(2).transpose(1, 2))
        if self.token_size:
            height, width = x_BCHW.shape[2:]
            tokens_BND = tokens_BND + image_positions_ND(height, width, self.token_size, tokens_BND)
        return tokens_BND

    def to_feature_map(self, h_BND: Tensor, x_BCHW: Tensor) -> Tensor:
        """Convert image tokens [B, h * w, C] to a feature map [B, C, h, w], add the feature map `x_BCHW`; return the sum.

        `x_BCHW` is the input of the transformer (its residual). The result has the memory format of `x_BCHW`.
        """
        # A sum has the memory format of its first term. The tokens are channels last, which is slow on a CPU.
        out_BND: Tensor = self.proj_out(h_BND)
        return x_BCHW + out_BND.transpose(1, 2).view_as(x_BCHW)


class UNetLevel(nn.Module):
    """One level of the U-Net's encoder or decoder, or the middle block.

    It consists of residual blocks. On levels with attention, a transformer block follows each residual block, except the
    second one of the middle block. `downsamplers` or `upsamplers` holds the layer that changes the size, if there is one.
    """

    resnets: nn.ModuleList
    attentions: nn.ModuleList | None
    downsamplers: nn.ModuleList | None
    upsamplers: nn.ModuleList | None

    def __init__(
        self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], resize: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions) if attentions else None
        self.downsamplers = nn.ModuleList([resize]) if isinstance(resize, Downsample2D) else None
        self.upsamplers = nn.ModuleList([resize]) if isinstance(resize, Upsample2D) else None

# ---- model.unet ------------------------------------------------------------------------------------------------------


class ForwardState(NamedTuple):
    """State of one forward pass: inputs of all blocks, the experts of blocks that have not run yet, and collected outputs.

    `embedding_BE`: timestep embeddings. `text_BYD`: text tokens. `end_B`: index of the end-of-text token. Each transformer
    block takes one item from `routings`, and appends one to `edge_logits` and to `space_used` (fields of `BlockOutput`).
    """

    embedding_BE: Tensor
    text_BYD: Tensor
    end_B: Tensor
    routings: Iterator[BlockRouting]
    edge_logits: list[Tensor | None]
    space_used: list[Tensor | None]


def _present(values: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(value for value in values if value is not None)


def count_samples(onehot_LBK: Tensor) -> Sequence[Tensor]:
    """Return the number of samples of each time expert: for each of L layers int64 [K], on the device of `onehot_LBK`.

    `onehot_LBK`: for each layer and sample, which of its K time experts it has, one-hot, bool.
    """
    return onehot_LBK.sum(dim=1).unbind(0)


class RaphaelUNet(nn.Module):
    """RAPHAEL's denoising network of noised latents, timestep and caption; without experts Stable Diffusion 2's U-Net."""

    def __init__(self, config: Any, with_edges: bool = True) -> None:
        """Build the U-Net.

        Args:
            config: the sections `model`, `edge`, `diffusion`, `upscale` and `run`, or an object with their fields.
            with_edges: whether to build the modules that predict edges, if edge.weight is above 0.
        """
        super().__init__()
        self.config = m = config.model
        self.num_timesteps, self.upscale = config.diffusion.num_timesteps, config.upscale
        self.seed = config.run.seed
        self.edge_channels = config.edge.channels if with_edges and config.edge.weight > 0 else 0
        # With ZeRO-3, and with diffusers' sequential offload, a module has its weights only during its own forward pass.
        self.gathers_weights = False
        # Expert parallelism replaces this function, because it also needs the counts of other ranks.
        self.count_samples: Callable[[Tensor], Sequence[Any]] = count_samples
        self.block_levels: list[int] = []  # of the transformer blocks, in order of execution
        self.control: nn.Module | None = None  # set by controlnet.add_control
        self.control_scale = 1.0
        channels, embed = m.channels, 4 * m.channels[0]
        self.conv_in = nn.Conv2d(m.latent_channels + self.upscale.channels, channels[0], 3, padding=1)
        self.time_proj = Timesteps(channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(channels[0], embed)
        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]
        for level, width in enumerate(channels):
            self.down_blocks.append(self._down(level, skips[-1], width, skips))
        self.mid_block = self._middle(channels[-1])
        self.up_blocks = nn.ModuleList()
        width = channels[-1]
        for level in reversed(range(len(channels))):
            self.up_blocks.append(self._up(level, width, skips))
            width = channels[level]
        self.conv_norm_out = GroupNorm(m.norm_groups, channels[0], eps=1e-5, silu=True)
        self.conv_out = nn.Conv2d(channels[0], m.latent_channels, 3, padding=1)
        if m.time_experts and m.time_routing == "learned":
            self.time_gates = nn.ModuleList(Gate(embed, m.gate_width, m.time_experts) for _ in range(self.num_blocks))
        if m.space_experts:
            self.text_gates = nn.ModuleList(
                Gate(m.text_width, m.gate_width, m.space_experts) for _ in range(self.num_blocks)
            )

    def _resnet(self, inner: int, outer: int) -> ResidualBlock:
        return ResidualBlock(inner, outer, 4 * self.config.channels[0], self.config.norm_groups)

    def _transformer(self, level: int) -> SpatialTransformer:
        seed = self.seed * 1000 + self.num_blocks
        self.block_levels.append(level)
        return SpatialTransformer(self.config, level, self.edge_channels, seed)

    @property
    def num_blocks(self) -> int:
        """Return the number of transformer blocks."""
        return len(self.block_levels)

    def _level(self, level: int, pairs: list[tuple[int, int]], resize: nn.Module | None) -> UNetLevel:
        resnets = [self._resnet(inner, outer) for inner, outer in pairs]
        with_attention = self.config.attention[level]
        return UNetLevel(resnets, [self._transformer(level) for _ in pairs] if with_attention else [], resize)

    def _down(self, level: int, inner: int, width: int, skips: list[int]) -> UNetLevel:
        count, last = self.config.layers_per_block, level == len(self.config.channels) - 1
        skips += [width] * (count if last else count + 1)
        pairs = [(inner if i == 0 else width, width) for i in range(count)]
        return self._level(level, pairs, None if last else Downsample2D(width, use_conv=True, name="op"))

    def _middle(self, width: int) -> UNetLevel:
        resnets = [self._resnet(width, width), self._resnet(width, width)]
        return UNetLevel(resnets, [self._transformer(len(self.config.channels) - 1)])

    def _up(self, level: int, inner: int, skips: list[int]) -> UNetLevel:
        width, pairs = self.config.channels[level], []
        for _ in range(self.config.layers_per_block + 1):
            pairs.append((inner + skips.pop(), width))
            inner = width
        return self._level(level, pairs, Upsample2D(width, use_conv=True) if level > 0 else None)

    def forward(
        self,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        text_BYD: Tensor,
        text_mask_BY: Tensor,
        end_B: Tensor,
        noise: GateNoise | None = None,
        edge_Bhw: Tensor | None = None,
        residuals: ControlResiduals | None = None,
    ) -> UNetOutput:
        """Predict the noise, velocity or flow in the noised latents `x_BCHW`; the prediction is [B, C, H, W].

        `timestep_B`: int64. `text_BYD`, `text_mask_BY`: text tokens, and bool, False at padding. `end_B`: index of the
        end-of-text token, int64. `noise`: noise on the logits of the gates, which select experts; None: no noise.

        Args:
            edge_Bhw: edge map in 0..1 for the model's own ControlNet; None: that ControlNet is not used.
            residuals: residuals of a ControlNet that is not part of the model; None: there are none.
        """
        inputs = UNetInput(x_BCHW, timestep_B, text_BYD, text_mask_BY, end_B, noise)
        state, routings = self.begin(inputs)
        x, skips = self.encode(state, self.stem(x_BCHW))
        if self.control is not None and edge_Bhw is not None:
            residuals = self.control(inputs, edge_Bhw)
        if residuals is not None:
            skips = [skip + self.control_scale * added for skip, added in zip(skips, residuals.skips, strict=True)]
            x = x + self.control_scale * residuals.middle
        x = self.decode(state, x, skips)
        return UNetOutput(
            prediction=self.conv_out(self.conv_norm_out(x)),
            edge_logits=_present(state.edge_logits),
            space_used=_present(state.space_used),
            time_expert=_present([routing.time_expert_B for routing in routings]),
            balance=_present([routing.balance_B for routing in routings]),
        )

    def begin(self, inputs: UNetInput) -> tuple[ForwardState, list[BlockRouting]]:
        """Begin a forward pass: embed timesteps and select each block's experts; return the pass's state and the experts."""
        embedding = self.time_embedding(self.time_proj(inputs.timestep_B).to(inputs.x_BCHW.dtype))
        routings = self.route_blocks(inputs.timestep_B, embedding, inputs.text_BYD, inputs.text_mask_BY, inputs.noise)
        return ForwardState(embedding, inputs.text_BYD, inputs.end_B, iter(routings), [], []), routings

    def stem(self, x_BCHW: Tensor) -> Tensor:
        """Return the first feature map [B, C', H, W], computed by the first convolution from noised latents [B, C, H, W]."""
        x: Tensor = self.conv_in(x_BCHW.contiguous(memory_format=feature_map_format(x_BCHW.device)))
        return x

    def encode(self, state: ForwardState, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the encoder and the middle block on `x`, the result of `stem`. `state`: the first result of `begin`.

        Returns the output of the middle block, and the encoder's feature maps that the decoder reads, outermost first.
        """
        skips = [x]
        for level in cast(list[UNetLevel], self.down_blocks):
            for i in range(len(level.resnets)):
                x = self._layer(state, level, i, x)
                skips.append(x)
            if level.downsamplers is not None:
                x = level.downsamplers[0](x)
                skips.append(x)
        x = self._layer(state, self.mid_block, 0, x)
        return self._residual(self.mid_block, 1, x, state.embedding_BE), skips

    def decode(self, state: ForwardState, x: Tensor, skips: list[Tensor]) -> Tensor:
        """Run the decoder on the results of `encode`, and return the feature map before the last norm and convolution."""
        skips = list(skips)
        for level in cast(list[UNetLevel], self.up_blocks):
            for i in range(len(level.resnets)):
                x = self._layer(state, level, i, torch.cat([x, skips.pop()], dim=1))
            if level.upsamplers is not None:
                # output_size: the size of the next skip, which can be odd.
                x = level.upsamplers[0](x, output_size=skips[-1].shape[-2:])
        return x

    def _layer(self, state: ForwardState, level: UNetLevel, index: int, x: Tensor) -> Tensor:
        x = self._residual(level, index, x, state.embedding_BE)
        if level.attentions is not None:
            transformer = cast(SpatialTransformer, level.attentions[index])
            x, logits, used = self._attend(transformer, x, state.text_BYD, state.end_B, next(state.routings))
            state.edge_logits.append(logits)
            state.space_used.append(used)
        return x

    def _residual(self, level: UNetLevel, index: int, x: Tensor, embedding_BE: Tensor) -> Tensor:
        out: Tensor = self._run(self.config.checkpoint_activations == "all", level.resnets[index], x, embedding_BE)
        return out

    def route_blocks(
        self, timestep_B: Tensor, embedding_BE: Tensor, text_BYD: Tensor, text_mask_BY: Tensor, noise: GateNoise | None
    ) -> list[BlockRouting]:
        """Choose the experts of every block (Sec. 3.1 and 7.3) from timesteps and captions; return one routing per block.

        `embedding_BE`: timestep embeddings. `text_mask_BY`: False at padding. `noise`: added to the gates' logits, or None.
        """
        m = self.config
        none: Sequence[Any] = [None] * self.num_blocks
        time_expert, time_samples, time_factor, space_weight, balance = none, none, none, none, none
        if m.time_experts:
            expert_LB, factor_LB = self.route_time(timestep_B, embedding_BE, noise)
            time_samples = self.count_samples(one_hot(expert_LB, m.time_experts))
            time_expert, time_factor = expert_LB.unbind(), factor_LB.unbind()
        if m.space_experts:
            logits_LBYK = self._gate_logits(self.text_gates, text_BYD)
            noise_LBYK = noise.space_BLYK.transpose(0, 1) if noise else None
            expert_LBY, factor_LBY = choose(logits_LBYK, noise_LBYK, m.gate_gradient)
            taking_part = text_mask_BY if m.mask_padding else None
            space_weight = space_weights_BYK(expert_LBY, factor_LBY, m.space_experts, taking_part).unbind()
        return [
            BlockRouting(*fields)
            for fields in zip(time_expert, time_samples, time_factor, space_weight, balance, strict=True)
        ]

    def route_time(self, timestep_B: Tensor, embedding_BE: Tensor, noise: GateNoise | None) -> tuple[Tensor, Tensor]:
        """Return each sample's time expert in each of L blocks, int64 [L, B], and a factor for the expert's output [L, B].

        The gates get their gradient through this factor (`routing.choose`).
        `embedding_BE`: timestep embeddings. `noise`: added to the gates' logits; None: no noise.
        """
        m = self.config
        if m.time_routing == "boundaries":
            expert_LB = band_of_timestep_B(timestep_B, m.time_experts, self.num_timesteps).expand(self.num_blocks, -1)
            return expert_LB, torch.ones_like(expert_LB, dtype=torch.float32)
        logits_LBK = self._gate_logits(self.time_gates, embedding_BE)
        return choose(logits_LBK, noise.time_BLK.transpose(0, 1) if noise else None, m.gate_gradient)

    def _gate_logits(self, gates: nn.ModuleList, x: Tensor) -> Tensor:
        """Return the logits of the gates of all L blocks for the same input x [..., D], float32 [L, ..., K]."""
        if self.gathers_weights:
            return torch.stack([gate(x) for gate in gates])
        return gate_logits(cast(Sequence[Gate], gates), x)

    def _attend(
        self, transformer: SpatialTransformer, x_BCHW: Tensor, text_BYD: Tensor, end_B: Tensor, routing: BlockRouting
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run a transformer block; return the feature map, and `edge_logits` and `space_used_BK` as in `BlockOutput`."""
        size_hw = (x_BCHW.shape[2], x_BCHW.shape[3])
        h_BND = transformer.to_tokens(x_BCHW)
        block = transformer.transformer_blocks[0]

        def body(h: Tensor, text: Tensor, factor: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, ...]:
            return tuple(block(h, text, end_B, replace(routing, time_factor_B=factor, space_weight_BYK=weight), size_hw))

        tensors = (h_BND, text_BYD, routing.time_factor_B, routing.space_weight_BYK)
        h_BND, edge_logits, used_BK = self._run(self.config.checkpoint_activations != "none", body, *tensors)
        return transformer.to_feature_map(h_BND, x_BCHW), edge_logits, used_BK

    def _run(self, recompute: bool, part: Callable[..., Any], *tensors: Tensor | None) -> Any:
        """Run a part of the model. With `recompute`, it saves no activations and is run again in the backward pass."""
        return part(*tensors)

# ---- model.diffusers_model -------------------------------------------------------------------------------------------


# Fields of the model's config.json that diffusers' U-Nets do not have, and their names in the section `model`.
EXPERT_FIELDS = {
    "num_space_experts": "space_experts",
    "num_time_experts": "time_experts",
    "expert_width": "expert_width",
    "shared_expert": "shared_expert",
    "time_routing": "time_routing",
    "time_activation": "time_activation",
    "gate_width": "gate_width",
    "gate_gradient": "gate_gradient",
    "mask_threshold": "mask_threshold",
    "mask_padding": "mask_padding",
    "image_positions": "image_positions",
}
Sections = Any  # an object with the attributes of `Config` that `RaphaelUNet` reads


def sections_of(fields: Any) -> Sections:
    """Return an object with the configuration sections (`model`, `edge`, ...) from which `RaphaelUNet` is built.

    `fields`: an object with the fields of the model's config.json, as diffusers names them.
    """
    widths, heads = fields.block_out_channels, fields.attention_head_dim
    model = {
        "channels": widths,
        "attention": [kind.startswith("CrossAttn") for kind in fields.down_block_types],
        "layers_per_block": fields.layers_per_block,
        "head_dim": widths[0] // heads[0],
        "norm_groups": fields.norm_num_groups,
        "latent_channels": fields.out_channels,
        "text_width": fields.cross_attention_dim,
        **{ours: getattr(fields, name) for name, ours in EXPERT_FIELDS.items()},
    }
    training = {"expert_backend": "auto", "megablocks_folder": None, "checkpoint_activations": "none", "balance_weight": 0.0}
    edges = fields.edge_channels
    return SimpleNamespace(
        model=SimpleNamespace(**model, **training),
        edge=SimpleNamespace(channels=edges, weight=float(edges > 0)),
        diffusion=SimpleNamespace(num_timesteps=fields.num_train_timesteps),
        upscale=SimpleNamespace(channels=fields.in_channels - fields.out_channels),
        run=SimpleNamespace(seed=0),
    )


# Attributes of a module whose weights are loaded or cast by a hook around its own forward pass: sequential offload of
# accelerate; group offload and layerwise casting of diffusers.
_HOOKS = ("_hf_hook", "_diffusers_hook")


class _Wrapper(ModelMixin, ConfigMixin):
    """Base class that wraps a network of this package as a model of diffusers, so that it can be loaded and saved as one."""

    # Layers whose dtype is read outside of their own forward pass.
    _skip_layerwise_casting_patterns = ["norm", "gates", "conv_in", "edge"]  # noqa: RUF012 (diffusers' name and type)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        down_block_types: Sequence[str] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types: Sequence[str] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        layers_per_block: int = 2,
        cross_attention_dim: int = 1024,
        attention_head_dim: Sequence[int] = (5, 10, 20, 20),
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        use_linear_projection: bool = True,
        num_space_experts: int = 6,
        num_time_experts: int = 4,
        expert_width: Sequence[int] = (1280, 2560, 5120, 5120),
        shared_expert: float = 0.0,
        time_routing: str = "learned",
        time_activation: str = "gelu",
        gate_width: int = 128,
        gate_gradient: str = "straight_through",
        mask_threshold: float = 0.2,
        mask_padding: bool = False,
        image_positions: bool = False,
        edge_channels: int = 16,
        num_train_timesteps: int = 1000,
        auto_map: dict[str, str] | None = None,
    ) -> None:
        """Build the network. Arguments that diffusers' UNet2DConditionModel also has mean the same.

        Args:
            sample_size: height and width of the latents that the network was trained on.
            in_channels: channels of the latents, plus those of the small image for super-resolution.
            out_channels: channels of the latents.
            block_out_channels: width of each level, outermost first.
            down_block_types: diffusers' name for each level of the encoder, outermost first. A level has transformer blocks
                if its name starts with "CrossAttn".
            up_block_types: the same for each level of the decoder, innermost first. It is stored but not used: the decoder
                has transformer blocks on the same levels as the encoder.
            layers_per_block: number of residual blocks of each level of the encoder.
            cross_attention_dim: width of the text tokens.
            attention_head_dim: number (not width) of the attention heads of each level, as in Stable Diffusion 2's files.
            norm_num_groups: number of groups of each GroupNorm.
            act_fn: activation of the residual blocks; always "silu".
            use_linear_projection: always True, as in Stable Diffusion 2.
            num_space_experts: number of experts of each Space-MoE; 0: no Space-MoE.
            num_time_experts: number of experts of each Time-MoE; 0: a dense feed-forward layer.
            expert_width: hidden width of an expert on each level.
            shared_expert: hidden width of an additional expert of each Space-MoE, which processes all image tokens, as a
                multiple of `expert_width`; 0: no such expert.
            time_routing: how a timestep selects its expert: "learned" (by gates) or "boundaries" (by equal ranges of
                timesteps).
            time_activation: activation of the time experts, "gelu" or "geglu".
            gate_width: hidden width of the gates, the networks that select experts.
            gate_gradient: how gates get their gradient in training. With "scaled" the output of the selected expert is
                multiplied by the expert's probability. With "straight_through" and "none" it is not changed.
            mask_threshold: share (0..1). The expert of a text token processes the image tokens whose attention to the text
                token is at least this share of the largest attention to it.
            mask_padding: leave padding tokens out of the Space-MoE.
            image_positions: add a sinusoidal position encoding to the image tokens.
            edge_channels: width of the modules that predict edges, which are used in training only; 0: no such modules.
            num_train_timesteps: number of timesteps of the noise schedule; used for `time_routing="boundaries"` only.
            auto_map: entry of config.json by which diffusers' AutoModel finds this class.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        network = self._network(sections_of(self.config))
        for name, child in network.named_children():
            self.add_module(name, child)
        # Store the bound method and not the network: a child module would add a prefix to all parameter names.
        self._predict: Any = network.forward

    @staticmethod
    def _network(sections: Sections) -> RaphaelUNet:
        raise NotImplementedError

    def enable_group_offload(
        self,
        onload_device: torch.device,
        offload_device: str | torch.device = "cpu",
        offload_type: str = "leaf_level",
        **options: Any,
    ) -> None:
        """Keep weights on `offload_device` while they are not used, as the method of the same name in diffusers does.

        Args:
            onload_device: device on which the network computes.
            offload_device: device that stores the weights between uses.
            offload_type: what is moved at a time. Only "leaf_level" (a single layer) is supported.
            options: further arguments of the method of diffusers.

        Raises:
            ValueError: `offload_type` is not "leaf_level".
        """
        if offload_type != "leaf_level":
            raise ValueError(
                f"offload_type={offload_type!r} must be 'leaf_level': this network calls the layers of a block one by one, "
                "so that the hooks of whole blocks never run."
            )
        device = torch.device(offload_device)
        super().enable_group_offload(onload_device, device, offload_type, **options)  # type: ignore[misc]

    def _inputs(
        self, sample: Tensor, timestep: Tensor | float, text: Tensor, mask: Tensor | None, end: Tensor | None
    ) -> UNetInput:
        batch, tokens = text.shape[:2]
        mask = torch.ones(batch, tokens, device=sample.device) if mask is None else mask
        end = (mask.long().sum(dim=1) - 1).clamp(min=0) if end is None else end
        timestep_B = torch.as_tensor(timestep, device=sample.device).expand(batch)
        parts = [part for module in self.modules() if isinstance(module, Gate) for part in module.modules()]
        self._predict.__self__.gathers_weights = any(hasattr(part, hook) for part in parts for hook in _HOOKS)
        return UNetInput(sample, timestep_B, text, mask.bool(), end, None)


class RaphaelUNet2D(_Wrapper):
    """The U-Net of RAPHAEL as a model of diffusers, called like UNet2DConditionModel."""

    @staticmethod
    def _network(sections: Sections) -> RaphaelUNet:
        return RaphaelUNet(sections)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        end_of_text: Tensor | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict the noise (or v, or the flow) in latents, as UNet2DConditionModel does; [B, C, h, w].

        Args:
            sample: noised latents [B, C, h, w].
            timestep: one number for all samples, or a tensor [B].
            encoder_hidden_states: Y text tokens of width D for each sample, [B, Y, D].
            encoder_attention_mask: bool [B, Y], False at padding. None: no padding.
            end_of_text: int64 [B], index of the end-of-text token. None: the last token that is not padding. It affects only
                predicted edges, not the result.
            down_block_additional_residuals: residuals of a ControlNet for the skip connections, outermost first.
            mid_block_additional_residual: residual of a ControlNet for the middle block.
            return_dict: True returns a UNet2DConditionOutput, False a tuple with one tensor.
        """
        inputs = self._inputs(sample, timestep, encoder_hidden_states, encoder_attention_mask, end_of_text)
        residuals = None
        if down_block_additional_residuals is not None and mid_block_additional_residual is not None:
            residuals = ControlResiduals(tuple(down_block_additional_residuals), mid_block_additional_residual)
        prediction = self._predict(*inputs, residuals=residuals).prediction
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)
