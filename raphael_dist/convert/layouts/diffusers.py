"""The layout `diffusers`: a folder that diffusers loads as a pipeline, with a model card.

- It contains model_index.json, unet/, vae/, text_encoder/, tokenizer/ and scheduler/.
- The U-Net of a model with experts is a RaphaelUNet2D. The folder then contains the Python code of U-Net and pipeline
  (`exported_code.py`), so that it loads without this package.
- The U-Net of a dense model is diffusers' UNet2DConditionModel. With the encoders of Stable Diffusion, the pipeline is a
  StableDiffusionPipeline.
- Files of encoders are copied. If they are not safetensors, or have a variant (such as fp16) in their names, the encoders
  are loaded and saved again instead.
"""

import json
import shutil
from pathlib import Path

from raphael_dist.checkpoint.manifest import MANIFEST
from raphael_dist.config.schema import Config, config_from_tree
from raphael_dist.convert.exported_code import CODE, MODEL, model_code, pipeline_code
from raphael_dist.convert.layout_manifest import base_manifest, read_optional_manifest
from raphael_dist.convert.layouts import WEIGHTS, Layout
from raphael_dist.convert.layouts.canonical import gather
from raphael_dist.convert.layouts.dense import (
    open_dense,
    pickles,
    read_object,
    scheduler_settings,
    unet_files,
    weights_by_name,
)
from raphael_dist.convert.model_card import IMAGE, model_card, samples_image
from raphael_dist.convert.source_checkpoint import Checkpoint, is_dense
from raphael_dist.convert.unet_config import CLASS, sizes_of_unet, unet_fields, unet_json
from raphael_dist.convert.write_plan import ConversionPlan, Options, Source
from raphael_dist.data.features.characters import CHARACTERS, CharacterModel
from raphael_dist.data.features.encoder_files import NAMED, text_folders, vae_folder
from raphael_dist.data.features.encoder_models import (
    autoencoder_class,
    save_autoencoder,
    save_text_model,
    text_class,
    tokenizer_of,
)
from raphael_dist.errors import UserError
from raphael_dist.model.diffusers_model import EXPERT_FIELDS, RaphaelUNet2D
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.storage.versions import versions
from raphael_dist.storage.weight_files import DIFFUSERS, TRANSFORMERS, weight_files
from raphael_dist.text import JsonObject, reason_unreadable

UNET = RaphaelUNet2D.__name__
_LATER_FIELDS: JsonObject = {"image_positions": False}  # fields that folders of earlier exports lack, with their values


def plan(source: Source, options: Options, target: Path) -> ConversionPlan:
    """Return the plan for converting `source` to a pipeline folder of diffusers, or only to its unet/ (options.unet_only).

    The plan lists the files to write, with paths relative to `target`, so `target` itself is not used. `options`: which
    weights to write, their dtype, the largest size of a file, and what else the folder contains.
    Raises UserError if the VAE or text encoder that the source's configuration names is missing.
    """
    config = source.config
    unet = unet_json(config, "--to diffusers") if is_dense(config) else expert_json(config, RaphaelUNet2D)
    files, small, kind = unet_files(source, options, "unet/")
    manifest = base_manifest("diffusers", source) | {"weights": kind}
    finish = None
    if not options.unet_only:
        encoders = Encoders(config, options.text_by_name)
        index = encoders.model_index()
        name, image = index["_class_name"], samples_image(source)
        card = model_card(source, kind, options, name if isinstance(name, str) else name[1], image is not None)
        small["README.md"] = card.encode()
        if image is not None:
            small[IMAGE] = image
        small["model_index.json"] = json.dumps(index, indent=2).encode()
        if name != "StableDiffusionPipeline":
            small[f"{CODE}.py"] = pipeline_code().encode()
        finish = encoders.write
    if not is_dense(config):
        name, code = model_code(RaphaelUNet2D)
        small[f"unet/{name}.py"] = code.encode()
    small["unet/config.json"] = json.dumps({**unet, "_diffusers_version": versions()["diffusers"]}, indent=2).encode()
    return ConversionPlan(files, (kind,), MANIFEST, manifest, small, finish=finish)


def expert_json(config: Config, kind: type) -> JsonObject:
    """Return the content of diffusers' config.json for a network with experts.

    `config`: configuration of the model. `kind`: class of the network, RaphaelUNet2D or RaphaelControlNet.
    """
    m = config.model
    return {
        "_class_name": kind.__name__,
        "auto_map": {"AutoModel": f"{MODEL}.{kind.__name__}"},  # for diffusers' AutoModel
        **unet_fields(config),
        **{name: getattr(m, ours) for name, ours in EXPERT_FIELDS.items()},
        "edge_channels": config.edge.channels if config.edge.weight > 0 and kind is RaphaelUNet2D else 0,
        "num_train_timesteps": config.diffusion.num_timesteps,
    }


def config_of_experts(unet: JsonObject, where: Path, diffusion: JsonObject, upscale: JsonObject | None) -> Config:
    """Return the configuration of this project for a RaphaelUNet2D in a pipeline folder.

    Args:
        unet: the content of the U-Net's config.json.
        where: path of this file, for messages.
        diffusion: settings of the section `diffusion` (noise schedule) that the folder's scheduler states; may be {}.
        upscale: settings of the section `upscale`; None: no super-resolution.

    Raises:
        UserError: a field of config.json is missing, or has a value that is not allowed.
    """
    try:
        fields = {**_LATER_FIELDS, **unet}
        model = sizes_of_unet(unet, where) | {ours: fields[name] for name, ours in EXPERT_FIELDS.items()}
        edges, steps = int(unet["edge_channels"]), int(unet["num_train_timesteps"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where} must be the configuration of a {UNET}, but {reason_unreadable(error)}. Copy it again from its source, "
            "or export the model again with --to diffusers."
        ) from None
    edge: JsonObject = {"channels": edges, "max_timestep": min(500, steps)} if edges else {"weight": 0.0}
    sections = {"model": model, "edge": edge, "upscale": upscale or {}, "sample": {"steps": min(25, steps - 1)}}
    return config_from_tree({**sections, "diffusion": diffusion | {"num_timesteps": steps}})


class Encoders:
    """The components of a pipeline other than the U-Net: source folders and classes of VAE, text encoder and tokenizer."""

    def __init__(self, config: Config, text_by_name: bool = False) -> None:
        if text_by_name and config.text.encoder not in NAMED:
            raise UserError(
                f"--text-by-name requires that text.encoder is {' or '.join(NAMED)}, but it is "
                f"{config.text.encoder!r}. Leave out --text-by-name."
            )
        self.config, self.text_by_name = config, text_by_name or config.text.encoder == CHARACTERS  # it has no files
        self.vae: Path | None = None
        self.vae_class, self.vae_config = "", JsonObject()
        if config.image.vae != "none":
            self.vae = vae_folder(config.image.vae)
            kind, self.vae_config = autoencoder_class(self.vae, config.image.vae)
            self.vae_class = kind.__name__
        self.scheduler = make_scheduler(config.diffusion, config.sample.scheduler)
        self.tokenizer = tokenizer_of(config.text.encoder)
        if config.text.encoder == CHARACTERS:
            self.text_class, encoder = CharacterModel.__name__, CharacterModel().config
        else:
            self.text, _ = text_folders(config.text.encoder)
            kind, encoder = text_class(self.text, config.text.encoder)
            self.text_class = kind.__name__
        if encoder.hidden_size != config.model.text_width:
            raise UserError(
                f"text.encoder={config.text.encoder!r} must have embeddings of the width "
                f"model.text_width={config.model.text_width}, but their width is {encoder.hidden_size}. Use another text "
                "encoder, or add --unet-only to export without it."
            )

    def model_index(self) -> JsonObject:
        """Return the content of model_index.json, which lists the classes of the pipeline and its components."""
        config = self.config
        plain = is_dense(config) and not config.upscale.factor
        # StableDiffusionPipeline divides latents by the scaling factor only, without a shift.
        shifted = any(self.vae_config.get(name) for name in ("shift_factor", "latents_mean"))
        plain = plain and config.diffusion.prediction != "flow"  # StableDiffusionPipeline cannot sample flow matching
        stable = plain and self.text_class == "CLIPTextModel" and self.vae_class == "AutoencoderKL" and not shifted
        pipeline = "RaphaelUpscalePipeline" if config.upscale.factor else "RaphaelPipeline"
        index: JsonObject = {
            "_class_name": "StableDiffusionPipeline" if stable else [CODE, pipeline],
            "_diffusers_version": versions()["diffusers"],
            "unet": ["diffusers", CLASS] if is_dense(config) else [MODEL, UNET],
            "vae": ["diffusers", self.vae_class] if self.vae else [None, None],
            "text_encoder": ["transformers", self.text_class],
            "tokenizer": ["transformers", type(self.tokenizer).__name__],
            "scheduler": ["diffusers", type(self.scheduler).__name__],
        }
        if stable:
            nothing: list[None] = [None, None]
            return index | {"safety_checker": nothing, "feature_extractor": nothing, "requires_safety_checker": False}
        sample: JsonObject = {"steps": config.sample.steps, "guidance": config.sample.guidance}
        if config.upscale.factor:
            sample["upscale"] = config.upscale.model_dump(mode="json")
        if self.text_by_name:
            index |= {"text_encoder": [None, None], "tokenizer": [None, None], "text": config.text.encoder}
        return index | sample | {"max_tokens": config.text.max_tokens, "size": list(config.image.buckets[0])}

    def write(self, folder: Path) -> None:
        """Copy the VAE and the text encoder into the pipeline's folder `folder`, and write its scheduler and tokenizer."""
        self.scheduler.save_pretrained(folder / "scheduler")
        if self.vae is not None and not _copied(self.vae, folder / "vae", DIFFUSERS):
            save_autoencoder(self.config.image.vae, folder / "vae")
        if self.text_by_name:
            return
        self.tokenizer.save_pretrained(folder / "tokenizer")
        # A pipeline uses the last layer of the text encoder.
        if self.config.text.layer != "last" or not _copied(self.text, folder / "text_encoder", TRANSFORMERS):
            save_text_model(self.config.text.encoder, self.config.text.layer, folder / "text_encoder")


def _copied(source: Path, target: Path, stems: tuple[str, str]) -> bool:
    """Copy the config.json and the weights of a model from the folder `source` to the folder `target`; return True.

    If the weights are not safetensors, or their file names contain a variant such as fp16, copy nothing and return False:
    the caller must load the model and save it again. `stems`: beginnings of the weight files' names, for .safetensors and
    for .bin files.
    """
    files = weight_files(source, stems)
    if files.pickled or files.variant:
        return False
    target.mkdir(parents=True)
    single, index = f"{stems[0]}.safetensors", source / f"{stems[0]}.safetensors.index.json"
    for path in (source / "config.json", *files.paths, *([] if files.paths[0].name == single else [index])):
        shutil.copyfile(path, target / path.name)
    return True


def open_diffusers(folder: Path, config: Config | None = None) -> Checkpoint:
    """Open the U-Net of a diffusers pipeline folder as a checkpoint.

    `config` is not used: the configuration is read from the folder.
    Raises UserError unless the U-Net is a RaphaelUNet2D or has the structure of Stable Diffusion 2.
    """
    unet = read_object(folder / "unet" / "config.json")
    manifest = read_optional_manifest(folder, "diffusers")
    if manifest is None and unet.get("_class_name") == CLASS:
        return open_dense(folder)
    if manifest is None and unet.get("_class_name") != UNET:
        raise UserError(
            f"_class_name={unet.get('_class_name')} in {folder}/unet/config.json must be {UNET} or {CLASS}. Give the folder "
            "of a pipeline whose U-Net has one of these classes."
        )
    diffusion = scheduler_settings(folder)
    if manifest is not None:
        config = config_from_tree(manifest["config"])
    else:
        index = read_object(folder / "model_index.json") if detect(folder) else {}
        config = config_of_experts(unet, folder / "unet" / "config.json", diffusion, index.get("upscale"))
    return weights_by_name(folder, config, gather(weight_files(folder / "unet").paths), manifest, diffusion)


def detect(path: Path) -> bool:
    """Return whether `path` is the folder of a diffusers pipeline: one with a model_index.json."""
    return (path / "model_index.json").is_file()


LAYOUT = Layout("diffusers", "weights", detect, open_diffusers, plan, WEIGHTS | {"unet_only"}, pickles=pickles)
