"""The layouts: the ways in which a checkpoint lies on disk.

Every module or folder here whose name has no underscore in front is a layout of that name, and has a `LAYOUT`. Nothing else
lists them: a new file is a new layout, for the command lines, for inspection and for `run.init_from`. A module is imported
when its layout is asked for; `names` imports none.
"""

import json
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from raphael_dist.checkpoint.folders import followed
from raphael_dist.checkpoint.manifest import MANIFEST
from raphael_dist.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from raphael_dist.config import Config
    from raphael_dist.convert.plan import ConversionPlan, Options, Source
    from raphael_dist.convert.source import Checkpoint

# What a target may be told, as fields of `Options`: layouts of ranks, and layouts of one kind of weights.
RANKS = frozenset({"space_ep", "time_ep", "world", "stage"})
WEIGHTS = frozenset({"weights", "dtype"})


def _reads_no_pickles(path: Path) -> list[Path]:
    return []


@dataclass(frozen=True)
class Layout:
    """One way in which a checkpoint lies on disk.

    Attributes:
        holds: everything that a run needs to go on, or weights alone.
        detect: whether a path is of this layout. Asked only where no manifest.json says it by `"layout": NAME`, so most
            layouts answer False. May look at names, not into files.
        open: returns the checkpoint at a path, after reading headers alone. The second argument is the configuration that
            the user gave; None for most. UserError for what is missing, doubled, of another shape, or no such checkpoint.
        plan: returns which files hold a source in this layout; the third argument is the target's path. UserError when the
            layout cannot hold the source's model, or not in the way that the options ask for.
        options: which fields of `Options` the target heeds.
        takes_config: `open` needs the configuration where no manifest of ours lies beside the files.
        pickles: the files that `open` would unpickle (as weights alone); inspection wants a manifest to vouch for them.
    """

    name: str
    holds: Literal["everything", "weights"]
    detect: "Callable[[Path], bool]"
    open: "Callable[[Path, Config | None], Checkpoint]"
    plan: "Callable[[Source, Options, Path], ConversionPlan]"
    options: frozenset[str] = frozenset()
    takes_config: bool = False
    pickles: Callable[[Path], list[Path]] = _reads_no_pickles


def names() -> list[str]:
    """Return the names of all layouts, without importing any."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def layout_of(option: str, name: str) -> Layout:
    """Return the layout that an option of the command line ("--from" or "--to") names. UserError when there is none."""
    if name not in names():
        raise UserError(f"{option} {name}: unknown layout{did_you_mean(name, names())}; known: {', '.join(names())}")
    layout: Layout = import_module(f"{__name__}.{name}").LAYOUT
    assert layout.name == name, f"the layout of {__name__}.{name} calls itself {layout.name}; a layout has its module's name"
    return layout


def detect(path: Path) -> Layout:
    """Return the layout of what lies at `path`. UserError when it is none that is known."""
    if not path.exists():
        raise UserError(f"--from {path}: no such file or folder")
    if (path / MANIFEST).is_file():
        try:
            said = json.loads((path / MANIFEST).read_text()).get("layout")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"--from {path}: {MANIFEST} is unreadable: {error}") from None
        if said is not None:
            return layout_of("--from", str(said))
    for name in names():
        layout = layout_of("--from", name)
        if layout.detect(path):
            return layout
    raise UserError(f"--from {path}: no layout is recognised there; known: {', '.join(names())}")


def open_checkpoint(name: str, path: Path, config: "Config | None" = None) -> "Checkpoint":
    """Open a checkpoint in a layout ("auto": by what is there); only headers are read. UserError for what does not fit.

    config: the model, for layouts whose files may not say it (a folder that DeepSpeed wrote).
    """
    path = followed(path)
    try:
        layout = detect(path) if name == "auto" else layout_of("--from", name)
        name = layout.name
        if not path.exists():
            raise UserError(f"--from {name} {path}: no such file or folder")
        checkpoint = layout.open(path, config)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--from {name} {path}: {error.strerror or error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        # Whatever a stranger's files lack of what the layout's have.
        raise UserError(f"--from {name} {path}: not of this layout: {type(error).__name__}: {error}") from None
    checkpoint.layout, checkpoint.whole = name, layout.holds == "everything"
    return checkpoint
