"""The fence: after a rotation, the database itself refuses values under the old key version.

A CHECK constraint on PostgreSQL, MariaDB and MySQL; triggers on SQLite, whose constraints can only
be added by copying the table. It compares the first bytes of a value, and needs no key.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.schema import conv

from .. import _sql
from .._database.connection import (
    DEFAULT_LOCK_TIMEOUT,
    DEFAULT_RETRIES,
    ManagedConnection,
    check_retries,
)
from .._database.faults import Fault
from .._database.reflection import dotted, reflect_columns
from .._database.relations import is_binary
from .._envelope import version_prefix
from ..exceptions import KeyInUseError, RotationError, hide_locals
from ..keyring import check_version
from ..rotation import is_wait, require_unused
from ..rotation.targets import TargetTable, survey
from ._checks import added, find_check, not_encrypted, without_reading

_LONGEST_NAME: Final = 63  # bytes, on PostgreSQL; MariaDB and MySQL take 64 characters

_T = TypeVar("_T")


class Found(NamedTuple):
    """The fence of one column: its constraint, or its triggers."""

    names: tuple[str, ...]
    is_validated: bool


class Fence:
    """What refuses values under one key version in the encrypted columns of one table.

    Each method takes an engine, or a connection that is in no transaction, and commits. Killed at
    any instant, each can be called again, and goes on.

    :param target: the table and the columns to fence, from :func:`.rotation.targets`.
    :param version: the key version that is refused.
    :param lock_timeout: seconds to wait for the table, on PostgreSQL, MariaDB and MySQL (whole
        seconds there). Others queue behind a change of the table that waits, so it gives up soon,
        lets them through and tries again.
    :param retries: further attempts, up to 4 seconds apart.
    :raises InvalidKeyError: `version` breaks the rule for versions.
    :raises RotationError: another argument is wrong.
    """

    @hide_locals
    def __init__(
        self,
        target: TargetTable,
        version: str,
        *,
        lock_timeout: float = DEFAULT_LOCK_TIMEOUT,
        retries: int = DEFAULT_RETRIES,
    ) -> None:
        if not (is_wait(lock_timeout) and lock_timeout > 0):
            raise RotationError("lock_timeout is a number of seconds, above 0 and up to a week")
        self.target = target
        self.version = check_version(version)
        self._lock_timeout = lock_timeout
        self._retries = check_retries(retries)
        self._name: str = target.clause.name
        self._schema: str | None = target.clause.schema
        self._columns = [column.name for column in target.columns]

    def add(self, bind: sa.Engine | sa.Connection, *, counts: bool = True) -> None:
        """Have the database refuse new values under the version, in every column.

        Call :meth:`validate` next: until it has passed, a value that was written meanwhile may be
        left, and any update of its row is refused.

        :param counts: ``False`` if the caller has just counted the values under the version.
        :raises KeyInUseError: there are values under the version; nothing was changed.
        :raises RotationError: the table is missing, is none or lacks an encrypted column; the
            server is a replica; or the database refuses. Nothing was changed.
        """
        self._run(bind, lambda database: self._add(database, counts))

    def validate(self, bind: sa.Engine | sa.Connection) -> None:
        """Prove that no value is left under the version, now that none can be added.

        :raises KeyInUseError: some are left, committed since :meth:`add` counted. The fence was
            dropped again, since it would refuse any update of their rows.
        :raises RotationError: there is no fence, or the database refuses.
        """
        self._run(bind, self._validate)

    def drop(self, bind: sa.Engine | sa.Connection) -> None:
        """Have the database take values under the version again.

        :raises RotationError: the table or a column is missing, or the database refuses.
        """
        self._run(bind, self._drop)

    def exists(self, bind: sa.Engine | sa.Connection) -> bool:
        """Say whether every column is fenced, whatever its fence is called by now.

        :raises RotationError: the table or a column is missing, or the database refuses.
        """
        return self._run(bind, lambda database: not self._missing(database), read_only=True)

    def find(self, inspector: sa.Inspector) -> dict[str, Found]:
        """Return the fences by column, found by what they say: names outlive a rename.

        :param inspector: which reads each table once, for fences against several versions.
        """
        connection = inspector.bind
        if isinstance(connection, sa.Connection) and connection.dialect.name == "sqlite":
            return self._find_triggers(connection)
        return self._find_constraints(inspector)

    def constraints(self) -> list[sa.CheckConstraint]:
        """Return the constraints for DDL, one for each column."""
        return [self._constraint(name, validated=True) for name in self._columns]

    def name_of(self, column: str) -> str:
        """Return the name that the fence of a column is given."""
        name = f"lucent_fence_{self.version}_{self._name}_{column}"
        encoded = name.encode("utf-8")
        if len(encoded) <= _LONGEST_NAME:
            return name
        digest = hashlib.sha256(encoded).hexdigest()[:12]
        return f"{encoded[: _LONGEST_NAME - 13].decode('utf-8', 'ignore')}_{digest}"

    # -- steps -------------------------------------------------------------------------------------

    def _run(
        self,
        bind: sa.Engine | sa.Connection,
        work: Callable[[ManagedConnection], _T],
        *,
        read_only: bool = False,
    ) -> _T:
        database = ManagedConnection(bind, retries=self._retries, read_only=read_only)

        def checked() -> _T:
            database.read(self._check)
            return work(database)

        return database.run(checked, self._describe)

    def _describe(self, fault: Fault) -> str:
        return (
            f"the database ended the work on the fence of {self.target.name} against key version "
            f"{self.version!r}: {fault.message}. {fault.next_step()}"
        )

    def _check(self, connection: sa.Connection) -> None:
        """Refuse what is no table, or lacks an encrypted column."""
        survey(connection, [self.target])
        columns = reflect_columns(connection, self._name, self._schema, self._columns)
        for name in self._columns:
            type_ = columns[name]["type"]
            if not is_binary(type_):
                raise not_encrypted(dotted(self._schema, self._name, name), type_)

    def _add(self, database: ManagedConnection, counts: bool) -> None:
        if self._missing(database):
            if counts:
                require_unused(database, [self.target], self.version)
            database.retry(lambda _: self._create(database))

    def _create(self, database: ManagedConnection) -> None:
        missing = self._missing(database)  # a connection may have been lost after the change
        if not missing:
            return
        dialect = database.dialect
        with self._soon(database) as connection:
            if dialect.name == "sqlite":
                for statement in self._triggers(missing, dialect):
                    connection.exec_driver_sql(statement)
                return
            checks = [self._constraint(name, validated=False) for name in missing]
            # One statement, so that no column is fenced without the others.
            change = self._alter(dialect, [added(check, dialect) for check in checks])
            connection.exec_driver_sql(without_reading(change, dialect))

    def _validate(self, database: ManagedConnection) -> None:
        missing = self._missing(database)
        if missing:
            raise RotationError(
                f"{self.target.name}.{missing[0]} has no fence against key version "
                f"{self.version!r}: add() it first"
            )
        is_met = database.retry(lambda _: self._validate_constraints(database))
        fault = ""
        try:
            require_unused(database, [self.target], self.version)
        except KeyInUseError as error:
            fault = str(error)
        if fault or not is_met:
            self._drop(database)
        if fault:
            raise KeyInUseError(f"{fault}. The fence was dropped again")
        if not is_met:
            raise RotationError(
                f"{self.target.name} holds values that begin with '{self.version}:' and are not "
                "sealed, so it cannot be fenced against this version. verify() names their rows. "
                "The fence was dropped again"
            )

    def _validate_constraints(self, database: ManagedConnection) -> bool:
        """Have PostgreSQL read the rows, while others write; say whether all meet the fence."""
        dialect = database.dialect
        if dialect.name != "postgresql":
            return True
        quote = dialect.identifier_preparer.quote
        pending = [
            f"VALIDATE CONSTRAINT {quote(name)}"
            for found in self._find(database).values()
            for name in found.names
            if not found.is_validated
        ]
        if pending:
            try:
                with self._soon(database) as connection:
                    connection.exec_driver_sql(self._alter(dialect, pending))
            except IntegrityError:
                return False
        return True

    def _drop(self, database: ManagedConnection) -> None:
        def drop(_: int) -> None:
            found = self._find(database)
            names = [name for each in found.values() for name in each.names]
            quote = database.dialect.identifier_preparer.quote
            if not names:
                return
            with self._soon(database) as connection:
                if database.dialect.name == "sqlite":
                    for name in names:
                        full = dotted(quote(self._schema or "main"), quote(name))
                        connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {full}")
                else:
                    changes = [f"DROP CONSTRAINT {quote(name)}" for name in names]
                    connection.exec_driver_sql(self._alter(database.dialect, changes))

        database.retry(drop)

    @contextmanager
    def _soon(self, database: ManagedConnection) -> Iterator[sa.Connection]:
        """Change the table soon or not at all.

        The block is one transaction, except on MariaDB and MySQL. On SQLite nobody queues.
        """
        if not _sql.is_mysql(database.dialect):
            with database.transaction() as connection:
                if database.dialect.name == "postgresql":
                    milliseconds = max(1, round(self._lock_timeout * 1000))
                    connection.exec_driver_sql(f"SET LOCAL lock_timeout = {milliseconds}")
                yield connection
            return
        connection = database.connection
        before = connection.exec_driver_sql("SELECT @@SESSION.lock_wait_timeout").scalar_one()
        set_timeout = "SET SESSION lock_wait_timeout = {}".format
        connection.exec_driver_sql(set_timeout(math.ceil(self._lock_timeout)))
        try:
            yield connection
        finally:
            if not connection.invalidated:
                connection.exec_driver_sql(set_timeout(before))

    # -- in the database ---------------------------------------------------------------------------

    def _missing(self, database: ManagedConnection) -> list[str]:
        found = self._find(database)
        return [name for name in self._columns if name not in found]

    def _find(self, database: ManagedConnection) -> dict[str, Found]:
        return database.read(lambda connection: self.find(sa.inspect(connection)))

    def _find_constraints(self, inspector: sa.Inspector) -> dict[str, Found]:
        prefix = version_prefix(self.version)
        signature = re.compile(
            rf"substr.*\b1\b.*\b{len(prefix)}\b.*x'?{prefix.hex()}(?![0-9a-f])",
            re.IGNORECASE | re.DOTALL,
        )
        found = {}
        for name in self._columns:
            check = find_check(inspector, self._name, name, self._schema, signature)
            if check is not None and check["name"] is not None:
                is_validated = not check.get("dialect_options", {}).get("not_valid")
                found[name] = Found((check["name"],), is_validated)
        return found

    def _find_triggers(self, connection: sa.Connection) -> dict[str, Found]:
        found = {}
        triggers = _triggers_in(connection, self._schema)
        for column in self._columns:
            names = []
            for name, owner, sql in triggers:
                match = _TRIGGER.search(sql)
                if (
                    match is not None
                    and owner.lower() == self._name.lower()
                    and _unquoted(match["column"]) == column.lower()
                    and bytes.fromhex(match["prefix"]) == version_prefix(self.version)
                ):
                    names.append(name)
            if len(names) == len(_EVENTS):
                found[column] = Found(tuple(names), is_validated=True)
        return found

    # -- DDL ---------------------------------------------------------------------------------------

    def _constraint(self, column: str, *, validated: bool) -> sa.CheckConstraint:
        """Return a constraint; unless `validated`, PostgreSQL adds it without reading the rows."""
        condition = _sql.lacks_version(sa.column(column), self.version)
        check = sa.CheckConstraint(condition, name=conv(self.name_of(column)))
        check.dialect_options["postgresql"]["not_valid"] = not validated
        sa.Table(self._name, sa.MetaData(), check, schema=self._schema)
        return check

    def _alter(self, dialect: sa.Dialect, changes: Sequence[str]) -> str:
        table = dialect.identifier_preparer.format_table(self.target.clause)
        return f"ALTER TABLE {table} {', '.join(changes)}"

    def _triggers(self, columns: Sequence[str], dialect: sa.Dialect) -> Iterator[str]:
        quote: Callable[[str], str] = dialect.identifier_preparer.quote_identifier
        for column in columns:
            value: sa.ColumnClause[Any] = sa.literal_column(f"NEW.{quote(column)}")
            condition = _sql.lacks_version(value, self.version).compile(dialect=dialect)
            for event, clause in _EVENTS.items():
                name = f"{self.name_of(column)}_{event}"
                yield (
                    f"CREATE TRIGGER {dotted(quote(self._schema or 'main'), quote(name))} "
                    f"BEFORE {clause.format(column=quote(column))} ON {quote(self._name)} "
                    f"WHEN NOT {condition} "
                    f"BEGIN SELECT RAISE(ABORT, 'key version {self.version} is fenced'); END"
                )


_EVENTS: Final = {"insert": "INSERT", "update": "UPDATE OF {column}"}

_TRIGGER: Final = re.compile(
    r"WHEN NOT \(substr\(CAST\(NEW\.(?P<column>\"(?:[^\"]|\"\")+\"|\S+) AS BLOB\), 1, \d+\)"
    r" <> x'(?P<prefix>[0-9a-f]+)'\)"
)
"""What only the triggers of a fence have. SQLite rewrites the column's name when it is renamed."""


def fence_triggers(connection: sa.Connection, schema: str | None) -> list[tuple[str, str]]:
    """Return the name and table of each trigger of a SQLite database that is a part of a fence."""
    found = _triggers_in(connection, schema)
    return [(name, owner) for name, owner, sql in found if _TRIGGER.search(sql)]


def _triggers_in(connection: sa.Connection, schema: str | None) -> list[tuple[str, str, str]]:
    quote = connection.dialect.identifier_preparer.quote
    triggers = f"{quote(schema or 'main')}.sqlite_master WHERE type = 'trigger'"
    statement = sa.text(f"SELECT name, tbl_name, sql FROM {triggers}")  # noqa: S608  (quoted)
    return [(name, owner, sql) for name, owner, sql in connection.execute(statement)]


def _unquoted(name: str) -> str:
    return (name[1:-1].replace('""', '"') if name.startswith('"') else name).lower()
