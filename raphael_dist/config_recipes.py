"""The section `recipe`: what people add to the paper's training, each off by default. And the learning rate's schedules."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

NonNegativeFloat = Annotated[float, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]

# Schedules of transformers and diffusers by their names, and the arguments that each takes beside warm-up and length.
DECAYS: dict[str, tuple[str, ...]] = {
    "constant": (),
    "cosine": (),
    "linear": (),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("power", "lr_end"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps", "num_stable_steps", "min_lr_ratio"),
}
NEEDED = {"cosine_with_min_lr": ("min_lr", "min_lr_rate"), "warmup_stable_decay": ("num_decay_steps",)}
ENDLESS = ("constant", "inverse_sqrt")  # do not depend on train.max_steps
Decay = Literal[
    "constant", "cosine", "linear", "cosine_with_restarts", "polynomial", "inverse_sqrt", "cosine_with_min_lr",
    "warmup_stable_decay",
]  # fmt: skip


def check_decay(decay: str, arguments: dict[str, float]) -> None:
    """Raise ValueError for arguments that a schedule does not take, and for one that it needs."""
    known = DECAYS[decay]
    wrong = [name for name in arguments if name not in known]
    if wrong:
        raise ValueError(
            f"optim.decay_arguments: {wrong[0]} is none of {decay}'s; it takes {', '.join(known) or 'no arguments'}"
        )
    needed = NEEDED.get(decay, ())
    if needed and not set(needed) & set(arguments):
        raise ValueError(f"optim.decay = {decay} needs optim.decay_arguments: one of {', '.join(needed)}")


class Stage(BaseModel):
    """Steps of a run that are trained otherwise than the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    until: Positive | None = Field(None, description="the stage's last step; null in the last stage: the end of the run")
    set: dict[str, Any] = Field(description="what these steps have otherwise, as section.key: value")


class Recipe(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    min_snr_gamma: NonNegativeFloat = Field(
        0.0, description="weight the denoising loss by min(SNR, gamma) as in arXiv 2303.09556, which takes 5; 0: all alike"
    )
    offset_noise: NonNegativeFloat = Field(
        0.0, description="deviation of noise added to a whole channel at once, for very dark and bright images; 0: none"
    )
    gradient_noise: NonNegativeFloat = Field(
        0.0, description="eta of arXiv 1511.06807: noise of variance eta / (1 + step)^0.55 on the gradients; 0: none"
    )
    gate_noise_schedule: Literal["linear", "cosine", "exponential"] = Field(
        "linear", description="how model.gate_noise falls over model.gate_noise_steps; exponential: to a hundredth, then 0"
    )
    stages: tuple[Stage, ...] = Field(
        (), description="steps trained one after another with other image sizes, batches, rates: [{until, set}, ...]"
    )

    @model_validator(mode="after")
    def _stages_follow_each_other(self) -> Self:
        ends = [stage.until for stage in self.stages]
        if not self.stages:
            return self
        if ends[-1] is not None or None in ends[:-1]:
            raise ValueError("recipe.stages: every stage but the last needs `until`, its last step, and the last has none")
        given = [end for end in ends if end is not None]
        if given != sorted(set(given)):
            raise ValueError(f"recipe.stages: until = {given} must rise from stage to stage")
        first = self.stages[0].set.keys()
        for number, stage in enumerate(self.stages[1:], start=2):
            if stage.set.keys() != first:
                odd = sorted(stage.set.keys() ^ first)[0]
                raise ValueError(
                    f"recipe.stages: {odd} is not in all stages (see stage {number}); every stage says each key"
                )
        return self
