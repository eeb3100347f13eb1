"""Loads and saves pipelines as diffusers does. A saved folder also contains the Python code of the pipeline."""

import inspect
import json
from pathlib import Path
from typing import Any, Self

from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from raphael_dist.convert.exported_code import CODE, model_code, pipeline_code
from raphael_dist.data.features.characters import CHARACTERS
from raphael_dist.errors import UserError
from raphael_dist.model.diffusers_model import RaphaelControlNet, RaphaelUNet2D, uncompiled
from raphael_dist.sampling.code_origin import IN_PACKAGE
from raphael_dist.storage.files import apply_umask
from raphael_dist.storage.weight_files import DIFFUSERS, TRANSFORMERS, weight_files
from raphael_dist.text import JsonObject, read_json

_Pipeline: Any = DiffusionPipeline  # the type hints of DiffusionPipeline lack the methods of its mixins
# Components that are classes of this package. The installed package uses them instead of the code in a folder.
OWN_COMPONENTS = {kind.__name__: kind for kind in (RaphaelUNet2D, RaphaelControlNet)}
_STEMS = {"text_encoder": TRANSFORMERS} | dict.fromkeys(("unet", "vae", "controlnet"), DIFFUSERS)  # of weight files
_HUB_OPTIONS = ("repo_id", "commit_message", "private", "create_pr", "token")


class PipelineFiles(_Pipeline):
    """Base class of this project's diffusers pipelines, with the methods that load and save them."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a pipeline from a local folder or a model hub, with diffusers' arguments.

        With `text_encoder=None`, no text encoder is loaded, even if model_index.json names one that has no files in the
        folder. Raises UserError if the local folder does not contain a pipeline, or lacks files.
        """
        if kwargs.get("text_encoder", cls) is None:
            kwargs.setdefault("text", None)
        folder = Path(pretrained_model_name_or_path)
        # A path that does not exist and has one slash may be the name of a repository (owner/name) of the hub.
        if folder.exists() or str(folder).count("/") != 1 or folder.parent.is_dir():
            check_pipeline_folder(folder)
            if IN_PACKAGE:
                index = read_json(folder / "model_index.json")
                default_files = not kwargs.keys() & {"variant", "use_safetensors"}
                for name in sorted(set(cls._get_signature_keys(cls)[0]) - kwargs.keys()):
                    check_component(folder, index, name, name not in cls._optional_components, default_files)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the content of a pipeline's model_index.json, with the arguments and the result of diffusers' method.

        The file names the classes of the components, and the Python files in the same folder that define them. The installed
        package replaces these classes by its own, so `trust_remote_code` is not required.
        """
        loaded = super().load_config(*args, **kwargs)
        for config in loaded if isinstance(loaded, tuple) else (loaded,):
            if isinstance(config.get("_class_name"), list):
                config["_class_name"] = config["_class_name"][-1]
            if IN_PACKAGE:
                for name, entry in config.items():
                    if isinstance(entry, list) and entry[-1] in OWN_COMPONENTS:
                        config[name] = [OWN_COMPONENTS[entry[-1]].__module__, entry[-1]]
        return loaded

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Self:
        """Return a pipeline of this class that shares components and settings with another pipeline.

        Args:
            pipeline: any pipeline with the components that this class requires.
            kwargs: components and settings to replace or add. `dtype` (or `torch_dtype`): dtype to which the shared
                weights are cast; None: the weights keep their dtype.

        Raises:
            UserError: a component that this class requires is neither in `pipeline` nor in `kwargs`.
        """
        torch_dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", None) or torch_dtype
        names, settings = cls._get_signature_keys(cls)
        parts = {name: part for name, part in pipeline.components.items() if name in names} | kwargs
        if parts.get("text_encoder") is None:
            parts.setdefault("text", None)  # otherwise an encoder that the settings name would be loaded
        if missing := sorted(set(names) - parts.keys() - set(cls._optional_components)):
            raise UserError(
                f"{cls.__name__}.from_pipe requires {missing[0]}. Pass it: from_pipe(pipeline, {missing[0]}=...)."
            )
        made = cls(**{name: pipeline.config[name] for name in settings if name in pipeline.config} | parts)
        return made if dtype is None else made.to(dtype=dtype)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the pipeline to the folder `save_directory`, with diffusers' arguments.

        The folder also contains the Python code of the pipeline, so that it can be loaded without this package.

        Args:
            save_directory: the folder; it is created if it does not exist.
            safe_serialization: whether to write safetensors files.
            variant: text that is added to the names of weight files, such as "fp16"; None: no text.
            max_shard_size: largest size of a weight file, in bytes or as in "5GB"; None: as in diffusers.
            push_to_hub: whether to upload the pipeline afterwards, as the method `push_to_hub` does.
            kwargs: arguments of `push_to_hub`; by default `repo_id` is the name of the folder.
        """
        hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
        # The encoder "characters" has no files, and its code is in pipeline.py. It is recognised by its model_type and not
        # by its class, because importing this code twice creates two such classes.
        if self.text_encoder is not None and self.text_encoder.config.model_type == CHARACTERS:
            self.register_to_config(text=CHARACTERS, text_encoder=(None, None), tokenizer=(None, None))
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = [CODE, type(self).__name__]
        code = {CODE: self._own_code(type(self))}
        for name, part in self.components.items():
            kind: Any = type(uncompiled(part))
            if index[name] != [None, None] and kind.__module__.startswith(("raphael_dist.", "diffusers_modules.")):
                library = kind.__module__.rpartition(".")[2]
                if IN_PACKAGE:
                    library, _ = model_code(kind)
                index[name], code[f"{name}/{library}"] = [library, kind.__name__], self._own_code(kind)
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        for path, text in code.items():
            (folder / f"{path}.py").write_text(text)
        if IN_PACKAGE:
            apply_umask(folder)
        if push_to_hub:  # this method saves the pipeline again, to a temporary folder
            self.push_to_hub(**{"repo_id": folder.name, **hub}, safe_serialization=safe_serialization, variant=variant)

    @staticmethod
    def _own_code(kind: Any) -> str:
        """Return the Python code that a saved folder needs to define the class `kind`."""
        if IN_PACKAGE:
            return pipeline_code() if issubclass(kind, DiffusionPipeline) else model_code(kind)[1]
        return Path(inspect.getfile(kind)).read_text()


def check_pipeline_folder(folder: Path) -> None:
    """Raise UserError unless `folder` contains a saved pipeline: a model_index.json with a valid entry "_class_name".

    The entry must be the name of a class, or a list of the name of a module and the name of a class in this module.
    """
    problem = None
    try:
        index = read_json(folder / "model_index.json")
        kind = index.get("_class_name") if isinstance(index, dict) else None
        if not isinstance(kind, str) and not _is_pair(kind):
            problem = f"_class_name={kind!r} must be the name of a class"
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    if problem:
        raise UserError(
            f"{folder} must be the folder of a pipeline, but its model_index.json cannot be used: {problem}. Export a "
            "pipeline with `python -m raphael_dist convert --from auto RUN_DIR --to diffusers FOLDER`."
        )


def check_component(folder: Path, index: JsonObject, name: str, required: bool, weights: bool) -> None:
    """Raise UserError if a component of a saved pipeline cannot be loaded: its class is unknown, or files are missing.

    Args:
        folder: the pipeline's folder.
        index: content of its model_index.json.
        name: name of the component, such as "unet".
        required: whether the pipeline requires this component.
        weights: whether to check also that the component's weight files exist and are not truncated.
    """
    entry, problem = index.get(name) or [None, None], None
    if entry == [None, None]:
        problem = f"the component {name} is missing" if required else None
    elif not _is_pair(entry):
        problem = f"{name}={entry!r} must be a library and the name of a class"
    elif not (folder / name).is_dir():
        problem = f"the folder {name} is missing"
    elif (folder / name / f"{entry[0]}.py").is_file() and entry[1] not in OWN_COMPONENTS:
        problem = f"{name}={entry!r} must name one of the classes {', '.join(OWN_COMPONENTS)}"
    elif weights and name in _STEMS:
        files = weight_files(folder / name, _STEMS[name])
        problem = None if files.pickled else next(filter(None, map(_safetensors_error, files.paths)), None)
    if problem:
        raise UserError(
            f"{folder} must be the folder of a complete pipeline, but {problem}. Copy it again from its source, or export "
            "it again."
        )


def _safetensors_error(path: Path) -> str | None:
    """Return why a safetensors file is damaged; None if its header is intact and agrees with the size of the file."""
    try:
        with safe_open(path, "pt"):
            return None
    except (OSError, SafetensorError) as error:
        return f"{path} cannot be read as a safetensors file ({error})"


def _is_pair(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str) for name in entry)
