"""What sealing and opening one value costs, through the type's own processors.

python -m tests.bench.bench_codec [--smoke]
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import sqlalchemy_encrypted_field as encrypted_field
from advanced_alchemy.types import EncryptedText
from sqlalchemy import Column, Dialect, MetaData, Table, create_engine
from sqlalchemy.types import TypeEngine

from sqlalchemy_lucent import EncryptedJSON, SerializationError, set_default_keyring
from tests.bench.bare import (
    bare_open,
    bare_seal,
    floor_open,
    floor_seal,
    steps_of_opening,
    steps_of_sealing,
)
from tests.bench.documents import DOCUMENTS
from tests.bench.measure import KEYS, Figure, Turns, at_least, at_most, in_turns, run_alone

TITLE = "One value"
ABOUT = """\
A value is sealed and opened by the functions that SQLAlchemy calls for each parameter and each
result (`bind_processor`, `result_processor`), with no database behind them. *Bare* is
`os.urandom(12)`, one `AESGCM` object that is kept, orjson, and nothing else: no key id, no context,
no strictness, no keyring to be looked up. The small document is an API key of 67 bytes, the medium
one a service-account key of 2.2 kB, the large one 64 kB of nested settings. *Opened, redacted* is
the default; *opened, plain* is `EncryptedJSON(redact=False)`. The ratio to the other libraries
says how many times quicker ours is; they run on SQLite's dialect, where all of them work, and
those that store text are given it by `json.dumps`.

*Where the rest goes* adds to the bare, in one function, what the contract asks for; with all of it,
that is the floor. *Strict*:
orjson writes NaN as `null` and a tuple as a list, and reads an integer past 64 bits as a float,
so a document is vouched for by ormsgpack before it is written, and is read by msgspec. *Bound to
its column*: the header, the associated data, and the key's look-up by the header. What is left to
ours is Python itself: one function for each layer (type, codec, keyring, subkey) and the look-up
of the keyring."""

DIALECTS = {"SQLite": "sqlite://", "psycopg": "postgresql+psycopg://"}

# A turn takes some milliseconds: short enough for a busy machine to disturb few of them.
VALUES_PER_TURN = {"small": 2000, "medium": 1000, "large": 8}
PEER_VALUES_PER_TURN = 300
DISTINCT = 100


class Processors(NamedTuple):
    """What writes a value, and what reads it."""

    seal: Callable[[Any], Any]
    open: Callable[[Any], Any]


def through(
    type_: TypeEngine[Any],
    dialect: Dialect,
    dumps: Callable[[Any], Any] | None = None,
    loads: Callable[[Any], Any] | None = None,
) -> Processors:
    """Return the processors of a column of `type_`, behind what a caller must do himself."""
    column: Column[Any] = Column("payload", type_)
    Table("documents", MetaData(), column)
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
    # It opens a value when its content is first asked for.
    found["sqlalchemy-encrypted-field"] = through(
        encrypted_field.EncryptedJson(), dialect, loads=dict
    )
    return found


def each(process: Callable[[Any], Any], values: Sequence[Any]) -> Callable[[], object]:
    # Runs the loop in C, and lets each result go at once.
    return lambda: deque(map(process, values), maxlen=0)


def turns_of(
    contenders: dict[str, Processors], what: str, size: str, rounds: int, count: int
) -> tuple[Turns, float]:
    """Seal or open `count` documents with each contender in turn.

    Return the turns, and what makes microseconds per value of them.
    """
    documents = [DOCUMENTS[size](number) for number in range(min(count, DISTINCT))]
    work = {}
    for name, (seal, open_) in contenders.items():
        assert all(open_(seal(document)) == document for document in documents[:2]), name
        values = documents if what == "seal" else [seal(document) for document in documents]
        repeated = [values[n % len(values)] for n in range(count)]
        work[name] = each(seal if what == "seal" else open_, repeated)
    turns = in_turns(work, rounds, clock=time.thread_time, collect=False, warm_up=3)
    return turns, 1e6 / count


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    for dialect_name, url in DIALECTS.items():
        dialect = create_engine(url).dialect
        contenders = {
            "bare": Processors(bare_seal(), bare_open()),
            "floor": Processors(floor_seal(), floor_open(redacted=False)),
            "plain": through(EncryptedJSON(redact=False), dialect),
            "redacted": through(EncryptedJSON(), dialect),
        }
        for size in DOCUMENTS:
            yield from beside_bare(dialect_name, contenders, size, smoke)
    dialect = create_engine(DIALECTS["SQLite"]).dialect
    for size in DOCUMENTS:
        yield from where_the_rest_goes(dialect, size, smoke)
    for size in ("small", "medium"):
        yield from beside_peers(dialect, size, smoke)


def beside_bare(
    dialect: str, contenders: dict[str, Processors], size: str, smoke: bool
) -> Iterator[Figure]:
    rounds, count = (1, 4) if smoke else (41, VALUES_PER_TURN[size])
    figure = partial(Figure, group=f"{dialect}'s dialect, {size}", unit="µs")
    sealing = {name: contenders[name] for name in ("bare", "floor", "redacted")}
    turns, micro = turns_of(sealing, "seal", size, rounds, count)
    yield figure(
        name="sealed",
        ours=turns.median("redacted") * micro,
        against="bare",
        reference=turns.median("bare") * micro,
        ratio=turns.ratio("redacted", to="bare"),
        floor=turns.ratio("floor", to="bare"),
        goal=at_most(1.15),
    )
    turns, micro = turns_of(contenders, "open", size, rounds, count)
    for name, goal in (("plain", at_most(1.15)), ("redacted", None)):
        yield figure(
            name=f"opened, {name}",
            ours=turns.median(name) * micro,
            against="bare",
            reference=turns.median("bare") * micro,
            ratio=turns.ratio(name, to="bare"),
            floor=turns.ratio("floor", to="bare") if goal else None,
            goal=goal,
        )
    yield figure(
        name="share of the redaction",
        ours=turns.median("redacted") * micro,
        against="opened, plain",
        reference=turns.median("plain") * micro,
        ratio=turns.difference("redacted", to="plain") * micro,
        goal=at_most(0.25) if size == "small" else None,
        form="{:.2f} µs more",
    )


def where_the_rest_goes(dialect: Dialect, size: str, smoke: bool) -> Iterator[Figure]:
    rounds, count = (1, 4) if smoke else (41, VALUES_PER_TURN[size])
    seals, opens = steps_of_sealing(), steps_of_opening()
    contenders = {
        "bare": Processors(bare_seal(), bare_open()),
        **{name: Processors(seals[name], opens[name]) for name in seals},
        "ours": through(EncryptedJSON(redact=False), dialect),
    }
    for what, done in (("seal", "sealed"), ("open", "opened")):
        turns, micro = turns_of(contenders, what, size, rounds, count)
        for name in contenders:
            if name != "bare":
                yield Figure(
                    group=f"Where the rest goes, {size}",
                    name=f"{done}, {name}",
                    ours=turns.median(name) * micro,
                    against="bare",
                    reference=turns.median("bare") * micro,
                    unit="µs",
                    ratio=turns.ratio(name, to="bare"),
                )


UNUSUAL = {
    "sealed, with an integer past 64 bits": 2**70,
    "refused, for a NaN": float("nan"),
    "refused, for a tuple": (1,),
    "refused, for a lone surrogate": "\ud800",
}


def measure_unusual(smoke: bool = False) -> Iterator[Figure]:
    """Documents with an unusual part, each beside the same one with an ordinary part there."""
    set_default_keyring(KEYS)
    dialect = create_engine(DIALECTS["SQLite"]).dialect
    for size in DOCUMENTS:
        yield from unusual(dialect, size, smoke)


def unusual(dialect: Dialect, size: str, smoke: bool) -> Iterator[Figure]:
    """One part of a document, the last one, that orjson or the contract does not take."""
    seal = through(EncryptedJSON(), dialect).seal

    def try_to_seal(document: Any) -> None:
        with contextlib.suppress(SerializationError):
            seal(document)

    rounds, count = (1, 4) if smoke else (21, VALUES_PER_TURN[size])
    document = DOCUMENTS[size](0)
    work = {
        name: each(try_to_seal, [{"document": document, "part": part}] * count)
        for name, part in {"usual": 1, **UNUSUAL}.items()
    }
    turns = in_turns(work, rounds, clock=time.thread_time, collect=False, warm_up=3)
    for name in UNUSUAL:
        yield Figure(
            group=f"An unusual part, {size}",
            name=name,
            ours=turns.median(name) * 1e6 / count,
            against="an integer of 64 bits",
            reference=turns.median("usual") * 1e6 / count,
            unit="µs",
            ratio=turns.ratio(name, to="usual"),
            goal=at_most(4),
        )


def beside_peers(dialect: Dialect, size: str, smoke: bool) -> Iterator[Figure]:
    ours = {
        "ours": through(EncryptedJSON(), dialect),
        "floor": Processors(floor_seal(), floor_open()),
    }
    others = peers(dialect)
    rounds, count = (1, 4) if smoke else (21, PEER_VALUES_PER_TURN)
    for what, done in (("seal", "sealed"), ("open", "opened")):
        turns, micro = turns_of({**ours, **others}, what, size, rounds, count)
        for name in others:
            yield Figure(
                group=f"Beside other libraries, {size}",
                name=done,
                ours=turns.median("ours") * micro,
                against=name,
                reference=turns.median(name) * micro,
                unit="µs",
                ratio=turns.ratio(name, to="ours"),
                floor=turns.ratio(name, to="floor"),
                goal=at_least(6),
                form="{:.1f}",
            )


if __name__ == "__main__":
    run_alone(measure)
