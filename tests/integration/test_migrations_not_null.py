"""The recipe of ``docs/encrypt-existing.md`` for a NOT NULL column in a table that has rows."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine
from sqlalchemy.exc import DatabaseError

from sqlalchemy_lucent import EncryptedJSON, verify
from tests.docs.pages import ROOT, blocks


def names_of_the_page() -> dict[str, Any]:
    names: dict[str, Any] = {}
    (block,) = (
        block
        for block in blocks(ROOT / "docs" / "encrypt-existing.md")
        if block.info == "python" and "fill_and_close" in block.text
    )
    exec(block.text, names)
    return names


def test_a_filled_table_gets_an_encrypted_column_that_is_not_null(engine: Engine) -> None:
    page = names_of_the_page()
    users: sa.Table = page["users"]
    old = sa.Table("users", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    old.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(old.insert(), [{"id": number} for number in range(1, 1502)])
        with Operations.context(MigrationContext.configure(connection)) as operations:
            operations.add_column("users", sa.Column("credentials", EncryptedJSON, nullable=True))
    given = {"id": 2000, "credentials": {"plan": "pro"}}
    with engine.begin() as connection:
        connection.execute(users.insert(), given)
    with engine.begin() as connection, Operations.context(MigrationContext.configure(connection)):
        page["fill_and_close"]()
    with engine.connect() as connection:
        rows = connection.execute(sa.select(users.c.id, users.c.credentials))
        found = {row.id: row.credentials for row in rows}
    assert found.pop(2000) == {"plan": "pro"}
    assert found == {number: {"plan": "free"} for number in range(1, 1502)}
    assert verify(engine, users).opened == 1502
    with pytest.raises(DatabaseError), engine.begin() as connection:
        connection.execute(users.insert().values(id=3000, credentials=sa.null()))
