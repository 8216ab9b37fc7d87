"""The reading of a page, on which the other tests of this folder rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from .pages import Block, blocks, functions, links, named_tests

PAGE = """\
A [link](other.md#part) and code:

```python
print("[no](link.md)")
```

<!-- output -->
```text
[no](link.md)
```

:::{note}
1. inside

   ~~~python
   if True:
       pass
   ~~~
:::
"""


def test_blocks_are_found_with_their_lines_and_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert list(blocks(page)) == [
        Block("python", 'print("[no](link.md)")\n', 4, is_output=False),
        Block("text", "[no](link.md)\n", 9, is_output=True),
        Block("python", "if True:\n    pass\n", 16, is_output=False),
    ]


def test_a_link_in_code_is_no_link(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert list(links(page)) == ["other.md#part"]


def test_a_block_that_is_not_closed_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\npass\n")
    with pytest.raises(AssertionError, match="not closed"):
        list(blocks(page))


def test_a_block_with_a_caption_is_a_file(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```{code-block} python\n:caption: app.py\n\nprint()\n```\n"
        "```{code-block} python\nprint()\n```\n"
        "```text\n:caption: app.py\n```\n"
    )
    assert [block.file for block in blocks(page)] == [("app.py", "print()\n"), None, None]


def test_a_block_that_quotes_code_says_what(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- code: a/b.py::run -->\n```python\nrun\n```\n```python\nrun\n```\n")
    assert [block.quotes for block in blocks(page)] == [("a/b.py", "run"), None]


def test_tests_are_named_in_code_and_in_comments(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "In `tests/a.py`. <!-- test_one -->\n"
        "And: <!-- tests/b.py\n  test_two\n  test_three --> <!-- test_four --> <!-- output -->\n"
        "```text\n<!-- test_five -->\n```\n`tests/c.py::test_six`\n"
    )
    assert list(named_tests(page)) == [
        ("tests/a.py", None),
        ("tests/a.py", "test_one"),
        ("tests/b.py", "test_two"),
        ("tests/b.py", "test_three"),
        ("tests/b.py", "test_four"),
        ("tests/c.py", "test_six"),
    ]


def test_functions_and_methods_are_found_with_their_source(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("class A:\n    def f(self):\n        return 1\n\nasync def g(): ...\n")
    assert functions(file) == {
        "f": "def f(self):\n        return 1",
        "g": "async def g(): ...",
    }
