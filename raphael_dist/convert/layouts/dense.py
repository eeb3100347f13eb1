"""The layout `dense`: a U-Net with the structure of Stable Diffusion 2, as a `unet/` folder of diffusers or a single file.

The tensors in a single file may have diffusers' names, or those of the original LDM code, which begin with
`model.diffusion_model.`. The sizes of the model are read from the folder's config.json, or from the shapes of the tensors in
a single file.
"""

import json
import re
from math import prod
from pathlib import Path

from raphael_dist.checkpoint.manifest import MANIFEST
from raphael_dist.config.schema import Config, config_from_tree
from raphael_dist.convert.layout_manifest import base_manifest, checkpoint_of, read_optional_manifest
from raphael_dist.convert.layouts import WEIGHTS, Layout
from raphael_dist.convert.layouts.canonical import gather
from raphael_dist.convert.source_checkpoint import Checkpoint, parameter_shapes
from raphael_dist.convert.unet_config import CLASS, config_of_shapes, config_of_unet, unet_json
from raphael_dist.convert.write_plan import ConversionPlan, Entry, Options, OutFile, Source, chosen_weights, parts, piece
from raphael_dist.errors import UserError
from raphael_dist.storage.tensorfile import StoredTensor
from raphael_dist.storage.torchfile import file_tensors
from raphael_dist.storage.weight_files import weight_files
from raphael_dist.text import JsonObject, json_type, read_json

STEM = "diffusion_pytorch_model"
FLOW = "FlowMatchEulerDiscreteScheduler"
_LDM = "model.diffusion_model."
_INPUT_BLOCK = re.compile(re.escape(_LDM) + r"input_blocks\.(\d+)\.(0\.op\.weight)?")


def open_dense(path: Path, config: Config | None = None) -> Checkpoint:
    """Open a dense U-Net: a `unet/` folder of diffusers, the folder of a pipeline that contains it, or a single file.

    `config` is not used: the configuration is read from the folder, or computed from the shapes in the file.
    Raises UserError if the U-Net does not have the structure of Stable Diffusion 2.
    """
    if path.is_file():
        return _open_file(path)
    folder = path / "unet" if (path / "unet").is_dir() else path
    manifest, diffusion = read_optional_manifest(folder, "dense"), JsonObject()
    if manifest is not None:
        config = config_from_tree(manifest["config"])
    else:
        unet = read_object(folder / "config.json")
        if unet.get("_class_name") != CLASS:
            raise UserError(
                f"{folder / 'config.json'}: _class_name must be {CLASS}, but it is "
                f"{unet.get('_class_name', 'missing')}. Give the folder of such a U-Net."
            )
        diffusion = scheduler_settings(folder)
        config = config_of_unet(unet, folder / "config.json", diffusion)
    return weights_by_name(folder, config, gather(weight_files(folder).paths), manifest, diffusion)


def _open_file(path: Path) -> Checkpoint:
    stored = file_tensors(path)
    if any(key.startswith(_LDM) for key in stored):
        stored = _from_ldm(stored, path)
    config = config_of_shapes({key: tensor.shape for key, tensor in stored.items()}, path)
    return weights_by_name(path, config, stored, None, {})


def _from_ldm(stored: dict[str, StoredTensor], where: Path) -> dict[str, StoredTensor]:
    """Return the U-Net's tensors from a file in the format of the original LDM code, as a dict by diffusers' names.

    `stored`: all tensors of the file, by their names in the file. `where`: path of the file, for messages. Raises UserError
    if the U-Net does not have the structure of Stable Diffusion 2.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = {key: tensor for key, tensor in stored.items() if key.startswith(_LDM)}
    inputs = [match for key in unet if (match := _INPUT_BLOCK.match(key))]
    # The first block that downsamples follows the residual blocks of the first level.
    downsampler = min((int(match[1]) for match in inputs if match[2]), default=len({match[1] for match in inputs}))
    try:
        renamed = convert_ldm_unet_checkpoint(unet, {"layers_per_block": max(1, downsampler - 1)})
    except LookupError as error:
        raise UserError(
            f"{where} must be a U-Net of Stable Diffusion 2, but it lacks the tensor {_LDM}{error.args[0]}. Use "
            "a model with that structure."
        ) from None
    tensors = {name: tensor for name, tensor in renamed.items() if tensor is not None}
    kept = set(tensors.values())
    if other := next((key for key, tensor in unet.items() if tensor not in kept), None):
        raise UserError(
            f"{where} must be a U-Net of Stable Diffusion 2, but the tensor {other} is not part of such a U-Net. Use "
            "a model with that structure."
        )
    return tensors


def weights_by_name(
    folder: Path, config: Config, stored: dict[str, StoredTensor], manifest: JsonObject | None, diffusion: JsonObject
) -> Checkpoint:
    """Return an opened checkpoint whose files store each parameter as one whole tensor under the parameter's name.

    Args:
        folder: the path that was opened.
        config: configuration of the model.
        stored: where each tensor is in its file, by the name of the parameter in the trainer's model.
        manifest: content of the folder's manifest.json; None: there is no such file.
        diffusion: settings of the section `diffusion` that the folder's scheduler states (`scheduler_settings`).

    Raises:
        UserError: a tensor of the model is missing or has another shape, or the files have a tensor that the model lacks.
    """
    expected = parameter_shapes(config)
    unfit = sorted(n for n in expected.keys() | stored.keys() if n not in stored or expected.get(n) != stored[n].shape)
    if unfit:
        of_file = list(stored[unfit[0]].shape) if unfit[0] in stored else "missing"
        of_model = list(expected[unfit[0]]) if unfit[0] in expected else "missing"
        raise UserError(
            f"{folder} must contain the tensors that its configuration requires, but {len(unfit)} of them differ, for "
            f"example the shape of {unfit[0]}: {of_file} in the file, {of_model} in the model. Put the "
            "config.json and the weights of the same model into the folder."
        )
    spans = {("master", name): [tensor] for name, tensor in stored.items()}
    if manifest is not None:
        return checkpoint_of(folder, manifest, spans)
    checkpoint = Checkpoint(folder, config, spans, says_prediction="prediction" in diffusion)
    checkpoint.check()
    return checkpoint


def read_object(path: Path) -> JsonObject:
    """Return the content of a JSON file as a dict. Raises UserError if it cannot be read, or is not a JSON object."""
    try:
        tree = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Copy it again from its source.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be a JSON object, but it is {json_type(tree)}. Copy it again from its source.")
    return tree


def scheduler_settings(folder: Path) -> JsonObject:
    """Translate the scheduler_config.json of a diffusers pipeline into settings of this project's section `diffusion`.

    For example, "beta_schedule" becomes the setting "schedule". Returns {} if the folder has no scheduler.

    Args:
        folder: the pipeline's folder, or the folder unet/ in it.

    Raises:
        UserError: the noise schedule is not supported. Supported are a beta_schedule, and flow matching with shift=1.
    """
    paths = [home / "scheduler" / "scheduler_config.json" for home in (folder, folder.parent)]
    scheduler = next((read_object(path) for path in paths if path.is_file()), {})
    names = {"num_train_timesteps": "num_timesteps", "beta_schedule": "schedule", "beta_start": "beta_start",
             "beta_end": "beta_end", "prediction_type": "prediction",
             "rescale_betas_zero_snr": "zero_terminal_snr"}  # fmt: skip
    if scheduler.get("_class_name") == FLOW and not scheduler.get("use_dynamic_shifting") and scheduler.get("shift") == 1:
        return {"num_timesteps": scheduler["num_train_timesteps"], "prediction": "flow"}
    no_betas = "_class_name" in scheduler and "beta_schedule" not in scheduler  # another scheduler of flow matching
    if no_betas or scheduler.get("trained_betas") is not None:
        raise UserError(
            f"{folder}: the scheduler must have beta_schedule scaled_linear or linear, or be {FLOW} with shift=1, but "
            f"{scheduler.get('_class_name', 'the scheduler')} uses another kind of noise schedule. Use a U-Net that was "
            "trained with scaled_linear, linear, or flow matching with shift=1."
        )
    return {ours: scheduler[theirs] for theirs, ours in names.items() if scheduler.get(theirs) is not None}


def unet_files(source: Source, options: Options, folder: str) -> tuple[list[OutFile], dict[str, bytes], str]:
    """Plan the weight files of a U-Net of diffusers, with each parameter as one tensor under the parameter's name.

    Nothing is written.

    Args:
        source: the checkpoint to convert.
        options: options of the conversion. Used are `weights`, `dtype` and `part_bytes` (largest size of a file in bytes).
        folder: prefix of the files' names, such as "unet/".

    Returns:
        A description of each file to write: its name and tensors; {name: content} of the index file that states which
        tensor is in which file, or {} if there is only one file; and which weights the files contain, "ema" (moving
        average) or "master" (fp32 weights).
    """
    kind = chosen_weights(source, options)
    entries = [Entry(n, s, (piece(kind, n, 0, prod(s)),), options.dtype) for n, s in source.shapes.items()]
    return *parts(entries, f"{folder}{STEM}", options.part_bytes), kind


def plan(source: Source, options: Options, target: Path) -> ConversionPlan:
    """Return the plan for converting `source` to a U-Net folder in diffusers' format (UNet2DConditionModel).

    The plan lists the files to write, with paths relative to `target`, so `target` itself is not used. `options`: which
    weights to write, their dtype, and the largest size of a file. Raises UserError if the model has experts.
    """
    unet = unet_json(source.config, "--to dense")
    files, small, kind = unet_files(source, options, "")
    small["config.json"] = json.dumps(unet, indent=2).encode()
    manifest = base_manifest("dense", source) | {"weights": kind}
    return ConversionPlan(files, (kind,), MANIFEST, manifest, small)


def detect(path: Path) -> bool:
    """Return whether to open `path` as a dense U-Net: any file, or a folder with config.json but no model_index.json.

    Nothing is read: `open_dense` raises UserError if the file or folder contains something else.
    """
    return path.is_file() or ((path / "config.json").is_file() and not (path / "model_index.json").is_file())


def pickles(path: Path) -> list[Path]:
    """Return the weight files of the U-Net `path` that are pickles: they are unpickled when the U-Net is opened.

    If `path` is a file, it counts as a pickle unless it is a .safetensors file. `path` may also be a folder.
    """
    if path.is_file():
        return [path] if path.suffix != ".safetensors" else []
    files = weight_files(path / "unet" if (path / "unet").is_dir() else path)
    return list(files.paths) if files.pickled else []


LAYOUT = Layout("dense", "weights", detect, open_dense, plan, WEIGHTS, pickles=pickles)
