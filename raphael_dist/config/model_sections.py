"""Sections of the configuration about the model and its loss: model, edge, diffusion, lora, control."""

from typing import Literal, Self

from pydantic import model_validator

from raphael_dist.config.types import (
    ExpertBackend,
    ExpertKind,
    FocalForm,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    free_setting,
    setting,
    shape_setting,
)


class Model(Section):
    """The U-Net and its mixtures of experts."""

    channels: tuple[Positive, ...] = shape_setting(
        (320, 640, 1280, 1280), "Number of channels of each U-Net level, outermost level first.", min_length=1
    )
    attention: tuple[bool, ...] = shape_setting(
        (True, True, True, False), "For each U-Net level, outermost first: whether it has transformer blocks."
    )
    layers_per_block: Positive = shape_setting(
        2, "Number of residual blocks in each level of the U-Net's encoder. Each level of the decoder has one more."
    )
    head_dim: Positive = shape_setting(64, "Width of one attention head.")
    norm_groups: Positive = shape_setting(32, "Number of groups of each GroupNorm.")
    latent_channels: Positive = shape_setting(
        4, "Number of channels of the VAE's latents. Without a VAE (image.vae=none) it must be 3, for RGB."
    )
    text_width: Positive = shape_setting(1024, "Width of the token embeddings that the text encoder returns.")
    space_experts: NonNegative = shape_setting(
        6, "Number of experts in each Space-MoE layer. 0: the model has no Space-MoE."
    )
    time_experts: NonNegative = shape_setting(
        4, "Number of experts in each Time-MoE layer. 0: a dense feed-forward layer takes its place."
    )
    shared_expert: NonNegativeFloat = shape_setting(
        0.0,
        "Width of an additional expert in each Space-MoE layer that processes all image tokens, as a multiple of "
        "model.expert_width. 0: no such expert.",
    )
    image_positions: bool = shape_setting(
        False,
        "Add a sinusoidal position encoding (row and column) to the image tokens of each transformer block. Without it, as "
        "in Stable Diffusion, attention can hardly tell where in the image a token lies, and drawn words are misspelled.",
    )
    time_routing: Literal["learned", "boundaries"] = shape_setting(
        "learned",
        "How a timestep selects its expert in the Time-MoE. learned: by a trained gate in each block. boundaries: the "
        "timesteps are divided into equal ranges, and each range has a fixed expert.",
    )
    expert_width: tuple[Positive, ...] = shape_setting(
        (1280, 2560, 5120, 5120), "Hidden width of each expert, per U-Net level, outermost level first."
    )
    time_activation: Literal["gelu", "geglu"] = shape_setting(
        "gelu",
        "Activation function of the experts in the Time-MoE. If run.init_from is a dense model, use the activation of its "
        "feed-forward layers (geglu in Stable Diffusion).",
    )
    gate_width: Positive = shape_setting(128, "Hidden width of the gates, the small networks that select the experts.")
    gate_noise: NonNegativeFloat = setting(
        1.0, "Standard deviation of the noise that is added to the gates' logits in training. 0: no noise."
    )
    gate_noise_steps: NonNegative = setting(
        0,
        "Number of first steps in which the noise on the gates' logits falls from model.gate_noise to 0. Afterwards, "
        "training selects experts as sampling does. 0: the noise does not fall.",
    )
    gate_noise_schedule: Literal["linear", "cosine", "exponential"] = setting(
        "linear",
        "Curve by which the noise on the gates' logits falls in the first model.gate_noise_steps steps. linear, cosine: "
        "down to 0. exponential: down to 1% of model.gate_noise; afterwards the noise is 0.",
    )
    gate_gradient: Literal["straight_through", "none", "scaled"] = setting(
        "straight_through",
        "Factor on the output of the selected expert, by which the gate receives a gradient; p is the gate's probability "
        "for this expert. straight_through: p / p.detach(), whose value is 1. scaled: p. none: 1, so that the output "
        "gives the gate no gradient.",
    )
    mask_threshold: Fraction = setting(
        0.2,
        "alpha in Sec. 3.1 of the paper: the expert of a text token processes the image tokens whose attention weight for "
        "this text token exceeds alpha times the largest of these weights.",
    )
    balance_weight: NonNegativeFloat = setting(
        0.0, "Weight of the load-balancing loss of the gates. 0, as in the paper: no such loss."
    )
    mask_padding: bool = setting(False, "Exclude the padding tokens of captions from the Space-MoE.")
    expert_backend: ExpertBackend = free_setting(
        "auto",
        "How the experts of the Space-MoE are computed; the results agree up to rounding. dense: each expert on all "
        "tokens. grouped: each expert only on the tokens that are routed to it. reference: the paper's formula as "
        "printed, which is slow. auto: dense on a GPU; on a CPU grouped if a token uses at most 80% of the experts on "
        "average, otherwise dense. megablocks: like dense, and the Time-MoE uses the grouped matrix product of MegaBlocks "
        "(package grouped_gemm) on a GPU.",
    )
    checkpoint_activations: Literal["none", "blocks", "all"] = free_setting(
        "blocks",
        "Activations that are recomputed in the backward pass instead of stored, to save memory. none: no recomputation. "
        "blocks: those of transformer blocks. all: those of transformer blocks and residual blocks.",
    )

    def num_experts(self, kind: ExpertKind) -> int:
        """Return the number of experts in each layer of Space-MoE (kind "space") or Time-MoE (kind "time")."""
        return self.space_experts if kind == "space" else self.time_experts

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        levels = len(self.channels)
        for name, values in (("attention", self.attention), ("expert_width", self.expert_width)):
            if len(values) != levels:
                raise ValueError(
                    f"model.{name}={list(values)} must have one entry per U-Net level, but it has {len(values)} and "
                    f"model.channels has {levels}. Give {levels} entries."
                )
        for channels in self.channels:
            if channels % self.norm_groups or channels % self.head_dim:
                raise ValueError(
                    f"model.channels={list(self.channels)} must be multiples of model.norm_groups={self.norm_groups} and "
                    f"of model.head_dim={self.head_dim}, but {channels} is not. Change one of the three settings."
                )
        return self


class Edge(Section):
    """Edge supervision (Sec. 3.2)."""

    weight: NonNegativeFloat = setting(1.0, "Weight of the edge loss. 0: the model has no edge modules and no edge loss.")
    max_timestep: NonNegative = setting(
        500, "The edge loss is computed for timesteps below this one (T_c in Sec. 3.2 of the paper)."
    )
    focal_alpha: Fraction = setting(
        0.5, "Weight of edge pixels in the focal loss. Pixels without an edge have the weight 1 - focal_alpha."
    )
    focal_gamma: NonNegativeFloat = setting(
        2.0, "Focusing parameter gamma of the focal loss: down-weights pixels that are already classified correctly."
    )
    focal_form: FocalForm = setting(
        "focal",
        "Form of the edge loss for targets between 0 and 1. focal: the focal loss, whose minimum is not at the target "
        "(with gamma 2, a target of 0.1 is best predicted as 0.31). quality: the quality focal loss, whose minimum is at "
        "the target.",
    )
    channels: Positive = setting(16, "Number of hidden channels of the edge modules.")


class Diffusion(Section):
    """The noise schedule, what the U-Net predicts, and the weights of timesteps in the loss."""

    num_timesteps: Positive = setting(1000, "Number of timesteps T of the noise schedule.")
    schedule: Literal["scaled_linear", "linear"] = setting(
        "scaled_linear",
        "How beta rises from diffusion.beta_start to diffusion.beta_end over the timesteps. scaled_linear: sqrt(beta) "
        "rises linearly. linear: beta rises linearly.",
    )
    beta_start: PositiveFloat = setting(
        0.00085, "Value of beta, the variance of the noise that a timestep adds, at the first timestep."
    )
    beta_end: PositiveFloat = setting(
        0.012, "Value of beta, the variance of the noise that a timestep adds, at the last timestep."
    )
    zero_terminal_snr: bool = setting(
        False,
        "Rescale the noise schedule so that the last timestep is pure noise (arXiv 2305.08891). Requires "
        "diffusion.prediction=v_prediction.",
    )
    prediction: Literal["epsilon", "v_prediction", "flow"] = setting(
        "epsilon",
        "What the U-Net predicts. epsilon: the noise. v_prediction: the velocity v. flow: noise minus image, for a "
        "rectified flow of straight paths, which uses no betas.",
    )
    stratified: bool = setting(
        True, "true: the timesteps of a global batch are spread evenly over the range. false: each is drawn independently."
    )
    min_snr_gamma: NonNegativeFloat = setting(
        0.0,
        "gamma of the min-SNR weighting, by which timesteps with an SNR above gamma get a smaller weight in the loss "
        "(arXiv 2303.09556, which uses 5). 0: no weighting.",
    )
    offset_noise: NonNegativeFloat = setting(
        0.0,
        "Standard deviation of additional noise that is the same number at all positions of a channel, for images that "
        "are very dark or bright. 0: none.",
    )


class Lora(Section):
    """LoRA adapters on top of a frozen base model."""

    rank: NonNegative = setting(
        0,
        "Rank of the LoRA adapters. Only they are trained; the weights of run.init_from are frozen. 0: no adapters, and "
        "all weights are trained.",
    )
    alpha: Positive = setting(8, "Scale of the LoRA adapters: their output is multiplied by lora.alpha / lora.rank.")
    targets: tuple[Literal["attention", "experts"], ...] = setting(
        ("attention", "experts"),
        "Layers whose weight matrices have a LoRA adapter: attention (self-attention and cross-attention), experts "
        "(Space-MoE and Time-MoE).",
        min_length=1,
    )


class Control(Section):
    """A ControlNet on top of a frozen base model."""

    enabled: bool = setting(
        False,
        "Train a ControlNet that follows edge maps, on top of the frozen weights of run.init_from. false: no ControlNet.",
    )
