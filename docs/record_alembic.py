"""
Run the story of ``alembic.md`` in a terminal, and record what its commands print.

    python docs/record_alembic.py            # writes the output into the page
    python docs/record_alembic.py --check    # fails if the page has something else

The page is the script, so that there is one of them: its files (blocks with a caption) are written
and its commands (lines with ``$`` in console blocks) are run, top to bottom, in an empty folder and
one shell.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).with_name("alembic.md")
FOLDER = "/srv/app"
"""What the page calls the folder that the commands are run in."""

BLOCK = re.compile(
    r"^```(?:console\n(?P<console>.*?)|\{code-block\} python\n:caption: (?P<name>\S+)\n\n"
    r"(?P<file>.*?))^```$",
    re.MULTILINE | re.DOTALL,
)
ALIKE = re.compile(
    r"^INFO  \[alembic\.runtime\.(?:migration\] (?:Context impl|Will assume)|plugins\]).*\n",
    re.MULTILINE,
)
"""The lines that Alembic logs for every command, which are left out."""

SEPARATOR = "\x1e"
SHELL = f"said() {{ printf '{SEPARATOR}'; }}\nset -o pipefail\n"


def commands(console: str) -> list[str]:
    return [line[2:] for line in console.splitlines() if line.startswith("$ ")]


def script(page: str) -> str:
    """The shell script that the page is."""
    lines = [SHELL]
    for block in BLOCK.finditer(page):
        if block["name"]:
            lines.append(f"cat > {block['name']} <<'END OF FILE'\n{block['file']}END OF FILE\n")
        lines += (f"said\n{command} || exit 1\n" for command in commands(block["console"] or ""))
    return "".join(lines)


def run(page: str, programs: Path) -> list[str]:
    """Run the page with the programs of a folder; return what each command printed."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LUCENT_", "DATABASE_URL", "PYTHON"))
    }
    folders = (str(programs), str(Path(sys.executable).parent), environ["PATH"])
    environ["PATH"] = os.pathsep.join(folders)
    environ["PYTHONPATH"] = str(PAGE.parents[1])
    environ["PYTHONUNBUFFERED"] = "1"  # for the order of what is printed and what is logged
    environ["PYTHONDONTWRITEBYTECODE"] = "1"  # files of the page are replaced within a second
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["bash", "-c", script(page)],
            cwd=folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            close_fds=False,  # the programs may have been handed something
        )
    output = done.stdout.replace(str(Path(folder).resolve()), FOLDER)
    if done.returncode:
        sys.exit(f"a command failed:\n{output.rpartition(SEPARATOR)[2]}")
    return [ALIKE.sub("", printed) for printed in output.split(SEPARATOR)[1:]]


def recorded(page: str, programs: Path) -> str:
    """Return `page` with what its commands print when they are run now."""
    printed = iter(run(page, programs))

    def renew(block: re.Match[str]) -> str:
        if block["console"] is None:
            return block.group()
        lines = [f"$ {command}\n{next(printed)}" for command in commands(block["console"])]
        return "```console\n" + "".join(lines) + "```"

    return BLOCK.sub(renew, page)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if the page differs"
    )
    parser.add_argument(
        "--programs",
        type=Path,
        default=Path(sys.executable).parent,
        help="a folder whose programs to prefer",
    )
    parser.add_argument("page", nargs="?", type=Path, default=PAGE)
    arguments = parser.parse_args()
    before = arguments.page.read_text("utf-8")
    after = recorded(before, arguments.programs)
    if not arguments.check:
        arguments.page.write_text(after, "utf-8")
    elif before != after:
        lines = difflib.unified_diff(
            before.splitlines(), after.splitlines(), "the page", "the commands", lineterm=""
        )
        sys.exit("\n".join(["run docs/record_alembic.py", *lines]))


if __name__ == "__main__":
    main()
