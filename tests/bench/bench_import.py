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
`hazmat.primitives.ciphers.aead`. The package has an ORM model and so loads `sqlalchemy.orm`, which
`import sqlalchemy` alone does not: both are shown. The last row counts the modules of alembic,
rich, typer and pydantic that the import has loaded."""

ROOT = Path(__file__).parents[2]
STANDS_ON = {
    "sqlalchemy, aead": "import sqlalchemy, cryptography.hazmat.primitives.ciphers.aead",
    "sqlalchemy.orm, aead": "import sqlalchemy.orm, cryptography.hazmat.primitives.ciphers.aead",
}
OURS = "import sqlalchemy_lucent"
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
    imported(OURS)  # compiles what is not compiled yet
    taken: dict[str, list[float]] = {name: [] for name in (*STANDS_ON, "ours")}
    loaded = 0
    for _ in range(rounds):
        for name, statement in STANDS_ON.items():
            taken[name].append(imported(statement)[0])
        milliseconds, loaded = imported(OURS)
        taken["ours"].append(milliseconds)
    ours = taken.pop("ours")
    for name, theirs in taken.items():
        shared: dict[str, Any] = {
            "group": "import sqlalchemy_lucent",
            "ours": statistics.median(ours),
            "against": name,
            "reference": statistics.median(theirs),
            "unit": "ms",
        }
        pairs = list(zip(ours, theirs, strict=True))
        yield Figure(
            name="in all", ratio=statistics.median(mine / other for mine, other in pairs), **shared
        )
        yield Figure(
            name="added",
            ratio=statistics.median(mine - other for mine, other in pairs),
            goal=at_most(40),
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
