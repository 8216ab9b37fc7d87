"""What sealing and opening one value costs, through the functions that SQLAlchemy calls.

python -m tests.bench.bench_codec [--smoke]
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import orjson
import sqlalchemy_encrypted_field as encrypted_field
from advanced_alchemy.types import EncryptedText
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import Column, Dialect, Integer, MetaData, String, Table, create_engine
from sqlalchemy.types import TypeEngine

from sqlalchemy_lucent import Bound, EncryptedJSON, SerializationError, set_default_keyring
from tests.bench.documents import DOCUMENTS
from tests.bench.measure import KEYS, Figure, Turns, at_least, at_most, in_turns, run_alone

TITLE = "One value"
ABOUT = """\
A value is sealed and opened by the functions that SQLAlchemy calls for each parameter and each
result, without a database. *Bare* is a nonce, one `AESGCM` object and orjson, and nothing else.
The other libraries run on SQLite's dialect, where all of them work; those that store text get
`json.dumps`. The ratio to them says how many times quicker ours is. *Row-bound* is a value whose
context is made of the row's own columns. An *unusual part* is one that orjson would change, or that
the contract refuses."""

# A turn takes some milliseconds, so that a busy machine disturbs few of them.
VALUES_PER_TURN = {"small": 2000, "medium": 1000, "large": 8}
PEER_VALUES_PER_TURN = 300
DISTINCT = 100
UNUSUAL = {
    "sealed, with an integer past 64 bits": 2**70,
    "refused, for a NaN": float("nan"),
    "refused, for a tuple": (1,),
    "refused, for a lone surrogate": "\ud800",
}


class Processors(NamedTuple):
    """What writes a value, and what reads it."""

    seal: Callable[[Any], Any]
    open: Callable[[Any], Any]


def bare() -> Processors:
    aead, urandom = AESGCM(bytes(range(32))), os.urandom
    encrypt, decrypt, dumps, loads = aead.encrypt, aead.decrypt, orjson.dumps, orjson.loads

    def seal(value: Any) -> bytes:
        nonce = urandom(12)
        return nonce + encrypt(nonce, dumps(value), None)

    return Processors(seal, lambda data: loads(decrypt(data[:12], data[12:], None)))


def through(
    type_: TypeEngine[Any],
    dialect: Dialect,
    dumps: Callable[[Any], Any] | None = None,
    loads: Callable[[Any], Any] | None = None,
) -> Processors:
    """Return the processors of a column, after what a caller must do himself."""
    column: Column[Any] = Column("payload", type_)
    Table("documents", MetaData(), column, Column("id", Integer), Column("tenant", String))
    impl = column.type.dialect_impl(dialect)
    seal, open_ = impl.bind_processor(dialect), impl.result_processor(dialect, None)
    assert seal is not None
    assert open_ is not None
    return Processors(
        seal if dumps is None else lambda value: seal(dumps(value)),
        open_ if loads is None else lambda data: loads(open_(data)),
    )


def peers(dialect: Dialect) -> dict[str, Processors]:
    # Imported by name because it has no types.
    utils: Any = importlib.import_module("sqlalchemy_utils")
    engines: Any = importlib.import_module("sqlalchemy_utils.types.encrypted.encrypted_type")
    encrypted_field.configure(base64.b64encode(bytes(range(32))).decode())
    found = {
        f"sqlalchemy-utils {name}": through(
            utils.StringEncryptedType(utils.JSONType, "a key", engine, **options), dialect
        )
        for name, engine, options in (
            ("AesGcm", engines.AesGcmEngine, {}),
            ("Aes", engines.AesEngine, {"padding": "pkcs5"}),
            ("Fernet", engines.FernetEngine, {}),
        )
    }
    found["advanced-alchemy EncryptedText"] = through(
        EncryptedText(key="a key"), dialect, json.dumps, json.loads
    )
    # Opens a value when its content is first asked for.
    found["sqlalchemy-encrypted-field"] = through(
        encrypted_field.EncryptedJson(), dialect, loads=dict
    )
    return found


def in_thread(work: dict[str, Callable[[], object]], smoke: bool, rounds: int) -> Turns:
    return in_turns(work, 1 if smoke else rounds, clock=time.thread_time, collect=False, warm_up=3)


def each(process: Callable[[Any], Any], values: Sequence[Any]) -> Callable[[], object]:
    # Loops in C, and lets each result go at once.
    return lambda: deque(map(process, values), maxlen=0)


def turns_of(
    contenders: dict[str, Processors], what: str, size: str, smoke: bool, count: int
) -> Turns:
    """Seal or open `count` documents with each contender in turn."""
    documents = [DOCUMENTS[size](number) for number in range(min(count, DISTINCT))]
    work = {}
    for name, (seal, open_) in contenders.items():
        assert all(open_(seal(document)) == document for document in documents[:2]), name
        values = documents if what == "sealed" else [seal(document) for document in documents]
        repeated = [values[n % len(values)] for n in range(count)]
        work[name] = each(seal if what == "sealed" else open_, repeated)
    return in_thread(work, smoke, 21)


def row_bound(dialect: Dialect) -> Processors:
    """A value whose context is two columns of its row, which each value names anew."""
    type_ = EncryptedJSON(bound_to=["id", "tenant"])
    seal, open_ = through(type_, dialect)
    row = (4711, "tenant_00042")
    return Processors(lambda value: seal(Bound(value, row)), lambda data: open_(data).open(row=row))


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    dialect = create_engine("sqlite://").dialect
    ours = through(EncryptedJSON(), dialect)
    others = peers(dialect)
    for size, per_turn in VALUES_PER_TURN.items():
        for what in ("sealed", "opened"):
            count = 4 if smoke else per_turn
            contenders = {"bare": bare(), "ours": ours, "row-bound": row_bound(dialect)}
            turns = turns_of(contenders, what, size, smoke, count)
            yield turns.figure(f"A value, {size}", what, "ours", "bare", per=count)
            name = f"{what}, row-bound"
            yield turns.figure(f"A value, {size}", name, "row-bound", "ours", per=count)
    for size in ("small", "medium"):
        for what in ("sealed", "opened"):
            count = 4 if smoke else PEER_VALUES_PER_TURN
            turns = turns_of({"ours": ours, **others}, what, size, smoke, count)
            for name in others:
                yield quicker(turns, f"Beside other libraries, {size}", what, name, count)
    for size in DOCUMENTS:
        yield from unusual(ours.seal, size, smoke)


def quicker(turns: Turns, group: str, name: str, against: str, per: int) -> Figure:
    """Return a figure whose ratio says how many times quicker ours is."""
    figure = turns.figure(group, name, "ours", against, per=per)
    return replace(figure, ratio=turns.ratio(against, to="ours"), goal=at_least(4))


def unusual(seal: Callable[[Any], Any], size: str, smoke: bool) -> Iterator[Figure]:
    """Give documents whose last part is unusual, each beside one with an ordinary part there."""

    def try_to_seal(document: Any) -> None:
        with contextlib.suppress(SerializationError):
            seal(document)

    count = 4 if smoke else VALUES_PER_TURN[size]
    document = DOCUMENTS[size](0)
    work = {
        name: each(try_to_seal, [{"document": document, "part": part}] * count)
        for name, part in {"an ordinary part": 1, **UNUSUAL}.items()
    }
    turns = in_thread(work, smoke, 21)
    for name in UNUSUAL:
        yield turns.figure(
            f"An unusual part, {size}", name, name, "an ordinary part", per=count, goal=at_most(4)
        )


if __name__ == "__main__":
    run_alone(measure)
