"""Autogenerate looks at nothing that the environment's filters leave out, nor at views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import alembic
import pytest
from alembic.autogenerate import produce_migrations
from alembic.migration import MigrationContext
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    event,
    insert,
    text,
)

import sqlalchemy_lucent.migrations as lucent_migrations
from sqlalchemy_lucent import EncryptedJSON, Keyring, set_default_keyring

pytestmark = pytest.mark.skipif(
    tuple(map(int, alembic.__version__.split(".")[:2])) < (1, 18),
    reason="Alembic takes comparators of others from 1.18 on",
)

metadata = MetaData()
for name in ("users", "skipped"):
    Table(
        name,
        metadata,
        Column("id", Integer, primary_key=True),
        Column("payload", EncryptedJSON),
        Column("other", EncryptedJSON),
        Column("api_key", String(20)),
        info={"skip_autogenerate": name == "skipped"},
    )


@pytest.fixture
def filled(engine: Engine, promoted: Keyring) -> Engine:
    metadata.create_all(engine)
    with engine.begin() as connection:
        for table in metadata.tables.values():
            connection.execute(insert(table), [{"payload": 1, "other": 1}])
    set_default_keyring(promoted)
    return engine


def found(engine: Engine, target: MetaData, **options: Any) -> list[str]:
    """Return the columns that autogenerate would rotate."""
    with engine.connect() as connection:
        plugins = [lucent_migrations.PLUGIN_NAME, lucent_migrations.LINT_PLUGIN_NAME]
        context = MigrationContext.configure(
            connection,
            opts={"autogenerate_plugins": ["alembic.autogenerate.*", *plugins], **options},
        )
        operations = produce_migrations(context, target).upgrade_ops
        assert operations is not None
        return [
            f"{operation.table_name}.{operation.column_name}"
            for operation in operations.ops
            if isinstance(operation, lucent_migrations.RotateEncryptedColumnOp)
        ]


def skip(object_: Any, _name: Any, type_: str, *_rest: Any) -> bool:
    return not (type_ == "table" and object_.info.get("skip_autogenerate"))


FILTERS: dict[str, tuple[dict[str, Callable[..., bool]], list[str]]] = {
    "object": ({"include_object": skip}, ["users.payload", "users.other"]),
    "columns": (
        {"include_object": lambda _, name, type_, *__: type_ != "column" or name != "other"},
        ["skipped.payload", "users.payload"],
    ),
    "neither new nor dropped": (
        {"include_object": lambda *given: given[2] != "table" or given[4] is not None},
        ["skipped.payload", "skipped.other", "users.payload", "users.other"],
    ),
    "name": (
        {
            "include_name": lambda name, type_, _: type_ != "table" or name != "skipped",
            "include_object": skip,
        },
        ["users.payload", "users.other"],
    ),
}


@pytest.mark.parametrize("case", FILTERS)
def test_filters_are_asked_before_a_table_is_looked_at(
    filled: Engine, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    options, expected = FILTERS[case]
    looked_at: list[str] = []

    @event.listens_for(filled, "before_cursor_execute")
    def remember(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if "payload" in statement and "skipped" in statement:
            looked_at.append(statement)

    assert found(filled, metadata, **options) == expected
    is_skipped = "skipped.payload" not in expected
    assert bool(looked_at) != is_skipped
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("skipped.api_key" in line for line in warned) != is_skipped


def test_a_schema_that_is_not_included_is_not_looked_at(filled: Engine) -> None:
    if filled.dialect.name == "sqlite":
        pytest.skip("its schemas are other files")
    elsewhere = MetaData()
    Table(
        "users",
        elsewhere,
        Column("id", Integer, primary_key=True),
        Column("payload", EncryptedJSON),
        schema="nowhere",
    )
    for table in metadata.tables.values():
        table.to_metadata(elsewhere)

    def is_no_new_table(object_: Any, _name: Any, type_: str, *given: Any) -> bool:
        return type_ != "table" or object_.schema is None or given[1] is not None

    every = ["skipped.payload", "skipped.other", "users.payload", "users.other"]
    assert found(filled, elsewhere, include_object=is_no_new_table) == every


def test_a_view_is_not_looked_at(filled: Engine) -> None:
    models = MetaData()
    for table in metadata.tables.values():
        table.to_metadata(models)
    Table(
        "seen",
        models,
        Column("id", Integer, primary_key=True),
        Column("payload", EncryptedJSON(context="users.payload")),
        info={"is_view": True},
    )
    with filled.begin() as connection:
        connection.execute(text("CREATE VIEW seen AS SELECT id, payload FROM users WHERE id > 9"))
    try:
        every = ["skipped.payload", "skipped.other", "users.payload", "users.other"]
        assert found(filled, models, include_object=lambda *given: given[1] != "seen") == every

        # As is usual: Alembic would create it, because it compares no views.
        def is_no_new_view(object_: Any, *given: Any) -> bool:
            return not object_.info.get("is_view") or given[3] is not None

        assert found(filled, models, include_object=is_no_new_view) == every
    finally:
        with filled.begin() as connection:
            connection.execute(text("DROP VIEW seen"))
