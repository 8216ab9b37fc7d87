"""What ``import sqlalchemy_lucent`` adds to the imports that it stands on.

python -m tests.bench.bench_import [--smoke]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.measure import Figure, at_most, run_alone

TITLE = "Import"
ABOUT = """\
Each import is timed in a fresh process, in processor time, in turns. `aead` is cryptography's
`hazmat.primitives.ciphers.aead`. *The package* is what a Core table with an `EncryptedJSON` column
needs; the repository, the models and the rotation are imported at their first use, and need
`sqlalchemy.orm`: *every public name* loads them all. The last row counts the modules of alembic,
rich, typer and pydantic that every public name has loaded."""

ROOT = Path(__file__).parents[2]
AEAD = "cryptography.hazmat.primitives.ciphers.aead"
# What is measured: its name, what it stands on, the statement, and the goal.
CASES = (
    ("the package", "sqlalchemy, aead", "import sqlalchemy_lucent", at_most(40)),
    ("every public name", "sqlalchemy.orm, aead", "from sqlalchemy_lucent import *", None),
)
NOT_LOADED = ("alembic", "rich", "typer", "pydantic")

CHILD = """\
import json, sys, time
begin = time.process_time()
{statement}
seconds = time.process_time() - begin
loaded = sum(name.partition(".")[0] in {not_loaded!r} for name in sys.modules)
print(json.dumps([seconds, loaded]))
"""


def imported(statement: str) -> tuple[float, int]:
    """Return the milliseconds that `statement` took, and how many unwanted modules it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(statement=statement, not_loaded=NOT_LOADED)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, loaded = json.loads(done.stdout)
    return seconds * 1e3, loaded


def measure(smoke: bool = False) -> Iterator[Figure]:
    rounds = 1 if smoke else 21
    loaded = 0
    for what, against, statement, goal in CASES:
        stands_on = f"import {against.replace('aead', AEAD)}"
        imported(statement)  # compiles what is not compiled yet
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(rounds):
            theirs.append(imported(stands_on)[0])
            milliseconds, loaded = imported(f"{stands_on}\n{statement}")
            ours.append(milliseconds)
        pairs = list(zip(ours, theirs, strict=True))
        shared: dict[str, Any] = {
            "group": "import sqlalchemy_lucent",
            "ours": statistics.median(ours),
            "against": against,
            "reference": statistics.median(theirs),
            "unit": "ms",
        }
        yield Figure(
            name=f"{what}, in all",
            ratio=statistics.median(mine / other for mine, other in pairs),
            **shared,
        )
        yield Figure(
            name=f"{what}, added",
            ratio=statistics.median(mine - other for mine, other in pairs),
            goal=goal,
            form="{:.0f} ms more",
            **shared,
        )
    yield Figure(
        group="import sqlalchemy_lucent",
        name="unwanted modules",
        ours=loaded,
        against="none",
        reference=0,
        unit="",
        ratio=loaded,
        goal=at_most(0),
        form="{:.0f}",
    )


if __name__ == "__main__":
    run_alone(measure)
