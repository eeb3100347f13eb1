"""Generates the Python files in an exported model folder, which allow loading the model without this package.

A generated file contains a class of this package and every definition of the package that the class uses, with comments.
Code that only training needs is left out:

- definitions that the class does not use,
- methods whose name occurs nowhere in the other code of the file,
- `if` branches whose condition is always false in an exported folder (the list `_NEVER`).
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TypeGuard

from raphael_dist import __version__

CODE = "pipeline"  # the module in a pipeline's folder from which diffusers imports the pipeline's class
MODEL = "modeling_raphael"  # the module in the folder of a model
_PACKAGE = "raphael_dist"
_ROOT = Path(__file__).parents[1]
_PIPELINES = (
    ("raphael_dist.sampling.pipeline", "RaphaelPipeline"),
    ("raphael_dist.sampling.pipeline_variants", "RaphaelImg2ImgPipeline"),
    ("raphael_dist.sampling.pipeline_variants", "RaphaelInpaintPipeline"),
    ("raphael_dist.sampling.pipeline_variants", "RaphaelControlNetPipeline"),
    ("raphael_dist.sampling.pipeline_variants", "RaphaelUpscalePipeline"),
)
# Conditions, as `ast.unparse` writes them, that are False in an exported folder.
_NEVER = {
    "IN_PACKAGE",
    "TYPE_CHECKING",
    "m.expert_backend == 'megablocks'",
    "self.use_megablocks",
    "self.use_kernel",
    "self.use_dense_kernel",
    "use_kernel",
    "self.assumes_even_loads",
    "m.balance_weight > 0 and torch.is_grad_enabled()",
    "recompute and torch.is_grad_enabled()",
    "torch.is_grad_enabled() and (not x.requires_grad)",
}
_CALLED_BY_TORCH = {"forward", "backward"}
_LICENCE = """# Copyright the authors of raphael_dist. Licensed under the Apache License, Version 2.0:
# http://www.apache.org/licenses/LICENSE-2.0
"""


@cache
def pipeline_code() -> str:
    """Return the text of pipeline.py for an exported model folder. This file defines this project's pipelines for diffusers.

    The text imports only torch, diffusers, transformers and packages that these require.
    """
    return standalone_module(_PIPELINES, "The pipelines of a RAPHAEL text-to-image model, for diffusers.")


@cache
def model_code(kind: type) -> tuple[str, str]:
    """Return (module name, text) of a Python file that defines a model class without importing this package.

    Exported model folders contain this file. `kind`: the class, such as RaphaelUNet2D.
    """
    own = kind.__module__.rpartition(".")[2]
    name = MODEL if own == "diffusers_model" else f"modeling_{own}"
    return name, standalone_module(((kind.__module__, kind.__name__),), f"{kind.__name__}, for diffusers and transformers.")


def standalone_module(roots: tuple[tuple[str, str], ...], title: str) -> str:
    """Return the text of one Python file that defines some classes of this package without importing the package.

    The text consists of the source of the classes and of all definitions in this package that the classes use.

    Args:
        roots: (module, name) of each class. All of their methods are kept.
        title: first line of the file's docstring.
    """
    selection = _Selection()
    for module, name in roots:
        selection.add(module, name, whole=True)
    selection.complete()
    body = [selection.text_of(module) for module in selection.order()]
    head = (
        f'"""{title}\n\nMade from the source of raphael_dist {__version__}, for drawing only; not meant to be edited.\n"""\n'
    )
    return "\n\n".join([f"{_LICENCE}\n{head}\n{selection.imports()}", *body]) + "\n"


# ---- modules -----------------------------------------------------------------------------------------------------------


@dataclass
class _Module:
    """The source of a module of this package.

    Attributes:
        lines: the lines of its text, without `if` branches whose condition is always false in an exported folder (`_NEVER`).
        own: for each name that the module defines at its top level, the statement that defines it.
        ours: for each name that the module imports from this package, the module that defines the name.
        external: for each name that the module imports from another package, (module, imported name), or for a statement
            `import x`, ("", the statement).
    """

    lines: list[str]
    own: dict[str, ast.stmt] = field(default_factory=dict)
    ours: dict[str, str] = field(default_factory=dict)
    external: dict[str, tuple[str, str]] = field(default_factory=dict)


@cache
def _read(name: str) -> _Module:
    text = (_ROOT / Path(*name.split(".")[1:]).with_suffix(".py")).read_text()
    # An exported folder does not contain the classes of the configuration.
    text = re.sub(r'config: "\w+"', "config: Any", text)
    lines = text.splitlines()
    left_out = {n for node in ast.walk(ast.parse(text)) if _is_never(node) for n in _lines_of(node, lines)}
    lines = [line for n, line in enumerate(lines) if n not in left_out]
    module, tree = _Module(lines), ast.parse("\n".join(lines))
    for node in tree.body:
        for bound in _bound(node):
            module.own[bound] = node
    # Imports inside functions stay there; they import other packages only.
    for node in tree.body:
        if isinstance(node, ast.Import):
            module.external |= {(alias.asname or alias.name).split(".")[0]: ("", ast.unparse(node)) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                bound = alias.asname or alias.name
                if node.module.split(".")[0] == _PACKAGE:
                    module.ours[alias.name] = node.module
                else:
                    module.external[bound] = (node.module, alias.name + (f" as {bound}" if alias.asname else ""))
    return module


def _is_never(node: ast.AST) -> TypeGuard[ast.If]:
    if not isinstance(node, ast.If) or ast.unparse(node.test) not in _NEVER:
        return False
    assert not node.orelse, "a branch of _NEVER must have no else"
    return True


def _bound(node: ast.stmt) -> list[str]:
    """Return the names of functions, classes and variables that a top-level statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _lines_of(node: ast.stmt, lines: list[str]) -> range:
    """Return the indices (from 0), in a module's `lines`, of the lines of the statement `node`.

    Decorators of the statement and comments directly above it count as part of it.
    """
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1
    while first and lines[first - 1].lstrip().startswith("#") and not lines[first - 1].lstrip().startswith("# ----"):
        first -= 1
    return range(first, node.end_lineno or node.lineno)


# ---- selection ---------------------------------------------------------------------------------------------------------


class _Selection:
    """Collects the definitions of this package that some classes use, directly or indirectly."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[int, ast.stmt]] = defaultdict(dict)  # by module and position in it
        self._imports: set[tuple[str, str]] = set()
        self._methods: list[tuple[str, ast.FunctionDef]] = []  # methods whose names have not been used so far
        self._read_names: set[str] = set()
        self._after: dict[str, set[str]] = defaultdict(set)
        self._owners: dict[str, str] = {}

    def add(self, module: str, name: str, whole: bool = False) -> None:
        """Select the definition of `name` in a module of this package, and everything that it uses.

        `whole`: for a class, whether to keep all of its methods. Otherwise `complete` selects the methods that are used.
        """
        source = _read(module)
        if name in source.external:
            self._imports.add(source.external[name])
        elif name in source.ours:
            self._after[module].add(source.ours[name])
            self.add(source.ours[name], name, whole)
        elif name in source.own and source.own[name].lineno not in self._kept[module]:
            node = source.own[name]
            assert self._owners.setdefault(name, module) == module, f"{name} is defined in {module} and {self._owners[name]}"
            self._kept[module][node.lineno] = node
            self._visit(module, node, whole)

    def _visit(self, module: str, node: ast.stmt, whole: bool) -> None:
        parts: list[ast.AST] = [node]
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if isinstance(base, ast.Name):
                    self.add(module, base.id, whole)
            parts = [*node.decorator_list, *node.bases, *node.keywords]
            for statement in node.body:
                waits = isinstance(statement, ast.FunctionDef) and not (whole or _is_called_by_python(statement.name))
                if waits:
                    self._methods.append((module, statement))  # type: ignore[arg-type]
                else:
                    parts.append(statement)
        for part in parts:
            self._visit_names(module, part)

    def _visit_names(self, module: str, part: ast.AST) -> None:
        for inner in ast.walk(part):
            if isinstance(inner, ast.Name):
                self.add(module, inner.id)
            elif isinstance(inner, ast.Attribute):
                self._read_names.add(inner.attr)

    def complete(self) -> None:
        """Select the methods of selected classes whose names occur in the selected code, until no more methods are found."""
        while ready := [pair for pair in self._methods if pair[1].name in self._read_names]:
            self._methods = [pair for pair in self._methods if pair not in ready]
            for module, method in ready:
                self._visit_names(module, method)

    def order(self) -> list[str]:
        """Return the names of the modules with selected definitions, each after the modules that it imports."""
        graph = {module: sorted(self._after[module]) for module in [*self._kept, *self._after]}
        return [module for module in TopologicalSorter(graph).static_order() if self._kept[module]]

    def text_of(self, module: str) -> str:
        """Return the text of the selected definitions of a module, in the order of its source."""
        lines = _read(module).lines
        left_out = {n for of, method in self._methods if of == module for n in _lines_of(method, lines)}
        text, spaced = f"# ---- {module.removeprefix(f'{_PACKAGE}.')} ".ljust(120, "-"), True
        for _, node in sorted(self._kept[module].items()):
            is_block = isinstance(node, ast.ClassDef | ast.FunctionDef)
            kept = [lines[n] for n in _lines_of(node, lines) if n not in left_out]
            text += ("\n\n\n" if spaced or is_block else "\n") + "\n".join(_squeeze(kept))
            spaced = is_block
        return text

    def imports(self) -> str:
        """Return the import statements that the selected code needs: the standard library first, then other packages."""
        plain = {text for module, text in self._imports if not module}
        grouped: dict[str, list[str]] = defaultdict(list)
        for module, name in self._imports:
            if module:
                grouped[module].append(name)
        statements = plain | {f"from {module} import {', '.join(sorted(names))}" for module, names in grouped.items()}
        standard = {text for text in statements if text.split()[1].split(".")[0] in sys.stdlib_module_names}
        blocks = [
            sorted(block, key=lambda text: (text.startswith("from "), text)) for block in (standard, statements - standard)
        ]
        return "\n\n".join("\n".join(block) for block in blocks if block)


def _is_called_by_python(name: str) -> bool:
    return name in _CALLED_BY_TORCH or (name.startswith("__") and name.endswith("__"))


def _squeeze(lines: list[str]) -> Iterator[str]:
    """Yield `lines` with at most one empty line in a row, and without empty lines at the end."""
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    for before, line in zip(["", *lines], lines, strict=False):
        if line.strip() or before.strip():
            yield line
