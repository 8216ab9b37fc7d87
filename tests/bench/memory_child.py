"""One measurement of memory, in a process that does nothing else; prints JSON.

python -m tests.bench.memory_child select URL MODEL process|objects
python -m tests.bench.memory_child seal|open COUNT
"""

from __future__ import annotations

import gc
import json
import re
import sys
import tracemalloc
from collections import deque
from itertools import islice, repeat
from pathlib import Path
from typing import Literal

from sqlalchemy import create_engine

from sqlalchemy_lucent import EncryptedJSON, set_default_keyring
from tests.bench.documents import small
from tests.bench.measure import KEYS
from tests.bench.tables import MODELS, SyncDatabase, select_rows


def of_process(what: Literal["VmRSS", "VmHWM"]) -> int:
    """The bytes that the process has now, or had at its peak."""
    # Not getrusage(): its peak is handed down from the process that started this one.
    status = Path("/proc/self/status").read_text()
    (kibibytes,) = re.findall(rf"^{what}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kibibytes) << 10


def select(url: str, model: str, of: str) -> dict[str, int]:
    database = SyncDatabase(url)
    database.transaction(lambda connection: connection.exec_driver_sql("SELECT 1").all())
    gc.collect()
    if of == "objects":
        tracemalloc.start()
    before = of_process("VmRSS")
    rows = select_rows(database, MODELS[model])
    if of == "objects":
        _, peak = tracemalloc.get_traced_memory()
    else:
        peak = of_process("VmHWM") - before
    return {"bytes": peak, "rows": len(rows)}


def kept_by(what: str, count: int) -> dict[str, int]:
    type_ = EncryptedJSON(context="documents.payload").dialect_impl(
        create_engine("sqlite://").dialect
    )
    dialect = create_engine("sqlite://").dialect
    seal, open_ = type_.bind_processor(dialect), type_.result_processor(dialect, None)
    assert seal is not None
    assert open_ is not None
    process = seal if what == "seal" else open_
    value = small(0) if what == "seal" else seal(small(0))
    tracemalloc.start()
    kept = {}
    for name, more in (("after 1,000", 1000), ("at the end", count - 1000)):
        deque(map(process, islice(repeat(value), more)), maxlen=0)
        gc.collect()
        kept[name] = tracemalloc.get_traced_memory()[0]
    return kept


def main(what: str, *arguments: str) -> None:
    set_default_keyring(KEYS)
    if what == "select":
        url, model, of = arguments
        print(json.dumps(select(url, model, of)))
    else:
        print(json.dumps(kept_by(what, int(arguments[0]))))


if __name__ == "__main__":
    main(*sys.argv[1:])
