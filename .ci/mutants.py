"""Run mutmut, and hold what survives against ``.ci/mutants.toml``. Use it as ``make mutants``.

A mutant is known by its function and by the lines that it changes: mutmut's numbers move with
every edit. One that survives and is not listed fails the run, and so does an entry that no longer
survives. It begins anew each time; with ``--keep`` it goes on where it was stopped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
MUTMUT: Final = Path(sys.executable).with_name("mutmut")
# Killed, or stopped because it never came to an end, which no test can tell from being slow.
DEAD: Final = {"killed", "timeout"}

Mutant = tuple[str, str, str]
"""The function, the lines that are taken away, and those that stand there instead."""


def mutmut(*arguments: str) -> str:
    done = subprocess.run(
        [MUTMUT, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def flat(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def described(name: str) -> Mutant:
    diff = [line for line in mutmut("show", name).splitlines() if line[:3] not in ("---", "+++")]
    module, _, mangled = name.rpartition(".")
    function = re.sub(r"__mutmut_\d+$", "", mangled)
    # `x_name` is a function, `xǁClassǁname` a method.
    words = function.split("ǁ")[1:] or [function.removeprefix("x_")]
    return (
        ".".join((module.removeprefix("sqlalchemy_lucent."), *words)),
        flat([line[1:] for line in diff if line.startswith("-")]),
        flat([line[1:] for line in diff if line.startswith("+")]),
    )


def is_wording(mutant: Mutant) -> bool:
    """Say whether only the words of a sentence differ, or the case of a codec's name.

    No test asserts the wording of a message, and Python knows a codec in upper case too.
    """
    _, old, new = mutant
    strings = [re.findall(r"""([\"'])(.*?)\1""", side) for side in (old, new)]
    differing = [a[1] for a, b in zip(*strings, strict=False) if a != b]
    if not differing:
        return False
    if all(text in ("ascii", "latin-1", "utf-8") for text in differing):
        return old.lower() == new.lower()
    is_sentence = all(" " in text.strip() for text in differing)
    return is_sentence and old.lower() == new.replace("XX", "").lower()


def explained() -> set[Mutant]:
    entries = tomllib.loads((ROOT / ".ci/mutants.toml").read_text("utf-8"))["survivor"]
    for entry in entries:
        if not entry["why"].strip():
            sys.exit(f"{entry['function']}: an entry without a reason")
    return {(entry["function"], entry["old"], entry["new"]) for entry in entries}


def main() -> None:
    if "--keep" not in sys.argv:
        shutil.rmtree(ROOT / "mutants", ignore_errors=True)
    subprocess.run(
        [MUTMUT, "run", "--max-children", "2"],
        cwd=ROOT,
        env={**os.environ, "LUCENT_TEST_MUTANTS": "1"},
        check=True,
    )
    results = re.findall(r"^\s*(\S+__mutmut_\d+): (.+)$", mutmut("results"), re.MULTILINE)
    unchecked = [name for name, status in results if status == "not checked"]
    if unchecked:
        sys.exit(f"{len(unchecked)} mutants were not tried; run `make mutants` again")
    survivors = {described(name) for name, status in results if status not in DEAD}
    survivors = {mutant for mutant in survivors if not is_wording(mutant)}
    known = explained()
    for function, old, new in sorted(survivors - known):
        print(f"\n[[survivor]]\nfunction = {function!r}\nold = '''{old}'''\nnew = '''{new}'''")
    for function, old, new in sorted(known - survivors):
        print(f"\nno longer survives: {function}\n  - {old}\n  + {new}")
    if survivors != known:
        sys.exit(
            f"\n{len(survivors - known)} mutants survive unexplained and "
            f"{len(known - survivors)} entries of .ci/mutants.toml are stale"
        )
    print(f"{len(known)} mutants survive, each with its reason in .ci/mutants.toml")


if __name__ == "__main__":
    main()
