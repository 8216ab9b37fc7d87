"""The pages of the documentation, and the fenced blocks, links and test names in them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

OUTPUT_MARK: Final = "<!-- output -->"
"""Stands on a line of its own before the ``text`` block that the block above it must print."""

# Before a block that quotes a function: the block is compared with the source, not run.
_QUOTE_MARK: Final = re.compile(r"<!-- code: (?P<path>\S+\.py)::(?P<name>\w+) -->")

# Not the colons of an admonition: what is inside one is read like everything else.
_FENCE: Final = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>.*)$")
_CAPTION: Final = ":caption: "
_LINK: Final = re.compile(r"\]\((?P<target>[^()\s]+)\)")
_TEST_FILE: Final = r"tests/[\w/]+\.py"
_TEST: Final = re.compile(
    rf"`(?P<path>{_TEST_FILE})(?:::(?P<name>\w+))?`"
    rf"|<!--\s+(?:(?P<of>{_TEST_FILE})\s+)?(?P<names>test_\w+(?:\s+test_\w+)*)\s+-->"
)


@dataclass(frozen=True)
class Block:
    """A fenced block: `line` is the number of its first line of content in the page."""

    info: str
    text: str
    line: int
    is_output: bool
    quotes: tuple[str, str] | None = None
    """The path and the function that it quotes."""

    @property
    def file(self) -> tuple[str, str] | None:
        """The name and the text of the file that a ``{code-block}`` with a caption is."""
        if not self.info.startswith("{code-block}") or not self.text.startswith(_CAPTION):
            return None
        caption, _, text = self.text.partition("\n")
        return caption.removeprefix(_CAPTION), text.removeprefix("\n")


def relative(page: Path) -> str:
    """Return the path of `page` in the repository, which is how tests and messages call it."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    """Give the fenced blocks of `page`, top to bottom."""
    lines = page.read_text("utf-8").splitlines()
    previous = ""
    number = 0
    while number < len(lines):
        opening = _FENCE.match(lines[number])
        number += 1
        if opening is None:
            previous = lines[number - 1].strip() or previous
            continue
        indent, fence = opening["indent"], opening["fence"]
        start = number
        while number < len(lines) and not (
            lines[number].strip().startswith(fence) and not lines[number].strip().strip(fence[0])
        ):
            number += 1
        assert number < len(lines), f"{page}:{start}: the block is not closed"
        text = "".join(line.removeprefix(indent) + "\n" for line in lines[start:number])
        quote = _QUOTE_MARK.fullmatch(previous)
        quotes = (quote["path"], quote["name"]) if quote else None
        yield Block(opening["info"].strip(), text, start + 1, previous == OUTPUT_MARK, quotes)
        number += 1
        previous = ""


def prose(page: Path) -> str:
    """Return `page` without the contents of its fenced blocks."""
    lines = page.read_text("utf-8").splitlines()
    for block in blocks(page):
        for number in range(block.line, block.line + block.text.count("\n")):
            lines[number - 1] = ""
    return "\n".join(lines)


def links(page: Path) -> Iterator[str]:
    """Give the targets of the links and images in `page`."""
    for match in _LINK.finditer(prose(page)):
        yield match["target"]


def named_tests(page: Path) -> Iterator[tuple[str, str | None]]:
    """Give the tests that `page` names in code or in comments, as path and function.

    A comment without a path names tests of the file that the page named last.
    """
    path = ""
    for match in _TEST.finditer(prose(page)):
        path = match["path"] or match["of"] or path
        if match["names"] is None:
            yield path, match["name"]
        else:
            yield from ((path, name) for name in match["names"].split())


@cache
def functions(file: Path) -> dict[str, str]:
    """Return the source lines of every function and method in `file`, by name."""
    source = file.read_text("utf-8")
    lines = source.splitlines()
    return {
        node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno])[node.col_offset :]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
