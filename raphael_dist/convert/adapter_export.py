"""Exports the LoRA adapters of a run for peft, or its ControlNet for diffusers. The frozen base model is not exported."""

from pathlib import Path

from raphael_dist.checkpoint.reader import open_newest
from raphael_dist.convert.controlnet_files import control_weights, write_control
from raphael_dist.convert.layouts import ADAPTER_FORMATS
from raphael_dist.convert.lora_files import adapter_of, write_adapter
from raphael_dist.errors import UserError


def export_adapter(source_layout: str, run: Path, target_format: str, folder: Path, weights: str | None = None) -> str:
    """Write the LoRA adapters or the ControlNet of a run in the format of another library (peft or diffusers).

    Args:
        source_layout: value of the option --from, which must be "auto" or "raphael" (a run of this trainer).
        run: a run directory, whose newest undamaged checkpoint is read, or one of its step-* folders.
        target_format: "peft" (LoRA adapters) or "controlnet" (a ControlNet of diffusers).
        folder: the new folder; it must not exist.
        weights: "ema" (moving average) or "master" (fp32 weights). None: the EMA if the checkpoint has one.

    Returns:
        One line for the user: the number of exported parameters, and the base model for which they were trained.

    Raises:
        UserError: `source_layout` has another value, the run did not train what `target_format` requires, or the folder
            cannot be written.
    """
    assert target_format in ADAPTER_FORMATS
    if source_layout not in ("auto", "raphael"):
        raise UserError(
            f"--to {target_format} requires the run directory in which the adapters or the ControlNet were trained, but "
            f"{run} was given with --from {source_layout}. Use --from auto RUN_DIR."
        )
    reader = open_newest(run, "--from auto")
    config = reader.config()
    if target_format == "peft":
        adapter = adapter_of(reader, weights, "--from auto")
        write_adapter(adapter, config.lora, str(config.run.init_from), folder)
        count = sum(a.numel() + b.numel() for a, b in adapter.factors.values())
    else:
        control = control_weights(reader, weights, "--from auto")
        write_control(control, config, folder)
        count = sum(tensor.numel() for tensor in control.values())
    return f"{folder}: {count:,} parameters, for use with the base model {config.run.init_from}"
