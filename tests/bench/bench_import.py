"""What ``import sqlalchemy_lucent`` adds to its dependencies' imports.

python -m tests.bench.bench_import [--smoke]
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.bench.measure import Figure, Turns, run_alone

TITLE = "Import"
ABOUT = """\
Each import runs in a fresh process, in processor time, in turns. *The package* is what a Core table
with an `EncryptedJSON` column needs; *every public name* also loads the repository, the models and
the rotation. Beside each is the import of what it stands on: SQLAlchemy and cryptography."""

ROOT = Path(__file__).parents[2]
AEAD = "cryptography.hazmat.primitives.ciphers.aead"
CASES = {
    "the package": ("sqlalchemy", "import sqlalchemy_lucent"),
    "every public name": ("sqlalchemy.orm", "from sqlalchemy_lucent import *"),
}

CHILD = """\
import time
begin = time.process_time()
{statement}
print(time.process_time() - begin)
"""


def imported(statement: str) -> float:
    """Return the seconds that `statement` took."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(statement=statement)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def measure(smoke: bool = False) -> Iterator[Figure]:
    for what, (against, statement) in CASES.items():
        stands_on = f"import {against}, {AEAD}"
        imported(statement)  # compiles what is not compiled yet
        pairs = [
            (imported(f"{stands_on}\n{statement}"), imported(stands_on))
            for _ in range(1 if smoke else 21)
        ]
        ours, theirs = zip(*pairs, strict=True)
        turns = Turns({"ours": ours, against: theirs})
        yield turns.figure("import", what, "ours", against, per=1)


if __name__ == "__main__":
    run_alone(measure)
