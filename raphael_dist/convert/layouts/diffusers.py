"""The diffusers layout: a folder that loads as a pipeline: model_index.json, unet, vae, text_encoder, tokenizer, scheduler;
and a model card.

With experts, U-Net and pipeline are the classes of `raphael_dist.pipeline`. A dense model gives a real UNet2DConditionModel,
and with a CLIP text encoder a real StableDiffusionPipeline, which loads without this package. Encoders are copied as files.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from raphael_dist.checkpoint.manifest import MANIFEST
from raphael_dist.config import Config, config_from_tree
from raphael_dist.convert.card import model_card
from raphael_dist.convert.layouts import WEIGHTS, Layout
from raphael_dist.convert.layouts.canonical import gather_indexed
from raphael_dist.convert.layouts.dense import (
    CLASS,
    STEM,
    diffusion_beside,
    open_dense,
    read_json,
    unet_files,
    unet_json,
    weights_by_name,
)
from raphael_dist.convert.manifest import base_manifest, manifest_beside
from raphael_dist.convert.plan import ConversionPlan, Options, Source
from raphael_dist.convert.source import Checkpoint, is_dense
from raphael_dist.data.encoder_files import PACKAGED, text_folders, vae_folder
from raphael_dist.data.encoders import save_text_model
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.model.latents import latent_factor
from raphael_dist.storage.versions import versions

MODULE, UNET, PIPELINE = "raphael_dist.pipeline", "RaphaelUNet2D", "RaphaelPipeline"
CODE = "pipeline"  # the folder's own module, by which diffusers finds the class
# For those who load with DiffusionPipeline; RaphaelPipeline.from_pretrained runs no code of the folder.
PIPELINE_CODE = f'''"""For DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)."""

from {MODULE} import {PIPELINE}
'''


def plan(source: Source, options: Options, target: Path) -> ConversionPlan:
    """Plan a pipeline folder (or its unet/ alone). UserError when an encoder of the configuration is not there."""
    config = source.config
    unet: dict[str, Any] = (
        unet_json(config, "--to diffusers") if is_dense(config) else {"_class_name": UNET, "tree": model_tree(config)}
    )
    files, small, kind = unet_files(source, options, "unet/")
    manifest = base_manifest("diffusers", source) | {"weights": kind}
    finish = None
    if not options.unet_only:
        encoders = Encoders(config, options.text_by_name)
        index = encoders.model_index()
        small["README.md"] = model_card(source, kind, options.licence).encode()
        small["model_index.json"] = json.dumps(index, indent=2).encode()
        if index["_class_name"] == [CODE, PIPELINE]:
            small[f"{CODE}.py"] = PIPELINE_CODE.encode()
        if is_dense(config):
            unet["sample_size"] = max(config.image.buckets[0]) // latent_factor(config.image.encoder)
        finish = encoders.write
    small["unet/config.json"] = json.dumps({**unet, "_diffusers_version": versions()["diffusers"]}, indent=2).encode()
    return ConversionPlan(files, (kind,), MANIFEST, manifest, small, finish=finish)


def model_tree(config: Config) -> dict[str, Any]:
    """Return the part of the configuration that makes the U-Net."""
    tree = config.model_dump(mode="json")
    part = {"model": tree["model"], "edge": tree["edge"], "run": {"seed": tree["run"]["seed"]}}
    if config.upscale.factor:
        part["upscale"] = tree["upscale"]
    if config.model.time_routing == "boundaries":  # they divide the timesteps
        part |= {"diffusion": tree["diffusion"], "sample": {"steps": tree["sample"]["steps"]}}
    return part


class Encoders:
    """The other parts of the pipeline: where they come from, and the classes that load them."""

    def __init__(self, config: Config, text_by_name: bool = False) -> None:
        from transformers import AutoConfig, AutoTokenizer

        if text_by_name and config.text.encoder not in PACKAGED:
            known = ", ".join(PACKAGED)
            raise UserError(
                f"--text-by-name: text.encoder is {config.text.encoder!r}, a folder; only {known} ships in a package"
            )
        self.config, self.text_by_name = config, text_by_name
        self.vae = None if config.image.encoder == "none" else vae_folder(config.image.encoder)
        self.text, tokenizer = text_folders(config.text.encoder)
        try:
            encoder = AutoConfig.from_pretrained(self.text, local_files_only=True)
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"text.encoder: cannot load {config.text.encoder!r}: {str(error).splitlines()[0]}") from None
        self.tokenizer.padding_side = self.tokenizer.truncation_side = "right"  # as TextEncoder.load sets it
        text_width = getattr(encoder, "text_config", encoder).hidden_size  # a whole CLIP has the text's beside the image's
        if text_width != config.model.text_width:
            raise UserError(
                f"text.encoder: {config.text.encoder!r} gives {text_width} numbers a token, the model takes "
                f"model.text_width = {config.model.text_width}; --unet-only exports without it"
            )
        self.text_class = _text_class(encoder)

    def model_index(self) -> dict[str, Any]:
        """Return what stands in model_index.json."""
        config = self.config
        plain = is_dense(config) and not config.upscale.factor
        stable = plain and self.text_class == "CLIPTextModel" and self.vae is not None
        index: dict[str, Any] = {
            "_class_name": "StableDiffusionPipeline" if stable else [CODE, PIPELINE],
            "_diffusers_version": versions()["diffusers"],
            "unet": ["diffusers", CLASS] if is_dense(config) else [MODULE, UNET],
            "vae": ["diffusers", "AutoencoderKL"] if self.vae else [None, None],
            "text_encoder": ["transformers", self.text_class],
            "tokenizer": ["transformers", type(self.tokenizer).__name__],
            "scheduler": ["diffusers", type(self._scheduler()).__name__],
        }
        if stable:
            nothing: list[None] = [None, None]
            return index | {"safety_checker": nothing, "feature_extractor": nothing, "requires_safety_checker": False}
        sample: dict[str, Any] = {"steps": config.sample.steps, "guidance": config.sample.guidance}
        if config.upscale.factor:
            sample["upscale"] = config.upscale.model_dump(mode="json")
        if self.text_by_name:
            index |= {"text_encoder": [None, None], "tokenizer": [None, None], "text": config.text.encoder}
        return index | sample | {"max_tokens": config.text.max_tokens, "size": list(config.image.buckets[0])}

    def write(self, folder: Path) -> None:
        """Copy the encoders' files below `folder`, and write scheduler and tokenizer."""
        self._scheduler().save_pretrained(folder / "scheduler")
        if self.vae is not None:
            _copy_model(self.vae, folder / "vae")
        if self.text_by_name:
            return
        self.tokenizer.save_pretrained(folder / "tokenizer")
        if self.config.text.layer == "last":
            _copy_model(self.text, folder / "text_encoder")
        else:  # whoever loads it asks for the last layer
            save_text_model(self.config.text.encoder, self.config.text.layer, folder / "text_encoder")

    def _scheduler(self) -> Any:
        return make_scheduler(self.config.diffusion, self.config.sample.scheduler)


def _text_class(config: Any) -> str:
    from transformers import AutoModelForTextEncoding

    if config.model_type == "clip":
        return "CLIPTextModel"
    model_class: Any = AutoModelForTextEncoding._model_mapping[type(config)]
    return str(model_class.__name__)


def _copy_model(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    wanted = [p for p in source.iterdir() if p.name == "config.json" or ".safetensors" in p.name]
    for path in wanted or []:
        shutil.copyfile(path, target / path.name)
    if not any(".safetensors" in p.name for p in wanted):
        raise UserError(f"{source}: no weights in safetensors there; only those are exported")


def open_diffusers(folder: Path, given: Config | None = None) -> Checkpoint:
    """Open a pipeline folder for its U-Net. UserError when that is neither ours nor of Stable Diffusion 2's structure."""
    unet = read_json(folder / "unet" / "config.json")
    manifest = manifest_beside(folder, "diffusers")
    if manifest is None and unet.get("_class_name") == CLASS:
        return open_dense(folder)
    if manifest is None and (unet.get("_class_name") != UNET or not isinstance(unet.get("tree"), dict)):
        raise UserError(f"{folder}: its U-Net is a {unet.get('_class_name')}; known: {UNET}, {CLASS}")
    diffusion = diffusion_beside(folder)
    config = config_from_tree(manifest["config"] if manifest else {**unet["tree"], "diffusion": diffusion})
    found = weights_by_name(folder, config, gather_indexed(folder / "unet", STEM), manifest)
    found.says_prediction = manifest is not None or "prediction" in diffusion
    return found


def detect(path: Path) -> bool:
    """Return whether this is a folder of a pipeline."""
    return (path / "model_index.json").is_file()


LAYOUT = Layout("diffusers", "weights", detect, open_diffusers, plan, WEIGHTS | {"unet_only"})
