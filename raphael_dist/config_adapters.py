"""The sections `lora` and `control`: what is trained beside a model that stays as it is."""

from typing import Annotated, Any, Literal

from pydantic import Field

from raphael_dist.config_data import Section

NonNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class Lora(Section):
    rank: NonNegative = Field(
        0, description="of the adapters that are trained beside the frozen weights of run.init_from; 0: train all weights"
    )
    alpha: Positive = Field(8, description="an adapter counts alpha / rank times")
    targets: tuple[Literal["attention", "experts"], ...] = Field(
        ("attention", "experts"), min_length=1, description="which matrices have an adapter"
    )


class Control(Section):
    enabled: bool = Field(
        False, description="train a ControlNet that follows edge maps, beside the frozen weights of run.init_from"
    )


def check_control(config: Any) -> None:
    """Raise ValueError where `control` does not go with the rest of the configuration."""
    if not config.control.enabled:
        return
    wrong = [
        (config.run.init_from is None, "run.init_from: the model that it is to control"),
        (not config.edge.weight > 0, "edge.weight above 0, as the model had: without it no edge maps are read"),
        (config.lora.rank > 0, "lora.rank=0: one of them at a time"),
        (config.parallel.spreads, "parallel.space_ep=1 parallel.time_ep=1"),
        (bool(config.run.init_missing), "run.init_missing=[]: what is missing would never be trained"),
    ]
    for fails, need in wrong:
        if fails:
            raise ValueError(f"control.enabled = true needs {need}")


def check_pictures(config: Any) -> None:
    """Raise ValueError where `sample.pictures` are not what the model draws its prompts from."""
    prompts, pictures = len(config.sample.prompts), len(config.sample.pictures)
    if not (config.upscale.factor or config.control.enabled):
        if pictures:
            raise ValueError(
                "sample.pictures are for models that enlarge or follow them; give sample.pictures=[], or set upscale.factor "
                "or control.enabled"
            )
    elif prompts != pictures:
        raise ValueError(
            f"sample.pictures has {pictures} entries, but sample.prompts has {prompts}; this model draws each prompt from a "
            "picture: give as many, or sample.prompts=[] sample.pictures=[]"
        )


def beside(config: Any) -> bool:
    """Return whether a run trains something beside a model that stays as it is."""
    return bool(config.lora.rank or config.control.enabled)


def check_lora(config: Any) -> None:
    """Raise ValueError where `lora` does not go with the rest of the configuration."""
    lora, model = config.lora, config.model
    if not lora.rank:
        return
    if config.run.init_from is None:
        raise ValueError(
            f"lora.rank = {lora.rank} needs run.init_from: the model that the adapters belong to; give a checkpoint, or "
            "lora.rank=0 to train all weights"
        )
    if "experts" in lora.targets and not model.space_experts + model.time_experts:
        raise ValueError("lora.targets names experts, and the model has none; give lora.targets=[attention]")
    if config.run.init_missing:
        raise ValueError(
            f"run.init_missing = {list(config.run.init_missing)} does not go with lora.rank = {lora.rank}: what is missing "
            "would be drawn anew and never trained; train it first, or leave run.init_missing out"
        )
