"""What a batch reaches: rows of every key, none that others write, and none that hold it up."""

from __future__ import annotations

import enum
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Engine,
    Enum,
    Integer,
    MetaData,
    Table,
    Uuid,
    create_engine,
    event,
    insert,
    text,
)

from sqlalchemy_lucent import (
    EncryptedJSON,
    Keyring,
    RotationError,
    RotationProgress,
    retire_check,
    rotate,
    status,
    verify,
)
from tests.integration.test_rotation import counts, documents_table, fill

on_postgresql = pytest.mark.parametrize("url", ["postgresql"], indirect=True)
on_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


class Kind(enum.Enum):
    """Not in the order of its names."""

    zebra = 1
    mid = 2
    apple = 3


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_a_key_with_an_enum_is_gone_through_to_its_end(
    engine: Engine, promoted: Keyring, batch_size: int
) -> None:
    table = documents_table(
        Column("kind", Enum(Kind, name="kind"), primary_key=True),
        Column("id", Integer, primary_key=True, autoincrement=False),
    )
    table.metadata.create_all(engine)
    rows = [{"kind": k, "id": n, "payload": n} for k in Kind for n in range(400)]
    with engine.begin() as connection:
        connection.execute(insert(table), rows)
        # What does not open stays stale, and is in the way of what is behind it.
        damage = (
            "CAST(payload || X'00' AS BLOB)"
            if engine.dialect.name == "sqlite"
            else "concat(payload, 'x')"
        )
        if engine.dialect.name == "postgresql":
            damage = "payload || '\\x00'::bytea"
        connection.execute(text(f"UPDATE documents SET payload = {damage} WHERE kind = 'mid'"))
    first = verify(engine, table, keyring=promoted)
    assert (first.opened, first.failed_count) == (800, 400)
    report = rotate(engine, table, keyring=promoted, batch_size=batch_size)
    assert (report.rotated, report.failed_count, report.remaining) == (800, 400, 400)
    assert {failed.primary_key[0] for failed in report.failed} == {Kind.mid}


def test_looking_for_stale_rows_keeps_no_writer_waiting(engine: Engine, promoted: Keyring) -> None:
    table = documents_table()
    fill(engine, table, 30)
    impatient: dict[str, tuple[str, ...]] = {
        "sqlite": ("PRAGMA busy_timeout = 0",),
        "postgresql": ("SET lock_timeout = '1ms'",),
        "mysql": ("SET innodb_lock_wait_timeout = 1",),
    }
    writers = create_engine(engine.url)
    statements: list[str] = []
    written: list[int] = []

    @event.listens_for(engine, "before_cursor_execute")
    def write(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        # What a batch reaches is known by now, and its transaction is about to begin.
        before = "".join(statements[-2:])
        found = statement.startswith("BEGIN") and ("lucent" in before or " OFFSET " in before)
        statements.append(statement)
        if not found or written:
            return
        with writers.connect() as connection:
            for setting in impatient[engine.dialect.name]:
                connection.exec_driver_sql(setting)
            renewed = table.update().where(table.c.id == 0).values(payload={"by": "a writer"})
            written.append(connection.execute(renewed).rowcount)
            connection.commit()

    report = rotate(engine, table, keyring=promoted, batch_size=10)
    assert (report.ok, written) == (True, [1])
    writers.dispose()


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
def test_among_fresh_rows_one_may_stop_too(engine: Engine, promoted: Keyring) -> None:
    table = documents_table()
    fill(engine, table, 1000)
    rotate(engine, table, keyring=promoted)
    with engine.begin() as connection:
        connection.execute(table.update().where(table.c.id == 999).values(payload="stale"))
    asked: list[int] = []

    def is_enough(progress: RotationProgress) -> bool:
        asked.append(progress.rotated)
        return len(asked) == 2

    report = rotate(engine, table, keyring=promoted, batch_size=10, stop_when=is_enough)
    assert (report.stopped, report.rotated, report.remaining) == (True, 0, 1)
    # With time, a batch looks further where nothing is stale.
    asked.clear()
    told = rotate(engine, table, keyring=promoted, batch_size=10, on_progress=asked.append)  # type: ignore[arg-type]
    assert told.rotated == 1
    assert 2 < len(asked) < 15


@pytest.mark.parametrize("on_error", ["report", "raise"])
def test_a_row_that_the_database_refuses_is_named_and_passed_over(
    engine: Engine, promoted: Keyring, on_error: Any
) -> None:
    table = documents_table()
    fill(engine, table, 300)
    before_update = "CREATE TRIGGER refuse BEFORE UPDATE ON documents"
    refusals = {
        "sqlite": f"{before_update} WHEN OLD.id IN (5, 250) "
        "BEGIN SELECT RAISE(ABORT, 'not this one'); END",
        "postgresql": "ALTER TABLE documents ADD CONSTRAINT refuse "
        "CHECK (id NOT IN (5, 250) OR substr(payload, 1, 3) = 'v1:')",
        "mysql": f"{before_update} FOR EACH ROW IF OLD.id IN (5, 250) THEN "
        "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'not this one'; END IF",
    }
    with engine.begin() as connection:
        connection.exec_driver_sql(refusals[engine.dialect.name])
    if on_error == "raise":
        with pytest.raises(RotationError, match="the database ended the rotation"):
            rotate(engine, table, keyring=promoted, on_error=on_error)
        return
    report = rotate(engine, table, keyring=promoted)
    assert (report.ok, report.rotated, report.failed_count, report.remaining) == (False, 298, 2, 2)
    assert [failed.primary_key for failed in report.failed] == [(5,), (250,)]
    assert {failed.column for failed in report.failed} == {"payload"}
    assert all(failed.error.endswith("Error") for failed in report.failed)
    assert counts(engine, table) == {("payload", "v1"): 2, ("payload", "v2"): 298}


def test_who_refuses_every_row_ends_the_run(
    engine: Engine, promoted: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqlalchemy_lucent.rotation._run._MAX_REFUSED", 5)
    table = documents_table()
    fill(engine, table, 20)
    name = "refuse" if engine.dialect.name == "mysql" else "documents"
    rule = "substr(payload, 1, 3) = 'v1:'"
    statement = {
        "sqlite": "CREATE TRIGGER refuse BEFORE UPDATE ON documents "
        "BEGIN SELECT RAISE(ABORT, 'nobody'); END",
        "postgresql": f"ALTER TABLE {name} ADD CONSTRAINT refuse CHECK ({rule})",
        "mysql": f"ALTER TABLE documents ADD CONSTRAINT {name} CHECK ({rule})",
    }
    with engine.begin() as connection:
        connection.exec_driver_sql(statement[engine.dialect.name])
    with pytest.raises(RotationError, match=r"the database ended .* 0 values were re-encrypted"):
        rotate(engine, table, keyring=promoted)


@on_postgresql
def test_a_row_without_a_key_is_not_passed_over_in_silence(
    engine: Engine, promoted: Keyring
) -> None:
    table = documents_table(Column("id", Integer, primary_key=True, autoincrement=False))
    with engine.begin() as connection:
        # The model has a primary key that the table has not.
        connection.exec_driver_sql("CREATE TABLE documents (id int, payload bytea)")
        connection.execute(insert(table), [{"id": 1, "payload": 1}])
        connection.exec_driver_sql("INSERT INTO documents SELECT NULL, payload FROM documents")
    for work in (rotate, verify):
        with pytest.raises(RotationError, match="NULL in its primary key"):
            work(engine, table, keyring=promoted)


@on_postgresql
def test_row_level_security_is_seen_behind_any_name(engine: Engine, promoted: Keyring) -> None:
    sealed = EncryptedJSON(context="documents.payload")
    table = documents_table()
    fill(engine, table, 4)
    role = f"lucent_reader_{engine.url.database}"
    with engine.begin() as connection:
        for statement in (
            "ALTER TABLE documents ENABLE ROW LEVEL SECURITY",
            "CREATE POLICY few ON documents USING (id < 2)",
            f"CREATE ROLE {role} LOGIN",
            f"GRANT ALL ON documents TO {role}",
        ):
            connection.exec_driver_sql(statement)
    reader = create_engine(engine.url.set(username=role))
    try:
        for name, quote in (("documents", None), ("Documents", False)):
            hidden = Table(
                name,
                MetaData(),
                Column("id", Integer, primary_key=True),
                Column("payload", sealed),
                quote=quote,
            )
            for work in (
                lambda target: rotate(reader, target, keyring=promoted),
                lambda target: verify(reader, target, keyring=promoted),
                lambda target: status(reader, target),
                lambda target: retire_check(reader, "v1", target),
            ):
                with pytest.raises(RotationError, match="row-level security"):
                    work(hidden)
    finally:
        reader.dispose()
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {role}")
            connection.exec_driver_sql(f"DROP ROLE {role}")


@on_postgresql
def test_the_type_of_a_key_may_be_in_a_translated_schema(engine: Engine, promoted: Keyring) -> None:
    table = documents_table(
        Column("kind", Enum(Kind, name="kind"), primary_key=True),
        Column("id", Integer, primary_key=True, autoincrement=False),
    )
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA elsewhere")
    translated = engine.execution_options(schema_translate_map={None: "elsewhere"})
    try:
        table.metadata.create_all(translated)
        with translated.begin() as connection:
            connection.execute(insert(table), [{"kind": k, "id": 1, "payload": 1} for k in Kind])
        assert rotate(translated, table, keyring=promoted).rotated == 3
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP SCHEMA elsewhere CASCADE")


@on_sqlite
@pytest.mark.parametrize("work", [rotate, verify])
def test_a_key_that_its_type_cannot_read_is_told(
    engine: Engine, promoted: Keyring, work: Any
) -> None:
    table = documents_table(Column("id", Uuid, primary_key=True))
    table.metadata.create_all(engine)
    sealed = promoted.with_primary("v1").for_context("documents.payload").seal(b"1")
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO documents VALUES ('no uuid', :sealed)"), {"sealed": sealed}
        )
    with pytest.raises(RotationError, match=r"documents cannot be read .*primary key"):
        work(engine, table, keyring=promoted)
