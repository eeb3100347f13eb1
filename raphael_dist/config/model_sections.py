"""Sections of the configuration about the model and its loss: model, parallel, edge, diffusion, lora, control."""

from math import lcm
from typing import Literal, Self

from pydantic import field_validator, model_validator

from raphael_dist.config.types import (
    FREE,
    Dispatch,
    ExpertBackend,
    ExpertKind,
    FocalForm,
    Fraction,
    Free,
    NonEmpty,
    NonNegative,
    NonNegativeFloat,
    PathText,
    Placement,
    Positive,
    PositiveFloat,
    Section,
    Shape,
)


class Model(Section):
    """The U-Net and its mixtures of experts."""

    channels: Shape[NonEmpty[Positive]] = (320, 640, 1280, 1280)
    """Number of channels of each U-Net level, outermost level first."""

    attention: Shape[tuple[bool, ...]] = (True, True, True, False)
    """For each U-Net level, outermost first: whether it has transformer blocks."""

    layers_per_block: Shape[Positive] = 2
    """Number of residual blocks in each level of the U-Net's encoder. Each level of the decoder has one more."""

    head_dim: Shape[Positive] = 64
    """Width of one attention head. The number of heads of a U-Net level is its channels / head_dim."""

    norm_groups: Shape[Positive] = 32
    """Number of channel groups of each GroupNorm. It must divide every entry of model.channels."""

    latent_channels: Shape[Positive] = 4
    """Number of channels of the VAE's latents. Without a VAE (image.vae=none) it must be 3, for RGB."""

    text_width: Shape[Positive] = 1024
    """Width of the token embeddings that the text encoder returns."""

    space_experts: Shape[NonNegative] = 6
    """Number of experts in each Space-MoE layer. Space-MoE: a gate selects an expert for each caption token, and this expert
    processes the image region of the token. 0: no Space-MoE layers.
    """

    time_experts: Shape[NonNegative] = 4
    """Number of experts in each Time-MoE layer. Time-MoE: the timestep selects one expert for the whole image. 0: one
    feed-forward layer without experts is used instead.
    """

    shared_expert: Shape[NonNegativeFloat] = 0.0
    """Width of a shared expert, which each Space-MoE layer (experts for image regions) applies to all image tokens, as a
    multiple of model.expert_width: 0.5 is half as wide as the other experts. 0: no shared expert.
    """

    image_positions: Shape[bool] = False
    """Add a sinusoidal position encoding (row and column) to the image tokens of each transformer block. Without it, as in
    Stable Diffusion, attention can hardly tell where in the image a token lies, and drawn words are misspelled.
    """

    time_routing: Shape[Literal["learned", "boundaries"]] = "learned"
    """How a timestep selects its expert in the Time-MoE layers. learned: a trained gate in each block selects it.
    boundaries: the timesteps are divided into equal ranges, one for each expert.
    """

    expert_width: Shape[tuple[Positive, ...]] = (1280, 2560, 5120, 5120)
    """Hidden width of each expert's feed-forward network: one number for each U-Net level, outermost level first."""

    time_activation: Shape[Literal["gelu", "geglu"]] = "gelu"
    """Activation function of the experts in the Time-MoE layers (experts selected by the timestep). If run.init_from is a
    dense model, use the activation of its feed-forward layers (geglu in Stable Diffusion).
    """

    gate_width: Shape[Positive] = 128
    """Hidden width of the gates. A gate is a small network that selects experts."""

    gate_noise: NonNegativeFloat = 1.0
    """Standard deviation of the noise that training adds to the logits of the gates (the networks that select experts), so
    that they try different experts. 0: no noise.
    """

    gate_noise_steps: NonNegative = 0
    """Number of steps, from the start of training, in which the noise on the gates' logits falls from model.gate_noise to 0.
    After them training adds no noise, as in sampling. 0: the noise stays at model.gate_noise.
    """

    gate_noise_schedule: Literal["linear", "cosine", "exponential"] = "linear"
    """Curve by which the noise on the gates' logits falls in the first model.gate_noise_steps steps. linear, cosine: down to
    0. exponential: down to 1% of model.gate_noise; afterwards the noise is 0.
    """

    gate_gradient: Literal["straight_through", "none", "scaled"] = "straight_through"
    """How a gate, which selects experts, receives a gradient: the output of the selected expert is multiplied by a factor.
    With p, the gate's probability of this expert, the factor is: straight_through: p / p.detach(), which does not change the
    output. scaled: p. none: 1, which gives the gate no gradient.
    """

    mask_threshold: Fraction = 0.2
    """Decides which image tokens the Space-MoE expert of a text token processes: those whose attention weight for this text
    token is at least mask_threshold times the largest such weight. A higher value selects fewer image tokens (alpha in
    Sec. 3.1 of the paper).
    """

    balance_weight: NonNegativeFloat = 0.0
    """Weight of the load-balancing loss, which makes the gates use all experts equally often. 0, as in the paper: no such
    loss.
    """

    mask_padding: bool = False
    """true: the padding tokens of a caption select no experts in the Space-MoE layers. false: they select experts like other
    tokens.
    """

    expert_backend: Free[ExpertBackend] = "auto"
    """How the Space-MoE layers (experts for image regions) are computed. It affects speed; the results agree up to rounding.
    dense: each expert on all tokens. grouped: each expert only on the tokens that are routed to it. reference: the paper's
    formula as printed, which is slow. auto: dense on a GPU. On a CPU, auto decides in each layer for each micro-batch by the
    share of the experts to which an image token is routed, averaged over all image tokens of this micro-batch: grouped if
    this average is at most 80%, otherwise dense. megablocks: like dense, but on a GPU the Time-MoE layers (experts selected
    by the timestep) use the grouped matrix product of the package grouped_gemm, which requires train.dtype=bfloat16.
    """

    megablocks_folder: Free[PathText | None] = None
    """Local folder with a build of the kernel megablocks of kernels-community, which the package kernels loads. Its grouped
    matrix product then replaces that of grouped_gemm for model.expert_backend=megablocks. null: grouped_gemm.
    """

    checkpoint_activations: Free[Literal["none", "blocks", "all"]] = "blocks"
    """Which activations are recomputed in the backward pass instead of stored. This saves memory and costs time. none: no
    activations. blocks: those of transformer blocks. all: those of transformer blocks and residual blocks.
    """

    def num_experts(self, kind: ExpertKind) -> int:
        """Return how many experts each Space-MoE layer (`kind` = "space") or Time-MoE layer (`kind` = "time") has."""
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
                    f"of model.head_dim={self.head_dim}, but {channels} is not. Use multiples of "
                    f"{lcm(self.norm_groups, self.head_dim)}, or change model.norm_groups or model.head_dim."
                )
        return self


class Parallel(Section, json_schema_extra=FREE):
    """Expert parallelism: experts of a layer are sharded over ranks, and tokens are sent to them."""

    space_ep: Positive = 1
    """Number of ranks over which the experts of the Space-MoE layers (experts for image regions) are sharded (expert
    parallelism). It must divide model.space_experts and the number of ranks. 1: every rank holds all of these experts.
    """

    time_ep: Positive = 1
    """Number of ranks over which the experts of the Time-MoE layers (experts selected by the timestep) are sharded (expert
    parallelism). It must divide model.time_experts and the number of ranks. 1: every rank holds all of these experts.
    """

    elastic: bool = False
    """What happens if the number of ranks is not a multiple of parallel.space_ep or parallel.time_ep. true: this setting is
    lowered to the largest value below it that divides both the number of ranks and the number of experts. false: the run
    ends with an error.
    """

    dispatch: Dispatch = "auto"
    """How image tokens are sent to experts on other ranks if parallel.space_ep is above 1. It affects speed, not results.
    all_to_all: a token is sent only to the ranks that hold its experts. all_gather: every token is sent to all ranks over
    which the experts are sharded. auto: all_gather on GPUs and wherever at least 90% of the tokens would be sent anyway,
    otherwise all_to_all.
    """

    placement: tuple[Placement, ...] = ("auto",)
    """How experts are distributed if parallel.space_ep or parallel.time_ep is above 1. shard: they are divided over ranks,
    and tokens are sent to them. replicate: every rank holds all experts. auto: shard or replicate, whichever sends fewer
    bytes between ranks. Give one value, or one per U-Net level.
    """

    @field_validator("placement", mode="before")
    @classmethod
    def _accept_one_value(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    def ep(self, kind: ExpertKind) -> int:
        """Return the number of ranks over which the experts of Space-MoE ("space") or Time-MoE ("time") are sharded."""
        return self.space_ep if kind == "space" else self.time_ep

    @property
    def uses_expert_parallelism(self) -> bool:
        """Whether experts are sharded over several ranks (in Space-MoE, Time-MoE or both)."""
        return self.space_ep > 1 or self.time_ep > 1


class Edge(Section):
    """Edge supervision: a loss by which small networks in the U-Net learn to predict edges of the image (Sec. 3.2)."""

    weight: NonNegativeFloat = 1.0
    """Weight of the edge loss in the training loss. Each transformer block of the U-Net has an edge module. This small
    network predicts the edges of the image from the block's attention map of the end-of-text token. The edge loss is the
    loss of these predictions, compared with the image's edge map. 0: no edge modules and no edge loss.
    """

    max_timestep: NonNegative = 500
    """Only images with a timestep below this one, which have less noise, have an edge loss (T_c in Sec. 3.2 of the paper).
    """

    focal_alpha: Fraction = 0.5
    """Weight of edge pixels in the edge loss with edge.focal_form=focal. Pixels without an edge have the weight 1 -
    focal_alpha.
    """

    focal_gamma: NonNegativeFloat = 2.0
    """Focusing parameter gamma of the edge loss, which is a focal loss: a higher value lowers the weight of pixels that are
    already predicted well. 0: no such weighting.
    """

    focal_form: FocalForm = "focal"
    """Formula of the edge loss. Its targets are edge strengths between 0 and 1. focal: the focal loss, whose minimum is not
    at the target (with edge.focal_gamma=2, a prediction of 0.31 has the lowest loss for a target of 0.1). quality: the
    quality focal loss, whose minimum is at the target.
    """

    channels: Positive = 16
    """Number of hidden channels of the edge modules, the small convolutional networks that predict edge maps for the edge
    loss.
    """


class Diffusion(Section):
    """The noise schedule, what the U-Net predicts, and the weights of timesteps in the loss."""

    num_timesteps: Positive = 1000
    """Number of timesteps of the noise schedule, from almost no noise to almost pure noise."""

    schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    """How beta, the variance of the noise that a timestep adds, rises from diffusion.beta_start to diffusion.beta_end.
    scaled_linear: sqrt(beta) rises linearly. linear: beta rises linearly.
    """

    beta_start: PositiveFloat = 0.00085
    """Value of beta, the variance of the noise that a timestep adds, at the first timestep."""

    beta_end: PositiveFloat = 0.012
    """Value of beta, the variance of the noise that a timestep adds, at the last timestep."""

    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that the last timestep is pure noise (arXiv 2305.08891). Requires
    diffusion.prediction=v_prediction.
    """

    prediction: Literal["epsilon", "v_prediction", "flow"] = "epsilon"
    """What the U-Net predicts. epsilon: the noise. v_prediction: the velocity v. flow: noise minus image (rectified flow);
    diffusion.schedule, beta_start and beta_end are then not used.
    """

    stratified: bool = True
    """How training draws the timesteps of the images in a global batch. true: spread evenly over all timesteps, which makes
    the loss vary less between steps. false: independently.
    """

    min_snr_gamma: NonNegativeFloat = 0.0
    """Lowers the weight, in the loss, of timesteps with little noise: those whose signal-to-noise ratio (SNR) exceeds this
    value. It is gamma of min-SNR weighting (arXiv 2303.09556, which uses 5). 0: all timesteps have equal weights.
    """

    offset_noise: NonNegativeFloat = 0.0
    """Standard deviation of additional training noise that has one value per image and channel, the same at all positions.
    It lets the model learn very dark and very bright images. 0: no such noise.
    """


class Lora(Section):
    """LoRA adapters on top of a frozen base model."""

    rank: NonNegative = 0
    """Rank of the LoRA adapters. Above 0, only the adapters are trained, and the weights of run.init_from are frozen. 0: no
    adapters, and all weights are trained.
    """

    alpha: Positive = 8
    """Scale of the LoRA adapters: their output is multiplied by lora.alpha / lora.rank."""

    targets: NonEmpty[Literal["attention", "experts"]] = ("attention", "experts")
    """Layers that get LoRA adapters. attention: self-attention and cross-attention. experts: the experts of the Space-MoE
    and Time-MoE layers.
    """


class Control(Section):
    """A ControlNet on top of a frozen base model."""

    enabled: bool = False
    """Train a ControlNet that follows edge maps, on top of the frozen weights of run.init_from. false: no ControlNet."""
