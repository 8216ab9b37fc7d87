"""The CHECK constraint of a sealed column in a database: found, added, dropped."""

from __future__ import annotations

import logging
import re
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from alembic.operations import BatchOperations, Operations
from sqlalchemy.engine.interfaces import ReflectedCheckConstraint
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import AddConstraint, conv
from sqlalchemy.types import TypeEngine

from .. import _sql
from .._database.reflection import dotted, reflect_columns
from .._database.relations import is_binary
from .._database.visibility import require_full_visibility
from ..exceptions import RotationError
from ..types import EncryptedJSON
from ._sqlite import copied_table

logger = logging.getLogger("alembic.runtime.migration.lucent")


class SealedCheck(NamedTuple):
    """The constraint of one column."""

    operations: Operations
    table_name: str
    column_name: str
    schema: str | None

    @property
    def full_name(self) -> str:
        """The column's name with its table and schema."""
        return dotted(self.schema, self.table_name, self.column_name)

    def find(self) -> ReflectedCheckConstraint | None:
        """Return the constraint that the database has."""
        connection = self.operations.get_bind()
        return find_check(sa.inspect(connection), self.table_name, self.column_name, self.schema)

    def declared(self, *, validated: bool = True) -> sa.CheckConstraint:
        """Return the constraint that a new table would have, named by the target's convention.

        :param validated: ``False`` has PostgreSQL add it without reading the rows.
        """
        column: sa.Column[Any] = sa.Column(self.column_name, EncryptedJSON())
        table = self.operations.schema_obj.table(self.table_name, column, schema=self.schema)
        (check,) = (c for c in table.constraints if isinstance(c, sa.CheckConstraint))
        # Its name is final, also in a batch, which copies the table under another name.
        preparer = self.operations.get_context().dialect.identifier_preparer
        check.name = conv(str(preparer.format_constraint(check, _alembic_quote=False)))
        check.dialect_options["postgresql"]["not_valid"] = not validated
        return check

    def create(self) -> None:
        """Add the constraint where it is missing, over a connection in AUTOCOMMIT mode.

        :raises RotationError: there are values that it would refuse; nothing was written.
        """
        connection = self.operations.get_bind()
        columns = reflect_columns(connection, self.table_name, self.schema, [self.column_name])
        type_ = columns[self.column_name]["type"]
        if not is_binary(type_):
            raise not_encrypted(self.full_name, type_)
        found = self.find()
        adds_unread = _sql.is_mariadb(connection.dialect)
        is_valid = found and not found.get("dialect_options", {}).get("not_valid")
        if not is_valid or adds_unread:  # an earlier run may have been killed before it counted
            self._refuse_unsealed(connection)
        if is_valid:
            return
        try:
            self._add(connection, found)
        except DBAPIError as error:
            fault = type(error.orig).__name__
        else:
            if adds_unread:
                self._keep_if_sealed(connection)
            logger.info("%s refuses values that are not sealed from now on", self.full_name)
            return
        self._keep_if_sealed(connection)
        raise RotationError(
            f"the database refused the CHECK constraint of {self.full_name}: {fault}. Run it again "
            "to go on"
        )

    def _add(self, connection: sa.Connection, found: ReflectedCheckConstraint | None) -> None:
        # PostgreSQL reads the rows afterwards, under a lock that lets others write.
        check = self.declared(validated=False)
        name = conv(str(check.name))
        dialect = connection.dialect
        if dialect.name == "sqlite":
            with self._copied() as batch:
                batch.create_check_constraint(name, condition_of(self.column_name, dialect))
            return
        preparer = dialect.identifier_preparer
        table = preparer.format_table(check.table)
        if found is None:
            change = f"ALTER TABLE {table} {added(check, dialect)}"
            connection.exec_driver_sql(without_reading(change, dialect))
        if dialect.name == "postgresql":
            quoted = preparer.quote(str(found["name"]) if found else name)
            connection.exec_driver_sql(f"ALTER TABLE {table} VALIDATE CONSTRAINT {quoted}")

    def _keep_if_sealed(self, connection: sa.Connection) -> None:
        """Drop the constraint again if plaintext was written since the first look.

        MariaDB has not read it, and PostgreSQL keeps a constraint that it could not validate. Both
        would refuse updates of these rows.
        """
        try:
            self._refuse_unsealed(connection)
        except RotationError:
            self.drop()
            raise

    def drop(self) -> None:
        """Drop the constraint if there is one, over a connection in AUTOCOMMIT mode."""
        found = self.find()
        if found is None or found["name"] is None:
            return
        name = conv(found["name"])
        if self.operations.get_bind().dialect.name == "sqlite":
            with self._copied(loses="CHECK") as batch:
                batch.drop_constraint(name, type_="check")
        else:
            self.operations.drop_constraint(
                name, self.table_name, type_="check", schema=self.schema
            )

    def _copied(self, loses: str | None = None) -> AbstractContextManager[BatchOperations]:
        """Give a batch that changes a SQLite table by a copy, which may lack only `loses`."""
        return copied_table(
            self.operations,
            self.table_name,
            self.schema,
            because=f"SQLite changes the CHECK constraints of {self.table_name}",
            instead="Nothing was changed. Copy the table in a revision of your own, or pass "
            "create_constraint=False to the column's type",
            loses=loses,
        )

    def _refuse_unsealed(self, connection: sa.Connection) -> None:
        require_full_visibility(connection, self.table_name, self.schema)
        value: sa.ColumnElement[Any] = sa.column(self.column_name)
        count = connection.scalar(
            sa.select(sa.func.count())
            .select_from(sa.table(self.table_name, schema=self.schema))
            .where(value.is_not(None), _sql.key_version(value).is_(None))
        )
        if count:
            raise RotationError(
                f"{count} values of {self.full_name} are not sealed, so the column cannot have a "
                "CHECK constraint that refuses such values. Nothing was changed. verify() names "
                "their rows; op.encrypt_column() seals a column that holds plaintext"
            )


_SIGNATURE: Final = re.compile(
    r"3A01\b.*\[\^A-Za-z0-9|\{1,32\}:\\+u0001", re.IGNORECASE | re.DOTALL
)
"""What only :class:`._sql.is_sealed` has, as each database writes it."""


def find_check(
    inspector: sa.Inspector,
    table_name: str,
    column_name: str,
    schema: str | None,
    signature: re.Pattern[str] = _SIGNATURE,
) -> ReflectedCheckConstraint | None:
    """Find a constraint by its condition, since a renamed table or column keeps its name."""
    written = "|".join(re.escape(column_name.replace(quote, 2 * quote)) for quote in '"`')
    own = re.compile(rf"(?<!\w)(?:{written})(?!\w)")
    for check in inspector.get_check_constraints(table_name, schema=schema):
        if signature.search(check["sqltext"]) and own.search(check["sqltext"]):
            return check
    return None


def added(check: sa.CheckConstraint, dialect: sa.Dialect) -> str:
    """Return the clause of an ALTER TABLE that adds a constraint."""
    compiled: Any = AddConstraint(check).compile(dialect=dialect)
    return f"ADD {compiled.process(check)}"


def without_reading(change: str, dialect: sa.Dialect) -> str:
    """Return an ALTER TABLE for which MariaDB copies the table without checking a new constraint.

    That takes a third less. The caller counts the rows that do not meet the constraint.
    """
    if _sql.is_mariadb(dialect):
        return f"SET STATEMENT check_constraint_checks = 0 FOR {change}"
    return change


def condition_of(column_name: str, dialect: sa.Dialect) -> sa.TextClause:
    """Return the condition of the constraint, for a column that is in no table."""
    return sa.text(str(_sql.is_sealed(sa.column(column_name)).compile(dialect=dialect)))


def not_encrypted(name: str, type_: TypeEngine[Any]) -> RotationError:
    """Return the error of a column that cannot hold sealed values."""
    return RotationError(
        f"{name} is a column of the type {type(type_).__name__}, and not an encrypted one; "
        "op.encrypt_column() makes it one"
    )
