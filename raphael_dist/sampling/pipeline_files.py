"""Loads and saves pipelines as diffusers does. A saved folder also contains the Python code of the pipeline."""

import inspect
import json
from pathlib import Path
from typing import Any, Self

from diffusers import DiffusionPipeline

from raphael_dist.convert.exported_code import CODE, model_code, pipeline_code
from raphael_dist.data.features.characters import CHARACTERS
from raphael_dist.errors import UserError
from raphael_dist.model.diffusers_model import RaphaelControlNet, RaphaelUNet2D
from raphael_dist.sampling.own_code import IN_PACKAGE
from raphael_dist.storage.files import apply_umask
from raphael_dist.text import read_json

_Pipeline: Any = DiffusionPipeline  # the type hints of DiffusionPipeline lack the methods of its mixins
# Components that are classes of this package. The installed package uses them instead of the code in a folder.
OWN_COMPONENTS = {kind.__name__: kind for kind in (RaphaelUNet2D, RaphaelControlNet)}


class PipelineFiles(_Pipeline):
    """Base class of this project's diffusers pipelines, with the methods that load and save them."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a pipeline from a local folder or a model hub, with diffusers' arguments.

        Raises UserError if the local folder does not contain a pipeline.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.exists() or str(folder).count("/") != 1:  # otherwise it may be the name of a repository
            check_pipeline_folder(folder)
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
        """Return a pipeline of this class that shares components and settings with another. Weights keep their dtype.

        Args:
            pipeline: any pipeline with the components that this class requires.
            kwargs: components and settings to replace or add.

        Raises:
            UserError: a component is missing.
        """
        names, settings = cls._get_signature_keys(cls)
        parts = {name: part for name, part in pipeline.components.items() if name in names} | kwargs
        if missing := sorted(set(names) - parts.keys() - set(cls._optional_components)):
            raise UserError(
                f"{cls.__name__}.from_pipe requires {missing[0]}. Pass it: from_pipe(pipeline, {missing[0]}=...)."
            )
        return cls(**{name: pipeline.config[name] for name in settings if name in pipeline.config} | parts)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline to the folder `save_directory`, with diffusers' arguments.

        The folder also contains the Python code of the pipeline, so that it can be loaded without this package.
        """
        # The encoder "characters" has no files, and its code is in pipeline.py. Its model_type is compared: if this code was
        # imported twice, the class of the encoder exists twice.
        if self.text_encoder is not None and self.text_encoder.config.model_type == CHARACTERS:
            self.register_to_config(text=CHARACTERS, text_encoder=(None, None), tokenizer=(None, None))
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = [CODE, type(self).__name__]
        code = {CODE: self._own_code(type(self))}
        for name, part in self.components.items():
            kind: Any = type(part)
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

    @staticmethod
    def _own_code(kind: Any) -> str:
        """Return the Python code that a saved folder needs to define the class `kind`."""
        if IN_PACKAGE:
            return pipeline_code() if issubclass(kind, DiffusionPipeline) else model_code(kind)[1]
        return Path(inspect.getfile(kind)).read_text()


def check_pipeline_folder(folder: Path) -> None:
    """Raise UserError unless `folder` is that of a saved pipeline: its model_index.json has the key "_class_name"."""
    try:
        index = read_json(folder / "model_index.json")
        problem = None if isinstance(index, dict) and "_class_name" in index else "it lacks the key _class_name"
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    if problem:
        raise UserError(
            f"{folder} must be the folder of a pipeline, but its model_index.json cannot be used: {problem}. Export a "
            "pipeline with `python -m raphael_dist convert --from auto RUN_DIR --to diffusers FOLDER`."
        )
