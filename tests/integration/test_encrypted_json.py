"""EncryptedJSON over real databases: every size, every driver, and what is not ours."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    create_engine,
    func,
    insert,
    inspect,
    literal,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.ext.asyncio import AsyncEngine

from sqlalchemy_lucent import (
    EncryptedJSON,
    Keyring,
    NotSealedError,
    SerializationError,
    TamperedError,
    UnknownKeyVersionError,
    WrongKeyError,
    set_default_keyring,
)
from tests.conftest import KEY_2
from tests.databases import create_unguarded
from tests.strategies import TEXT

SIZES = (2, 100, 4_096, 65_535, 65_536, 1_000_000, 5_000_000)

metadata = MetaData()
documents = Table(
    "documents",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("data", EncryptedJSON),
    Column("other", EncryptedJSON),
)
stored = type_coerce(documents.c.data, LargeBinary()).label("stored")


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    metadata.create_all(engine)
    with engine.connect() as connection:
        yield connection


@pytest.fixture
def unguarded(engine: Engine) -> Iterator[Connection]:
    create_unguarded(metadata, engine)
    with engine.connect() as connection:
        yield connection


def document_of(size: int) -> dict[str, Any]:
    """A document whose compact JSON has `size` bytes."""
    return {} if size == 2 else {"k": "é" * ((size - 8) // 2) + "x" * (size % 2)}


def put(connection: Connection, value: Any, id_: int = 1) -> None:
    connection.execute(insert(documents), {"id": id_, "data": value})


def put_raw(connection: Connection, value: bytes | str | float, id_: int = 1) -> None:
    connection.execute(
        text("INSERT INTO documents (id, data) VALUES (:id, :data)"), {"id": id_, "data": value}
    )


def get(connection: Connection, id_: int = 1) -> Any:
    return connection.scalar(select(documents.c.data).where(documents.c.id == id_))


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_documents_of_2_bytes_to_5_megabytes_come_back_equal(
    connection: Connection, size: int
) -> None:
    document = document_of(size)
    assert len(json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()) == size
    put(connection, document)
    assert get(connection) == document
    assert connection.scalar(select(func.length(stored))) == len("v1:") + 5 + 12 + size + 16


def test_documents_of_2_bytes_to_5_megabytes_come_back_equal_from_async_drivers(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[Any]]], Any],
) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        for id_, size in enumerate(SIZES, 1):
            async with engine.begin() as connection:
                await connection.execute(
                    insert(documents), {"id": id_, "data": document_of(size), "other": None}
                )
        async with engine.connect() as connection:
            for id_, size in enumerate(SIZES, 1):
                row = (await connection.execute(select(documents).filter_by(id=id_))).one()
                assert row.data == document_of(size)
                assert row.other is None

    run_async(work)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**40), max_value=10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda children: st.lists(children, max_size=5) | st.dictionaries(TEXT, children, max_size=5),
    max_leaves=20,
)


def same_with_types(left: Any, right: Any) -> bool:
    """Equal, of the same JSON types at every level, with keys in the same order."""
    if isinstance(left, dict):
        return (
            isinstance(right, dict)
            and list(left) == list(right)
            and all(same_with_types(left[key], right[key]) for key in left)
        )
    if isinstance(left, list):
        return (
            isinstance(right, list)
            and len(left) == len(right)
            and all(map(same_with_types, left, right))
        )
    if isinstance(left, str):
        return isinstance(right, str) and left.__eq__(right) is True
    if isinstance(left, float):
        return isinstance(right, float) and left.hex() == right.hex()
    return type(left) is type(right) and left == right


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=json_values)
def test_every_json_value_comes_back_equal_with_its_types_and_key_order(
    connection: Connection, value: Any
) -> None:
    put(connection, value)
    opened = get(connection)
    connection.rollback()
    assert same_with_types(value, opened)


def test_integers_of_any_size_and_every_bit_of_a_float_survive(connection: Connection) -> None:
    value = [2**63, -(2**64), 10**4000, 0.1 + 0.2, 5e-324, -0.0, 1.7976931348623157e308, 1e22]
    put(connection, value)
    assert same_with_types(value, get(connection))


@pytest.mark.parametrize("data", [{"a": float("nan")}, {"a": b"x"}, {1: "a"}, ["\ud800"]])
def test_a_refused_value_leaves_no_row(connection: Connection, data: Any) -> None:
    with pytest.raises(SerializationError):
        put(connection, data)
    assert connection.scalar(select(func.count()).select_from(documents)) == 0


def test_the_same_value_is_sealed_into_different_bytes_each_time(connection: Connection) -> None:
    for id_ in range(1, 51):
        put(connection, {"a": 1}, id_)
    assert len(set(connection.scalars(select(stored)))) == 50


def test_the_column_is_of_a_binary_type_that_takes_more_than_64_kilobytes(engine: Engine) -> None:
    metadata.create_all(engine)
    (column,) = (c for c in inspect(engine).get_columns("documents") if c["name"] == "data")
    assert str(column["type"]) == {"sqlite": "BLOB", "postgresql": "BYTEA"}.get(
        engine.dialect.name, "LONGBLOB"
    )


# -- keys ------------------------------------------------------------------------------------------


def test_the_keyring_is_looked_up_at_each_use(
    connection: Connection, keyring: Keyring, promoted: Keyring
) -> None:
    put(connection, "old", 1)
    set_default_keyring(promoted)
    put(connection, "new", 2)
    assert [get(connection, 1), get(connection, 2)] == ["old", "new"]
    versions = select(documents.c.data.key_version).order_by(documents.c.id)
    assert connection.scalars(versions).all() == ["v1", "v2"]
    set_default_keyring(keyring)
    with pytest.raises(UnknownKeyVersionError, match=r"'v2'.*'v1'"):
        get(connection, 2)


def test_another_key_under_the_same_version_is_told_from_tampering(
    connection: Connection, keyring: Keyring
) -> None:
    put(connection, "secret")
    other = Keyring({"v1": KEY_2})
    set_default_keyring(other)
    with pytest.raises(WrongKeyError) as caught:
        get(connection)
    assert keyring.fingerprint("v1") in str(caught.value)
    assert other.fingerprint("v1") in str(caught.value)


def test_a_changed_byte_does_not_open(connection: Connection) -> None:
    put(connection, {"a": 1})
    data = connection.scalar(select(stored))
    assert data is not None
    changed = data[:-1] + bytes([data[-1] ^ 1])
    connection.execute(update(documents).values(data=literal(changed)))
    with pytest.raises(TamperedError):
        get(connection)


def test_bytes_copied_to_another_column_do_not_open(connection: Connection) -> None:
    put(connection, {"a": 1})
    connection.execute(text("UPDATE documents SET other = data"))
    with pytest.raises(TamperedError):
        connection.scalar(select(documents.c.other))


# -- what is not ours ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "foreign, shape",
    [
        (b'{"token": "MARKER"}', "shape of JSON text"),
        (b'[ "MARKER" ]', "shape of JSON text"),
        (b"gAAAAABkMARKERMARKERMARKERMARKERMARKERMARKERMARKERMARKER==", "shape of a Fernet token"),
        (b"MARKER", "ASCII text"),
        (b"\x00\x01MARKER\xff", "binary"),
        (b"", "0 bytes"),
        (b"v1:", "ASCII text"),
    ],
)
def test_foreign_bytes_are_named_by_shape_and_never_returned(
    unguarded: Connection, foreign: bytes, shape: str
) -> None:
    put_raw(unguarded, foreign)
    with pytest.raises(NotSealedError, match=shape) as caught:
        get(unguarded)
    assert "MARKER" not in str(caught.value)
    assert "documents.data" in str(caught.value)
    assert "migration" in str(caught.value)
    assert unguarded.scalars(select(documents.c.data.key_version)).all() == [None]


@pytest.mark.parametrize("foreign", ['{"token": "MARKER"}', "MARKER é", 5, 4.5, -1])
def test_text_and_numbers_that_sqlite_keeps_in_a_binary_column_are_not_sealed(
    foreign: str | float,
) -> None:
    engine = create_engine("sqlite://")
    create_unguarded(metadata, engine)
    with engine.connect() as connection:
        put_raw(connection, foreign)
        with pytest.raises(NotSealedError) as caught:
            get(connection)
        assert "MARKER" not in str(caught.value)
    engine.dispose()
