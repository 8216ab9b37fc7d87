"""The steps of ``docs/encrypt-existing.md`` without downtime, with old and new processes."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import sqlalchemy as sa
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, Table
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import sqlalchemy_lucent.migrations as lucent_migrations
from sqlalchemy_lucent import EncryptedJSON
from sqlalchemy_lucent.migrations import encrypt_column
from tests.docs.pages import ROOT, blocks
from tests.integration.test_migrations_autogenerate import comparators, migration_context

OLD = Table(
    "users",
    MetaData(),
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("settings", sa.JSON, nullable=False),
)


class Base(DeclarativeBase):
    pass


class Last(Base):
    """The model of the last step."""

    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    settings: Mapped[dict[str, Any]] = mapped_column(
        "settings_sealed", EncryptedJSON(context="users.settings", redact=False)
    )


def models_of_the_page() -> list[Any]:
    """The models of the second step and of the fourth, as they are printed."""
    names: dict[str, Any] = {"sa": sa, "__name__": __name__}
    found = []
    for block in blocks(ROOT / "docs" / "encrypt-existing.md"):
        if block.info == "python" and "_write_both" in block.text:
            exec(block.text, names)
            found.append(names["User"])
    return found


def fill(engine: Engine) -> None:
    with engine.connect() as connection:
        encrypt_column(
            "users",
            "settings",
            existing_type=sa.JSON(),
            through="settings_sealed",
            swap=False,
            operations=Operations(MigrationContext.configure(connection)),
        )


def write_old(engine: Engine, number: int, value: Any) -> None:
    with engine.begin() as connection:
        connection.execute(OLD.update().where(OLD.c.id == number).values(settings=value))


def write(engine: Engine, model: Any, number: int, value: Any) -> None:
    with Session(engine) as session:
        session.merge(model(id=number, settings=value))
        session.commit()


def read(engine: Engine, model: Any) -> dict[int, Any]:
    with Session(engine) as session:
        return {user.id: user.settings for user in session.scalars(sa.select(model))}


def autogenerate(engine: Engine) -> str:
    """Let autogenerate write a revision for the last model, run it, and return its code."""
    with engine.connect() as connection:
        context = migration_context(connection)
        script = produce_migrations(context, Base.metadata)
        assert script.upgrade_ops is not None
        code = render_python_code(
            script.upgrade_ops,
            render_as_batch=True,
            render_item=lucent_migrations.render_item,
            migration_context=context,
        )
    with engine.connect() as connection:
        context = migration_context(connection, transaction_per_migration=True)
        names = {"op": Operations(context), "sa": sa, "sqlite": sqlite}
        with context.begin_transaction(_per_migration=True):
            exec(dedent("    " + code), {**names, "mysql": mysql, "postgresql": postgresql})
    return code


@comparators
def test_no_write_of_any_process_is_lost(engine: Engine) -> None:
    second, fourth = models_of_the_page()
    expected: dict[int, Any] = {n: {"n": n} for n in range(1, 7)}
    OLD.metadata.create_all(engine)
    with engine.begin() as connection:
        rows = [{"id": n, "settings": value} for n, value in expected.items()]
        connection.execute(OLD.insert(), rows)

    fill(engine)  # step 1

    write(engine, second, 1, {"by": "step 2"})
    write(engine, second, 7, {"by": "step 2"})
    write_old(engine, 2, {"by": "an old process"})
    with engine.begin() as connection:
        connection.execute(OLD.insert().values(id=8, settings={"by": "an old process"}))
        bulk = sa.update(second).where(second.id == 3).values(settings={"by": "a bulk update"})
        connection.execute(bulk)
    expected |= {
        1: {"by": "step 2"},
        2: {"by": "an old process"},
        3: {"by": "a bulk update"},
        7: {"by": "step 2"},
        8: {"by": "an old process"},
    }
    assert read(engine, second) == expected
    assert read(engine, Last) != expected

    fill(engine)  # step 3
    assert read(engine, Last) == read(engine, second) == expected

    write(engine, fourth, 4, {"by": "step 4"})
    write(engine, second, 5, {"by": "step 2"})
    write(engine, fourth, 9, {"by": "step 4"})
    expected |= {4: {"by": "step 4"}, 5: {"by": "step 2"}, 9: {"by": "step 4"}}
    assert read(engine, fourth) == read(engine, second) == expected

    with engine.begin() as connection:  # step 5
        operations = Operations(MigrationContext.configure(connection))
        with operations.batch_alter_table("users") as batch:
            batch.alter_column("settings", existing_type=sa.JSON(), nullable=True)
    write(engine, Last, 6, {"by": "step 5"})
    first = autogenerate(engine)
    assert "drop_column('settings')" in first
    assert "nullable=False" in first
    if engine.dialect.name == "mysql":  # elsewhere, the column has the constraint from step 1 on
        assert "create_sealed_check('users', 'settings_sealed')" in autogenerate(engine)
    assert "op." not in autogenerate(engine)
    assert read(engine, Last) == expected | {6: {"by": "step 5"}}
