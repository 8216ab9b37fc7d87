"""The modules of the package and what they import, as ``docs/modules.md`` shows them.

``python -m tests.docs.structure`` writes both blocks into the page.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import Enum
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Final, NamedTuple

from .pages import ROOT

SOURCE: Final = ROOT / "sqlalchemy_lucent"
PAGE: Final = ROOT / "docs/modules.md"
COMMAND: Final = "python -m tests.docs.structure"

CORE: Final = "core"
BELOW: Final = {
    CORE: frozenset[str](),
    "_database": frozenset({CORE}),
    "rotation": frozenset({CORE, "_database"}),
    "migrations": frozenset({CORE, "_database", "rotation"}),
    "keys": frozenset({CORE, "_database", "rotation", "migrations"}),
    "renewal": frozenset({CORE, "_database"}),
    "_cli": frozenset({CORE, "_database", "rotation", "keys"}),
}
"""The packages, bottom to top, each with those that it may import."""

ENTRY_POINTS: Final = frozenset({"__init__", "__main__", "cli"})
"""Modules of the top folder that name what is above the core, for users and for the shell."""

_WIDTH: Final = 92


class When(Enum):
    """What makes Python carry out an import."""

    IMPORT = "the module is imported"
    CALL = "a function is called"
    NEVER = "only a type checker reads it"


class Import(NamedTuple):
    """One module of the package imports another, or a name of it."""

    by: str
    module: str
    name: str | None
    when: When


def modules() -> dict[str, Path]:
    """Return the files by module name below the package: ``types``, ``rotation.rows``."""
    return {
        path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", "."): path
        for path in sorted(SOURCE.rglob("*.py"))
    }


def package_of(module: str) -> str:
    """Return the sub-package of `module`, or ``core``."""
    return module.partition(".")[0] if "." in module else CORE


def imports(files: Mapping[str, Path]) -> list[Import]:
    """Return every import of one of these modules by another."""
    return [
        found
        for module, path in files.items()
        for statement, when in _statements(ast.parse(path.read_text("utf-8")), When.IMPORT)
        for found in _resolved(statement, module, when, files)
    ]


def _statements(node: ast.AST, when: When) -> Iterator[tuple[ast.Import | ast.ImportFrom, When]]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield node, when
    elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        for statement in node.body:
            yield from _statements(statement, When.NEVER)
        for statement in node.orelse:
            yield from _statements(statement, when)
    else:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            when = When.CALL
        for child in ast.iter_child_nodes(node):
            yield from _statements(child, when)


def _resolved(
    statement: ast.Import | ast.ImportFrom, by: str, when: When, known: Collection[str]
) -> Iterator[Import]:
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            if alias.name.partition(".")[0] == SOURCE.name:
                yield Import(by, _file(alias.name.split(".")[1:], known), None, when)
        return
    parts = statement.module.split(".") if statement.module else []
    if statement.level:
        folder = [SOURCE.name, *by.split(".")[:-1]]
        parts = folder[: len(folder) + 1 - statement.level] + parts
    if parts[:1] != [SOURCE.name]:
        return
    for alias in statement.names:
        below = [*parts[1:], alias.name]
        if ".".join(below) in known or ".".join([*below, "__init__"]) in known:
            yield Import(by, _file(below, known), None, when)
        else:
            yield Import(by, _file(parts[1:], known), alias.name, when)


def _file(parts: list[str], known: Collection[str]) -> str:
    name = ".".join(parts)
    return name if name in known else ".".join([*parts, "__init__"])


def import_layers(found: Iterable[Import], members: Collection[str]) -> list[list[str]]:
    """Sort `members`, bottom to top, so that each imports only from the layers below its own.

    :raises graphlib.CycleError: modules import each other while they are being imported.
    """
    graph: dict[str, set[str]] = {member: set() for member in members}
    for each in found:
        if each.when is When.IMPORT and each.by in graph and each.module in graph:
            graph[each.by].add(each.module)
    sorter = TopologicalSorter(graph)
    sorter.prepare()
    layers = []
    while sorter.is_active():
        ready = sorter.get_ready()
        layers.append(sorted(ready))
        sorter.done(*ready)
    return layers


# -- The blocks of the page ------------------------------------------------------------------------


def tree() -> str:
    """Return the modules, each with the first sentence of its docstring."""
    files = modules()
    lines = [f"{SOURCE.name}/"]
    for package in BELOW:
        if package != CORE:
            lines.append(f"  {package}/")
        indent = "  " if package == CORE else "    "
        for module in _members(files, package):
            lines += _entry(indent + module.rpartition(".")[2], _purpose(files[module]))
    return "\n".join(lines) + "\n"


def picture() -> str:
    """Return what imports what: the packages, top to bottom, and the layers of the core."""
    files = modules()
    found = imports(files)
    lines = []
    for package in reversed(BELOW):
        if package == CORE:
            members = [m for m in _members(files, package) if m not in ENTRY_POINTS]
            layers = import_layers(found, members)
            lines += ["", "core, in layers: a module imports only from the layers below its own"]
            for number, layer in reversed(list(enumerate(layers, 1))):
                lines += _entry(f"  {number}", ", ".join(layer))
            continue
        below = {package_of(each.module) for each in found if package_of(each.by) == package}
        lines.append(
            f"{package} -> {', '.join(p for p in reversed(BELOW) if p in below - {package})}"
        )
    lines += ["", "core, when a function is called or a name is first used"]
    for module in _members(files, CORE):
        lines += _arrows(module, [each for each in found if each.when is not When.IMPORT])
    return "\n".join(lines) + "\n"


def _members(files: Mapping[str, Path], package: str) -> list[str]:
    """Return the modules of `package`, public ones first."""
    inside = [module for module in files if package_of(module) == package]
    return sorted(inside, key=lambda module: (module.rpartition(".")[2].startswith("_"), module))


def _arrows(module: str, found: Iterable[Import]) -> list[str]:
    """Return a line of the modules that `module` of the core imports, the core's own first."""
    names = {each.module for each in found if each.by == module}
    ordered = sorted(names, key=lambda name: (package_of(name) != CORE, name))
    text = ", ".join(name.removesuffix(".__init__") for name in ordered)
    return _entry(f"  {module}", text and f"-> {text}")


def _purpose(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split()).removesuffix("::")
    paragraph = re.sub(r":\w+:`[~!]?([^`]*)`", r"\1", paragraph).replace("`", "")
    return re.split(r"(?<=[.:])$|(?<=\.)\s+(?=[A-Z])", paragraph)[0].rstrip(".")


def _entry(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"{label:<20} ",
        subsequent_indent=" " * 21,
        break_on_hyphens=False,
    )


def render(page: str) -> str:
    """Return the text of `page` with both blocks as the code has them."""
    for name, block in (("modules", tree()), ("imports", picture())):
        page, count = re.subn(
            rf"(<!-- {name} -->\n```text\n).*?(```\n)",
            lambda fences, block=block: fences[1] + block + fences[2],  # type: ignore[misc]
            page,
            flags=re.DOTALL,
        )
        assert count == 1, f"{PAGE} has no block after <!-- {name} -->"
    return page


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text("utf-8")), "utf-8")
