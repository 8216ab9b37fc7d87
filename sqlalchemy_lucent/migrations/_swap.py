"""Let the second column take the first one's name, under a lock of the table, per database."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from alembic.operations import Operations
from sqlalchemy import Column, Connection, Dialect, LargeBinary, MetaData, Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateTable

from .._database.connection import ManagedConnection
from .._sql import is_mysql
from ._checks import SealedCheck, added, without_reading
from ._sqlite import copied_table, without_foreign_keys
from .operations import ConvertColumnOp


class Swap:
    """The last step of a conversion.

    :param columns: the table's columns by name, as SQLAlchemy's inspector describes them.
    """

    def __init__(
        self, operations: Operations, plan: ConvertColumnOp, columns: Mapping[str, Any]
    ) -> None:
        self._operations = operations
        self._plan = plan
        self._columns = columns
        self._is_nullable: bool = columns[plan.column_name]["nullable"]
        self._connection: Connection = operations.get_bind()
        self._dialect: Dialect = self._connection.dialect
        preparer = self._dialect.identifier_preparer
        self._quote: Callable[[str], str] = preparer.quote
        self._table = preparer.format_table(Table(plan.table_name, MetaData(), schema=plan.schema))

    @contextmanager
    def locked(self, database: ManagedConnection) -> Iterator[None]:
        """Keep all writers out.

        The block is one transaction, except on MariaDB and MySQL, where each statement is one.
        """
        connection = database.connection
        if is_mysql(self._dialect):
            connection.exec_driver_sql(f"LOCK TABLES {self._table} WRITE")
            try:
                yield
            finally:
                if not connection.invalidated:
                    connection.exec_driver_sql("UNLOCK TABLES")
            return
        with without_foreign_keys(connection), database.transaction():
            if self._dialect.name == "postgresql":
                connection.exec_driver_sql(f"LOCK TABLE {self._table} IN ACCESS EXCLUSIVE MODE")
            yield

    def exchange(self) -> None:
        """Exchange the names of the columns, or drop the first; move NOT NULL and the CHECK."""
        if self._dialect.name == "sqlite":
            self._exchange_on_sqlite()
            return
        # PostgreSQL renames a column in its constraint; MariaDB and MySQL do not.
        if not self._plan.to_sealed:
            self._check(self._plan.column_name).drop()
        elif is_mysql(self._dialect):
            self._check(self._plan.second).drop()
        if self._dialect.name == "postgresql":
            self._exchange_on_postgresql()
        else:
            self._exchange_on_mysql()

    def drop_column(self, name: str) -> None:
        """Drop a column, with its CHECK constraint."""
        try:
            self._alter(f"DROP COLUMN {self._quote(name)}")
        except DBAPIError:
            # SQLite: a constraint of the table, as batch mode makes it, keeps the column.
            check = self._check(name)
            if self._dialect.name != "sqlite" or check.find() is None:
                raise
            check.drop()
            self._alter(f"DROP COLUMN {self._quote(name)}")

    def _check(self, name: str) -> SealedCheck:
        return SealedCheck(self._operations, self._plan.table_name, name, self._plan.schema)

    def _alter(self, change: str) -> None:
        self._connection.exec_driver_sql(f"ALTER TABLE {self._table} {change}")

    def _rename(self, old: str, new: str) -> None:
        self._alter(f"RENAME COLUMN {self._quote(old)} TO {self._quote(new)}")

    def _rename_columns(self) -> None:
        plan = self._plan
        if plan.drop:
            self.drop_column(plan.column_name)
            self._rename(plan.second, plan.column_name)
        else:
            aside = f"{plan.column_name}__aside"
            self._rename(plan.column_name, aside)
            self._rename(plan.second, plan.column_name)
            self._rename(aside, plan.second)

    def _exchange_on_postgresql(self) -> None:
        plan = self._plan
        self._rename_columns()
        check = self._check(plan.column_name)
        if plan.wants_check and check.find() is None:
            self._operations.impl.add_constraint(check.declared(validated=False))
        if self._is_nullable:
            return
        self._alter(f"ALTER COLUMN {self._quote(plan.column_name)} SET NOT NULL")
        if not plan.drop:
            # From now on, writers don't know the column that is kept.
            self._alter(f"ALTER COLUMN {self._quote(plan.second)} DROP NOT NULL")

    def _exchange_on_mysql(self) -> None:
        plan = self._plan
        changes = [self._change(plan.second, plan.column_name, nullable=self._is_nullable)]
        if plan.drop:
            changes.insert(0, f"DROP COLUMN {self._quote(plan.column_name)}")
        else:
            changes.append(self._change(plan.column_name, plan.second, nullable=True))
        if plan.wants_check:
            changes.append(added(self._check(plan.column_name).declared(), self._dialect))
        # Every row was just seen to meet the constraint.
        change = f"ALTER TABLE {self._table} {', '.join(changes)}"
        self._connection.exec_driver_sql(without_reading(change, self._dialect))

    def _change(self, name: str, new_name: str, *, nullable: bool) -> str:
        type_, comment = self._columns[name]["type"], self._columns[name].get("comment")
        column: Column[Any] = Column(new_name, type_, nullable=nullable, comment=comment)
        Table(self._plan.table_name, MetaData(), column, schema=self._plan.schema)
        compiler: Any = CreateTable(column.table).compile(dialect=self._dialect)
        return f"CHANGE COLUMN {self._quote(name)} {compiler.get_column_specification(column)}"

    def _exchange_on_sqlite(self) -> None:
        plan = self._plan
        self._rename_columns()
        if self._is_nullable:
            return
        with copied_table(
            self._operations,
            plan.table_name,
            plan.schema,
            because=f"{plan.full_name} is NOT NULL, which SQLite can set",
            instead="The column is as it was. Make it nullable in a revision of your own before "
            "this one, and NOT NULL in one after it",
        ) as batch:
            batch.alter_column(plan.column_name, existing_type=LargeBinary(), nullable=False)
            if not plan.drop:
                batch.alter_column(plan.second, nullable=True)
