"""`RaphaelUNet` and `ControlNet` as models of diffusers, under the same parameter names.

Shape legend: B images, C latent channels, h and w latent height and width, Y text tokens, D text width.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from raphael_dist.model.controlnet import ControlNet
from raphael_dist.model.routing import Gate
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.model.unet_interface import ControlResiduals, UNetInput

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


def uncompiled(model: Any) -> Any:
    """Return the original model if `model` is the result of `torch.compile`, else `model` itself."""
    return getattr(model, "_orig_mod", model)


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


class RaphaelControlNet(_Wrapper):
    """A ControlNet for RaphaelUNet2D as a model of diffusers, called like ControlNetModel."""

    @staticmethod
    def _network(sections: Sections) -> RaphaelUNet:
        return ControlNet(sections)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> ControlNetOutput | tuple[list[Tensor], Tensor]:
        """Return tensors to add to the U-Net's skip connections (outermost first) and middle, as ControlNetModel does.

        Args:
            sample: noised latents [B, C, h, w].
            timestep: one number for all samples, or a tensor [B].
            encoder_hidden_states: Y text tokens of width D for each sample, [B, Y, D].
            encoder_attention_mask: bool [B, Y], False at padding. None: no padding.
            controlnet_cond: edge map in 0..1 at the size of the latents, [B, 3, h, w] with three equal channels.
            conditioning_scale: factor by which the returned tensors are multiplied.
            return_dict: True returns a ControlNetOutput, False a tuple (list of tensors for the skip connections, tensor for
                the middle).
        """
        inputs = self._inputs(sample, timestep, encoder_hidden_states, encoder_attention_mask, None)
        residuals = self._predict(inputs, controlnet_cond[:, 0])
        skips, middle = [conditioning_scale * skip for skip in residuals.skips], conditioning_scale * residuals.middle
        return ControlNetOutput(tuple(skips), middle) if return_dict else (skips, middle)
