"""The reading of a page, on which the other tests of this folder rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from .pages import Block, blocks, links

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
