"""The whole configuration, and how it is loaded. Importing this module does not import torch, so `--help` is instant.

Values come from these sources. A later source replaces values of an earlier one:

1. the defaults of the sections
2. the preset or YAML file that the file of `--config` names as its `base`
3. the preset or YAML file of `--config`
4. overrides (`train.max_steps=50`)

Settings that DeepSpeed has as well (micro-batch size, accumulation, clipping, dtype) are set here and not in DeepSpeed's
file; see `engine/ds_config.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import yaml
from pydantic import ValidationError, ValidationInfo, model_validator

from raphael_dist.config import checks
from raphael_dist.config.data_sections import Data, Image, Text
from raphael_dist.config.key_suggestions import known_key
from raphael_dist.config.load import ConfigTree, apply_override, check_repeated_keys, check_tree, read_yaml
from raphael_dist.config.lr_schedule_arguments import check_lr_schedule
from raphael_dist.config.model_sections import Control, Diffusion, Edge, Lora, Model, Parallel
from raphael_dist.config.run_sections import CheckpointConfig, EmaConfig, Optim, RunConfig, Sample, Train
from raphael_dist.config.types import SHAPES, Section, fits_grouped_product, keys_marked, keys_of
from raphael_dist.config.upscale import Upscale
from raphael_dist.config.validation_errors import explain
from raphael_dist.errors import UserError, did_you_mean
from raphael_dist.text import JsonObject, hide_secrets_in_tree

_LENIENT: JsonObject = {}  # as the context of a validation: sections may contradict each other


class Config(Section):
    """All settings of a run. Each field is a section: `config.optim.lr` is the setting optim.lr."""

    run: RunConfig = RunConfig()
    model: Model = Model()
    edge: Edge = Edge()
    diffusion: Diffusion = Diffusion()
    text: Text = Text()
    image: Image = Image()
    data: Data = Data()
    optim: Optim = Optim()
    train: Train = Train()
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: Parallel = Parallel()
    sample: Sample = Sample()
    lora: Lora = Lora()
    control: Control = Control()
    upscale: Upscale = Upscale()

    @model_validator(mode="after")
    def _check_allowed_changes(self) -> Self:
        known = keys_of(Config)
        for name in self.run.allow_change:
            if name not in known:
                hint = did_you_mean(known_key(name, Config) or name, known)
                raise ValueError(
                    f"run.allow_change={list(self.run.allow_change)} must name keys of the configuration as section.key, "
                    f"but {name!r} is not a key{hint}. Write, for example, run.allow_change=[optim.lr]."
                )
        return self

    @model_validator(mode="after")
    def _check_sections(self, info: ValidationInfo) -> Self:
        if info.context is _LENIENT:
            return self
        lines = [
            *checks.check_data(self.data, self.image, self.train),
            *checks.check_diffusion(self.diffusion, self.edge, self.sample),
            *check_lr_schedule(self.optim.lr_schedule, self.optim.lr_schedule_args),
            *checks.check_parallel(self.parallel, self.model),
            *checks.check_kernels(self.train, self.model, self.optim, self.lora, self.parallel, self.text, self.edge),
            *checks.check_expert_backend(self.model, self.train.dtype),
            *checks.check_lora(self.lora, self.model, self.run),
            *checks.check_control(self.control, self.run, self.edge, self.lora, self.parallel),
            *checks.check_upscale(self.upscale, self.control),
            *checks.check_sample_images(self.sample, self.upscale, self.control),
        ]
        if lines:
            raise UserError(*lines)
        return self

    @property
    def trains_adapter_only(self) -> bool:
        """Whether only LoRA adapters or a ControlNet are trained, on top of a frozen base model."""
        return self.lora.rank > 0 or self.control.enabled

    @property
    def fits_grouped_product(self) -> bool:
        """Whether torch's grouped product on GPUs can compute all experts of a Time-MoE layer at once."""
        return fits_grouped_product(self.train.dtype, (*self.model.channels, *self.model.expert_width))

    def find_warnings(self) -> list[str]:
        """Return a warning for each setting (such as ema.start_step) that names a step after the end of the run."""
        return list(checks.check_steps(self.train, self.optim, self.model, self.ema))


ARCHITECTURE_FIELDS = tuple(keys_marked(Config, SHAPES))  # must be equal for a checkpoint's weights to fit


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """Load and validate a configuration.

    Args:
        name_or_path: name of a preset, or path of a YAML file.
        overrides: settings as `section.key=value`, which override those of the file.

    Raises:
        UserError: one line per mistake, with field, value, file and line.
    """
    return _validated(_read_with_overrides(name_or_path, overrides))


def load_leniently(name_or_path: str, overrides: Sequence[str] = ()) -> tuple[Config | None, list[str]]:
    """Load a configuration, with default values in place of the values that `load_config` would refuse.

    It serves --dry-run, which reports all mistakes at once.

    Args:
        name_or_path: name of a preset, or path of a YAML file.
        overrides: settings as `section.key=value`, which override those of the file.

    Returns:
        The configuration, and an error message for each mistake. The configuration is None if default values do not
        remove all mistakes.
    """
    try:
        return load_config(name_or_path, overrides), []
    except UserError as error:
        lines = list(error.args)
    try:
        tree = _read_with_overrides(name_or_path, overrides).tree
        check_tree(tree)  # an endless tree cannot be validated
        for location in _refused_locations(tree):
            name, section = str(location[0]), tree.get(str(location[0]))
            if name not in Config.model_fields:
                tree.pop(name)
            elif len(location) > 1 and isinstance(section, dict):
                section.pop(location[1], None)
            else:  # with the section's defaults instead, further checks would report false mistakes
                return None, lines
        return Config.model_validate(tree, context=_LENIENT), lines
    except ValueError:
        return None, lines


def _refused_locations(tree: JsonObject) -> list[tuple[str | int, ...]]:
    try:
        Config.model_validate(tree, context=_LENIENT)
    except ValidationError as error:
        return [e["loc"] for e in error.errors() if e["loc"]]
    return []


def _read_with_overrides(name_or_path: str, overrides: Sequence[str]) -> ConfigTree:
    config = read_yaml(name_or_path)
    check_repeated_keys(overrides, Config)
    for override in overrides:
        apply_override(config, override, Config)
    run = config.tree.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("dir", default_run_dir(name_or_path))
    return config


def default_run_dir(name_or_path: str) -> str:
    """Return `runs/NAME`, the run directory of a preset or YAML file that sets no `run.dir`."""
    return f"runs/{Path(name_or_path).name.removesuffix('.yaml').removesuffix('.yml').strip('.') or 'default'}"


def config_from_tree(tree: JsonObject) -> Config:
    """Make and validate a Config from nested dicts {section: {key: value}}. Raises UserError with one line per mistake."""
    return _validated(ConfigTree(tree))


def _validated(config: ConfigTree) -> Config:
    check_tree(config.tree)
    try:
        return Config.model_validate(config.tree)
    except ValidationError as error:
        raise UserError(*(line + config.place(e["loc"]) for e in error.errors() for line in explain(e, Config))) from None


def stored_tree(config: Config) -> JsonObject:
    """Return all settings as nested dicts of JSON values, to be stored in files. Secrets in addresses (URLs) are hidden."""
    tree: JsonObject = hide_secrets_in_tree(config.model_dump(mode="json"))
    return tree


def to_yaml(config: Config) -> str:
    """Return all settings as YAML that `load_config` can read, with secrets in addresses hidden."""
    return yaml.safe_dump(stored_tree(config), sort_keys=False, default_flow_style=None, width=120)
