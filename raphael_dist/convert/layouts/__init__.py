"""The layouts: formats in which a checkpoint can be stored on disk, such as diffusers' or DeepSpeed's.

Every module or package in this folder whose name does not begin with an underscore is a layout of that name, and defines
`LAYOUT`. To add a layout, add a file: layouts are listed nowhere else. A module is imported when its layout is used;
`names` imports none.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from raphael_dist.checkpoint.folders import resolve_latest
from raphael_dist.checkpoint.manifest import MANIFEST
from raphael_dist.errors import UserError, did_you_mean
from raphael_dist.text import read_json, reason_unreadable

if TYPE_CHECKING:
    from raphael_dist.config.schema import Config
    from raphael_dist.convert.source_checkpoint import Checkpoint
    from raphael_dist.convert.write_plan import ConversionPlan, Options, Source

# Fields of `Options` that a layout may support: layouts with files per rank, and layouts with one kind of weights.
RANKS = frozenset({"space_ep", "time_ep", "world", "stage"})
WEIGHTS = frozenset({"weights", "dtype"})
# Formats of adapters that are trained on top of a frozen base (convert/adapter_export.py). They contain no whole model.
ADAPTER_FORMATS = {"peft": "LoRA adapters", "controlnet": "a ControlNet of diffusers"}


@dataclass(frozen=True)
class Layout:
    """One format of a checkpoint on disk.

    Attributes:
        name: the name of its module.
        holds: "everything" that a run needs to continue, or only "weights".
        detect: called with a path; returns whether the files there have this layout, judging by their names only. This
            function is called only if `path` has no manifest.json that states a layout. So a layout whose files always
            have such a manifest returns False.
        open: called with a path and the configuration that the user gave (usually None); returns the checkpoint after
            reading headers only. Raises UserError for missing or duplicate tensors, wrong shapes and files of another kind.
            Any other exception is a bug in the layout.
        plan: called with a source checkpoint, options and the target's path; returns which files a conversion must write
            (`ConversionPlan`). Raises UserError if the layout cannot represent the source's model, or does not allow these
            options.
        options: names of the fields of `write_plan.Options` that this layout supports as the target of a conversion.
        takes_config: whether `open` needs the configuration if the files have no manifest of this project.
        pickles: called with a path; returns the files that `open` would unpickle (weights only). Inspection requires their
            checksums.
    """

    name: str
    holds: Literal["everything", "weights"]
    detect: "Callable[[Path], bool]"
    open: "Callable[[Path, Config | None], Checkpoint]"
    plan: "Callable[[Source, Options, Path], ConversionPlan]"
    options: frozenset[str] = frozenset()
    takes_config: bool = False
    pickles: Callable[[Path], list[Path]] = lambda path: []


def names() -> list[str]:
    """Return the names of all layouts (formats of checkpoints on disk), without importing their modules."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def layout_of(option: str, name: str) -> Layout:
    """Return the layout (format of checkpoints on disk) called `name`.

    Raises UserError if no layout has this name. The message begins with `option`, the command line option that
    gave the name.
    """
    if name not in names():
        known = [*names(), *(ADAPTER_FORMATS if option == "--to" else ())]
        raise UserError(
            f"{option} {name}: there is no such layout{did_you_mean(name, known)}. Use one of {', '.join(known)}."
        )
    layout: Layout = import_module(f"{__name__}.{name}").LAYOUT
    assert layout.name == name, f"LAYOUT.name in {__name__}.{name} must be the module's name, but it is {layout.name}"
    return layout


def detect(path: Path, option: str = "--from") -> Layout:
    """Find out in which layout (format) the checkpoint at `path` is stored.

    Raises UserError if no layout matches. The message begins with `option`, the command line option that gave the path.
    """
    if not path.exists():
        raise UserError(f"{option} {path}: there is no such file or folder. Check the path.")
    if (path / MANIFEST).is_file():
        try:
            name = read_json(path / MANIFEST).get("layout")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{option} {path}: {MANIFEST} cannot be read: {reason_unreadable(error)}. Copy the checkpoint again from "
                "its source."
            ) from None
        if name is not None:
            return layout_of(option, str(name))
    for name in names():
        layout = layout_of("--from", name)
        if layout.detect(path):
            return layout
    raise UserError(
        f"{option} {path} must be a checkpoint in one of the layouts {', '.join(names())}, but its files match none of "
        "them. Give the folder or the file of such a checkpoint."
    )


def open_checkpoint(name: str, path: Path, config: "Config | None" = None) -> "Checkpoint":
    """Open a checkpoint in any layout (format on disk). Only the headers of files are read.

    Args:
        name: name of the checkpoint's layout, or "auto" to detect the layout.
        path: the checkpoint's folder or file, or a text file `latest` that names a folder next to it.
        config: configuration of the model, for layouts whose files may not describe it (a folder that DeepSpeed wrote).

    Raises:
        UserError: the files are missing, damaged or of another layout.
    """
    path = resolve_latest(path)
    try:
        layout = detect(path) if name == "auto" else layout_of("--from", name)
        if not path.exists():
            raise UserError(f"--from {layout.name} {path}: there is no such file or folder. Check the path.")
        checkpoint = layout.open(path, config)
    except OSError as error:
        raise UserError(f"--from {name} {path} cannot be read: {error.strerror or error}. Check the path.") from None
    checkpoint.layout, checkpoint.whole = layout.name, layout.holds == "everything"
    return checkpoint
