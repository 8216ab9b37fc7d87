"""Turn a column from plaintext to sealed or back, in steps that a kill at any instant leaves whole.

1. Add a second column.
2. Fill it from the first, in committed batches.
3. On PostgreSQL: compare every row, and fill again what a writer changed meanwhile.
4. Under a lock of the table: compare every row (on PostgreSQL those written since step 3 began)
   and fill again, then let the second column take the first one's name and NOT NULL, and drop the
   first. That is one transaction on PostgreSQL and SQLite; on MariaDB and MySQL it is one ALTER
   TABLE, which is atomic there.

Nothing is noted down between the steps: which of them are done is read off the database.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

from alembic.operations import Operations
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ColumnElement,
    Connection,
    Dialect,
    LargeBinary,
    MetaData,
    Table,
    Text,
    cast,
    column,
    func,
    literal,
    select,
    text,
)
from sqlalchemy import table as table_clause
from sqlalchemy.engine.interfaces import ReflectedCheckConstraint
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import AddConstraint, CreateTable
from sqlalchemy.types import TypeEngine, _Binary

from .. import _sql
from .._database.connection import ManagedConnection
from .._database.faults import describe, refuses_a_row
from .._sql import is_mysql
from ..exceptions import RotationError
from ..keyring import default_keyring
from ..rotation import RotationProgress, run_in_transaction, run_jobs
from ..rotation.jobs import Backfill
from ..rotation.plain import PlainColumn, Reader, Writer
from ..rotation.report import FailedRow, Failures
from ..rotation.rows import Rows
from ..rotation.targets import resolve_targets
from ..types import EncryptedJSON
from ._checks import (
    condition_of,
    create_check,
    declared_check,
    drop_check,
    find_check,
    schema_on_sqlite,
    without_foreign_keys,
)
from ._reflect import dependents, reflect_table

logger = logging.getLogger("alembic.runtime.migration.lucent")

Content = Literal["plain", "sealed"]

_FAILURES_LOGGED: Final = 20

_SAMPLE: Final = 100
"""Values that are looked at where a type does not say what they are in Python."""


@dataclass(frozen=True)
class Plan:
    """What is to become of a column. The fields are the operations' parameters."""

    to_sealed: bool
    table_name: str
    column_name: str
    schema: str | None
    existing_type: TypeEngine[Any]
    sealed_type: EncryptedJSON
    bound_types: Mapping[str, TypeEngine[Any] | None]
    reader: Reader | None
    writer: Writer | None
    through: str
    swap: bool
    drop: bool
    batch_size: int

    @property
    def full_name(self) -> str:
        """The column's name with its table and schema."""
        return ".".join(filter(None, (self.schema, self.table_name, self.column_name)))

    @property
    def verb(self) -> str:
        """What is done to values, for messages."""
        return "sealed" if self.to_sealed else "opened"


def convert_column(operations: Operations, plan: Plan) -> None:
    """Do what is left to do of `plan`, over a connection in AUTOCOMMIT mode.

    :raises RotationError: something is missing or in the way, or there are values that cannot be
        converted; nothing was written, or the column is as it was.
    """
    # Inside `batch_alter_table`, too, the operations are carried out at once.
    _Conversion(Operations(operations.migration_context), plan).run()


class _Conversion:
    def __init__(self, operations: Operations, plan: Plan) -> None:
        self._operations = operations
        self._plan = plan
        self._connection: Connection = operations.get_bind()
        self._dialect: Dialect = self._connection.dialect
        self._keyring = cache(default_keyring)
        self._columns: Mapping[str, Any] = {}
        self._owner = Table(plan.table_name, MetaData(), schema=plan.schema)
        preparer = self._dialect.identifier_preparer
        self._quote: Callable[[str], str] = preparer.quote
        self._table = preparer.format_table(self._owner)

    def run(self) -> None:
        plan = self._plan
        self._look()
        has_through = plan.through in self._columns
        content = self._content(plan.column_name)
        wanted, other = _contents(plan)
        if has_through:
            beside = self._content(plan.through)
            if content is not None and content == beside:
                raise RotationError(
                    f"{plan.full_name} and {plan.through} both hold {content} values; one of them "
                    "was not made by this operation. Give another name as through="
                )
            if content == wanted or (content is None and beside == other):
                self._drop_what_is_left()
                return
        elif content == wanted:
            logger.info("%s is %s already; nothing to do", plan.full_name, wanted)
            self._finish_check()
            return
        self._refuse_values_that_are_not_json()
        self._refuse_what_would_be_lost(plan.column_name)
        if not has_through:
            self._add()
        if plan.swap:
            began = time.monotonic()
            # What writers add meanwhile is filled under the lock: there is no end to wait for.
            self._stop_if_failed(self._fill(passes=3, final=False))
            self._swap(self._compare_beforehand(patience=time.monotonic() - began))
        else:
            self._stop_if_failed(self._fill())
            self._stop_if_failed(self._fill(compare=True))
            logger.info("%s is filled from %s", plan.through, plan.full_name)

    # -- what there is -----------------------------------------------------------------------------

    def _look(self) -> None:
        """Read the table's columns; refuse what there is no way to convert."""
        plan = self._plan
        needed = (plan.column_name, *plan.bound_types)
        reflected = reflect_table(self._connection, plan.table_name, plan.schema, needed)
        if len(plan.through.encode("utf-8")) > self._dialect.max_identifier_length:
            raise RotationError(
                f"the name of {plan.full_name} is too long for a second column beside it, "
                f"{plan.through}; rename the column in a revision before this one"
            )
        self._columns = reflected.columns
        keys = reflected.primary_key
        if plan.column_name in keys or plan.column_name in plan.bound_types:
            raise RotationError(f"{plan.full_name} is a column that identifies its row")
        if plan.reader is None and plan.writer is not None and not plan.to_sealed:
            raise RotationError(
                "pass reader= with writer=: what is written is read again and compared before the "
                "sealed values are dropped"
            )
        if plan.batch_size < 1:
            raise RotationError("batch_size is a whole number of rows, 1 or more")
        self._owner = Table(
            plan.table_name,
            MetaData(),
            *reflected.identity(self._connection, plan.bound_types),
            schema=plan.schema,
        )
        key = tuple(self._owner.primary_key.columns)
        Rows(self._owner.fullname, self._owner, key, self._dialect).check_keys(self._connection)

    def _content(self, name: str) -> Content | None:
        """Say what a column holds; `None` if it may be either, having no value."""
        plan = self._plan
        type_ = self._columns[name]["type"]
        if not isinstance(type_, _Binary):
            return "plain"
        value: ColumnElement[Any] = column(name)
        has = self._any(value.is_not(None))
        has_unsealed = self._any(value.is_not(None), _sql.key_version(value).is_(None))
        plain_is_binary = isinstance(_implemented(plan.existing_type, self._dialect), _Binary)
        if has_unsealed and not plain_is_binary:
            raise RotationError(
                f"{self._owner.fullname}.{name} is a binary column and holds values that are not "
                "sealed. If they are plaintext, pass existing_type=sa.LargeBinary() and a reader="
            )
        if has_unsealed:
            return "plain"
        return "sealed" if has or not plain_is_binary else None

    def _any(self, *conditions: Any) -> bool:
        plan = self._plan
        owner = table_clause(plan.table_name, schema=plan.schema)
        statement = select(literal(1)).select_from(owner).where(*conditions).limit(1)
        return self._connection.execute(statement).first() is not None

    def _refuse_what_would_be_lost(self, name: str) -> None:
        """Refuse what would go with a column, or mean nothing on it."""
        plan = self._plan
        check = self._check(name)  # that of a sealed column is dropped with it
        found = dependents(
            self._connection, plan.table_name, plan.schema, name, ours=check and check["name"]
        )
        if found:
            raise RotationError(
                f"{self._owner.fullname}.{name} is used by {', '.join(found)}, which would be lost "
                "with it or mean nothing on its new values. Drop these in an earlier revision, and "
                "create what fits the new values in a later one"
            )

    def _refuse_values_that_are_not_json(self) -> None:
        """Refuse a type whose values have no JSON form, unless functions give them one."""
        plan = self._plan
        if plan.reader is not None and (plan.to_sealed or plan.writer is not None):
            return
        plain = self._plain_column(plan.column_name)
        kind = None if plain.has_json_values else type(plain.type).__name__
        if plain.has_json_values is None:
            kind = self._kind_of_values(plain) if plan.to_sealed else None
        if kind is not None:
            raise RotationError(
                f"the values of {plan.full_name} are of the type {kind}, which JSON does not have. "
                "Pass functions that make JSON of them and undo it, such as reader=str and a "
                "writer= that reads such text"
            )

    def _kind_of_values(self, plain: PlainColumn) -> str | None:
        """Return the name of the type of the first values, if none of them is a JSON value."""
        plan = self._plan
        owner = table_clause(plan.table_name, schema=plan.schema)
        statement = select(plain.expression()).select_from(owner).limit(_SAMPLE)
        values = self._connection.scalars(statement.where(column(plan.column_name).is_not(None)))
        kinds = [plain.kind_unless_json(value) for value in values]
        return kinds[0] if kinds and all(kinds) else None

    @property
    def _final(self) -> tuple[str, str, str | None]:
        return self._plan.table_name, self._plan.column_name, self._plan.schema

    def _check(self, column_name: str) -> ReflectedCheckConstraint | None:
        plan = self._plan
        return find_check(self._connection, plan.table_name, column_name, plan.schema)

    @property
    def _wants_check(self) -> bool:
        return self._plan.to_sealed and self._plan.sealed_type.create_constraint

    def _finish_check(self) -> None:
        """Have the column's constraint, and on PostgreSQL have it proved for the rows there are."""
        if self._wants_check:
            create_check(self._operations, *self._final)

    # -- filling -----------------------------------------------------------------------------------

    def _add(self) -> None:
        plan = self._plan
        type_: TypeEngine[Any] = plan.existing_type
        checks = []
        if plan.to_sealed:
            type_ = plan.sealed_type.copy()
            type_.create_constraint = False  # one that is named after this column
            if plan.sealed_type.create_constraint and self._dialect.name == "sqlite":
                name = declared_check(self._operations, *self._final).name
                checks.append(CheckConstraint(condition_of(plan.through, self._dialect), name=name))
        comment = self._columns[plan.column_name].get("comment")
        added: Column[Any] = Column(plan.through, type_, *checks, nullable=True, comment=comment)
        self._operations.add_column(plan.table_name, added, schema=plan.schema)
        self._look()

    def _job(self, *, compare: bool, written_since: ColumnElement[bool] | None = None) -> Backfill:
        plan = self._plan
        plain, sealed = (
            (plan.column_name, plan.through) if plan.to_sealed else (plan.through, plan.column_name)
        )
        columns: list[Column[Any]] = [
            *(Column(c.name, c.type, primary_key=c.primary_key) for c in self._owner.columns),
            Column(sealed, plan.sealed_type),
        ]
        owner = Table(plan.table_name, MetaData(), *columns, schema=plan.schema)
        (target,) = resolve_targets(owner.c[sealed], self._connection)
        return Backfill(
            target,
            self._plain_column(plain),
            self._keyring,
            self._dialect,
            to_sealed=plan.to_sealed,
            compare=compare,
            written_since=written_since,
        )

    def _plain_column(self, name: str) -> PlainColumn:
        plan = self._plan
        codec = plan.sealed_type.column_codec(self._dialect).codec
        return PlainColumn(name, plan.existing_type, codec, self._dialect, plan.reader, plan.writer)

    def _fill(
        self, *, compare: bool = False, passes: int | None = None, final: bool = True
    ) -> Failures:
        """Fill the second column in committed batches. A column without values needs no key.

        Unless this is `final`, a row that is not filled is no failure: it may be newer.
        """
        failures = Failures()
        columns = [self._plan.column_name, *([self._plan.through] if compare else [])]
        if not any(self._any(column(name).is_not(None)) for name in columns):
            return failures
        report = run_jobs(
            self._connection,
            [self._job(compare=compare)],
            self._keyring(),
            batch_size=self._plan.batch_size,
            on_progress=self._log,
            passes=passes,
        )
        failures.named += report.failed
        failures.count = max(report.failed_count, report.remaining if final else 0)
        return failures

    def _log(self, progress: RotationProgress) -> None:
        logger.info(
            "%s %d of %d values of %s so far",
            self._plan.verb,
            progress.rotated,
            max(progress.total, progress.rotated),
            self._plan.full_name,
        )

    def _stop_if_failed(self, failures: Failures) -> None:
        if not failures.count:
            return
        plan = self._plan
        log_failures(plan.full_name, "cannot be converted", failures.named, failures.count)
        raise RotationError(
            f"{failures.count} values of {plan.full_name} cannot be {plan.verb} (the first were "
            "logged by primary key). The column is as it was; what could be converted is kept in "
            f"{plan.through}. The revision is not stamped: run it again when these rows are dealt "
            "with, or pass the reader= that they need"
        )

    # -- the swap ----------------------------------------------------------------------------------

    def _compare_beforehand(self, *, patience: float) -> ColumnElement[bool] | None:
        """Compare every row before the table is locked; return what tells those written since.

        Nothing tells that on the other databases, so they are left to :meth:`_reconcile`. Here a
        row has the transaction that wrote it in ``xmin``. If all that are as old had ended before
        the first row was read, then the row has been as it is ever since, and was compared. The
        rows that were just filled are as old when no transaction is left that is older: that is
        waited for, for `patience` seconds.
        """
        if self._dialect.name != "postgresql":
            return None
        filled = self._end_of_snapshot("pg_snapshot_xmax")
        deadline = time.monotonic() + patience
        # Not pg_visible_in_snapshot(), which is wrong about subtransactions: they come after the
        # oldest that has not ended. `xmin` has the lower 32 bits of a number, which age() counts
        # back from the transaction of the lock; a row of before a wraparound counts as written.
        while (oldest := self._end_of_snapshot("pg_snapshot_xmin")) < filled:
            if time.monotonic() >= deadline:
                logger.info(
                    "a transaction that is older than the values of %s has not ended; they are "
                    "compared once more under the lock",
                    self._plan.full_name,
                )
                break
            time.sleep(min(patience, 0.1))
        self._stop_if_failed(self._fill(compare=True, passes=1, final=False))
        current = cast(cast(func.pg_current_xact_id(), Text), BigInteger)
        return func.age(column("xmin")) <= current - literal(oldest, BigInteger)

    def _end_of_snapshot(self, name: str) -> int:
        """Return the oldest transaction that has not ended, or the next one that will begin."""
        end = text(f"SELECT CAST(CAST({name}(pg_current_snapshot()) AS text) AS bigint)")
        return int(self._connection.execute(end).scalar_one())

    def _swap(self, written_since: ColumnElement[bool] | None) -> None:
        plan = self._plan
        if self._any(column(plan.column_name).is_not(None)):
            self._keyring()  # a missing keyring is an error of its own, not one of every row
        try:
            with ManagedConnection(self._connection) as database, self._locked(database):
                self._stop_if_failed(self._reconcile(written_since))
                if not plan.to_sealed and self._dialect.name != "sqlite":
                    drop_check(self._operations, *self._final)
                if self._dialect.name == "sqlite":
                    self._rename_on_sqlite()
                elif self._dialect.name == "postgresql":
                    self._rename_on_postgresql()
                else:
                    self._rename_on_mysql()
        except DBAPIError as error:
            fault = describe(error, self._dialect)
            is_refused = refuses_a_row(error, self._dialect)
        else:
            logger.info(
                "%s holds %s values now; the others are %s",
                plan.full_name,
                _contents(plan)[0],
                "dropped" if plan.drop else f"kept in {plan.through}",
            )
            self._finish_check()
            return
        if is_refused:  # a value that was written meanwhile; this names its row
            self._stop_if_failed(self._fill(compare=True, passes=1))
        raise RotationError(
            f"the database refused to swap {plan.full_name} and {plan.through}: {fault}. The "
            "column is as it was. Run it again to go on"
        )

    @contextmanager
    def _locked(self, database: ManagedConnection) -> Iterator[None]:
        """Keep all writers out.

        What is done inside is one transaction, except on MariaDB and MySQL, where each statement
        is one.
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

    def _reconcile(self, written_since: ColumnElement[bool] | None) -> Failures:
        """Fill again what no longer agrees with its source: all rows, or those `written_since`."""
        job = self._job(compare=True, written_since=written_since)
        pending = job.rows.count(self._connection, job.rows.pending)
        looked_at, failures = run_in_transaction(self._connection, job, self._plan.batch_size)
        # Nobody writes now, so that a row which was not looked at, or looked at twice, is a fault
        # of the order of the primary key; and the value of one which was not is lost by the swap.
        if looked_at != pending:
            raise RotationError(
                f"the rows of table {self._owner.fullname} cannot be gone through in the order of "
                "their primary key, as with an inexact type (FLOAT). The column is as it was"
            )
        # Whatever became of the passes: with this lock, a value that is not there is lost.
        unfilled = job.rows.count(self._connection, job.unfilled)
        failures.count = max(failures.count, unfilled)
        return failures

    def _alter(self, change: str) -> None:
        self._connection.exec_driver_sql(f"ALTER TABLE {self._table} {change}")

    def _rename(self, old: str, new: str) -> None:
        self._alter(f"RENAME COLUMN {self._quote(old)} TO {self._quote(new)}")

    def _exchange_names(self) -> None:
        plan = self._plan
        if plan.drop:
            self._drop_column(plan.column_name)
            self._rename(plan.through, plan.column_name)
        else:
            aside = f"{plan.column_name}__aside"
            self._rename(plan.column_name, aside)
            self._rename(plan.through, plan.column_name)
            self._rename(aside, plan.through)

    def _drop_column(self, name: str) -> None:
        plan = self._plan
        try:
            self._alter(f"DROP COLUMN {self._quote(name)}")
        except DBAPIError:
            # SQLite: a constraint of the table, as batch mode makes it, keeps the column.
            if self._dialect.name != "sqlite" or self._check(name) is None:
                raise
            drop_check(self._operations, plan.table_name, name, plan.schema)
            self._alter(f"DROP COLUMN {self._quote(name)}")

    @property
    def _is_nullable(self) -> bool:
        return bool(self._columns[self._plan.column_name]["nullable"])

    def _rename_on_postgresql(self) -> None:
        plan = self._plan
        self._exchange_names()
        if self._wants_check and self._check(plan.column_name) is None:
            check = declared_check(self._operations, *self._final)
            check.dialect_options["postgresql"]["not_valid"] = True
            self._operations.impl.add_constraint(check)
        if self._is_nullable:
            return
        self._alter(f"ALTER COLUMN {self._quote(plan.column_name)} SET NOT NULL")
        if not plan.drop:
            # Those who write the column from now on know nothing of the one that is kept.
            self._alter(f"ALTER COLUMN {self._quote(plan.through)} DROP NOT NULL")

    def _rename_on_mysql(self) -> None:
        plan = self._plan
        old, new = self._columns[plan.column_name], self._columns[plan.through]
        changes = [self._change(plan.through, plan.column_name, new, nullable=self._is_nullable)]
        if plan.drop:
            changes.insert(0, f"DROP COLUMN {self._quote(plan.column_name)}")
        else:
            changes.append(self._change(plan.column_name, plan.through, old, nullable=True))
        if self._wants_check:
            check = declared_check(self._operations, *self._final)
            compiled: Any = AddConstraint(check).compile(dialect=self._dialect)
            changes.append(f"ADD {compiled.process(check)}")
        change = f"ALTER TABLE {self._table} {', '.join(changes)}"
        if getattr(self._dialect, "is_mariadb", False):
            # Else it would copy the table for a constraint that every row was just seen to meet.
            change = f"SET STATEMENT check_constraint_checks = 0 FOR {change}"
        self._connection.exec_driver_sql(change)

    def _change(self, name: str, new_name: str, reflected: Any, *, nullable: bool) -> str:
        column: Column[Any] = Column(
            new_name, reflected["type"], nullable=nullable, comment=reflected.get("comment")
        )
        Table(self._plan.table_name, MetaData(), column, schema=self._plan.schema)
        compiler: Any = CreateTable(column.table).compile(dialect=self._dialect)
        return f"CHANGE COLUMN {self._quote(name)} {compiler.get_column_specification(column)}"

    def _rename_on_sqlite(self) -> None:
        plan = self._plan
        self._exchange_names()
        if self._is_nullable:
            return
        before = schema_on_sqlite(self._connection, plan.table_name, plan.schema)
        with self._operations.batch_alter_table(
            plan.table_name, schema=plan.schema, recreate="always"
        ) as batch:
            batch.alter_column(plan.column_name, existing_type=LargeBinary(), nullable=False)
            if not plan.drop:
                batch.alter_column(plan.through, nullable=True)
        lost = before - schema_on_sqlite(self._connection, plan.table_name, plan.schema)
        if lost:
            raise RotationError(
                f"{plan.full_name} is NOT NULL, which SQLite can set only on a copy of the table, "
                f"and Alembic's copy would lose: {', '.join(sorted(lost))}. The column is as it "
                "was. Make it nullable in a revision of your own before this one, and NOT NULL in "
                "one after it"
            )

    def _drop_what_is_left(self) -> None:
        """The swap is done: drop the other column, unless it is to be kept."""
        plan = self._plan
        if plan.swap and plan.drop:
            self._refuse_what_would_be_lost(plan.through)
            self._drop_column(plan.through)
            logger.info("dropped %s, which %s had replaced", plan.through, plan.full_name)
        else:
            logger.info("%s is %s already; nothing to do", plan.full_name, _contents(plan)[0])
        self._finish_check()


def log_failures(name: str, what: str, failed: Sequence[FailedRow], count: int) -> None:
    """Log the first values that something is wrong with, each by primary key, and how many more."""
    for row in failed[:_FAILURES_LOGGED]:
        logger.error(
            "%s of the row with primary key %r %s: %s", name, row.primary_key, what, row.error
        )
    if len(failed) > _FAILURES_LOGGED:
        logger.error("%s: %d values more, which are not logged", name, count - _FAILURES_LOGGED)


def _contents(plan: Plan) -> tuple[Content, Content]:
    """Return what the column is to hold, and what the other one holds then."""
    return ("sealed", "plain") if plan.to_sealed else ("plain", "sealed")


def _implemented(type_: TypeEngine[Any], dialect: Dialect) -> object:
    """Return the type that a decorator stands for."""
    impl = type_.dialect_impl(dialect)
    return getattr(impl, "impl_instance", impl)
