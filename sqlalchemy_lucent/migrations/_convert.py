"""Turn a plaintext column into a sealed one or back, in steps that survive a kill at any instant.

1. Add a second column.
2. Fill it from the first, in committed batches.
3. On PostgreSQL: compare every row, and fill again where a writer changed the source meanwhile.
4. Under a lock of the table: compare every row (on PostgreSQL those written since step 3 began)
   and fill again. Then give the second column the first one's name and NOT NULL, and drop the
   first. This is one transaction on PostgreSQL and SQLite. On MariaDB and MySQL it is one ALTER
   TABLE, which is atomic there.

No progress is recorded between the steps: the columns themselves tell which of them are done.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Final, Literal

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import _Binary

from .. import _sql
from .._database.connection import ManagedConnection
from .._database.faults import describe, refuses_a_row
from .._database.reflection import has_row, reflect_table
from ..exceptions import RotationError
from ..keyring import default_keyring
from ..rotation import RotationProgress, check_rows, run_in_transaction, run_jobs
from ..rotation.jobs import Backfill
from ..rotation.plain import PlainColumn
from ..rotation.report import FailedRow, Failures
from ..rotation.rows import Rows
from ..rotation.targets import resolve_targets
from ._checks import SealedCheck, condition_of, logger
from ._dependents import dependents
from ._swap import Swap
from .operations import ConvertColumnOp

Content = Literal["plain", "sealed"]

_FAILURES_LOGGED: Final = 20

_SAMPLE: Final = 100
"""How many values are read where a type does not tell their Python type."""


def convert_column(operations: Operations, plan: ConvertColumnOp) -> None:
    """Do the steps of `plan` that are left, over a connection in AUTOCOMMIT mode.

    :raises RotationError: something is missing or in the way, or some values cannot be converted;
        the column is unchanged.
    """
    _Conversion(operations, plan).run()


class _Conversion:
    def __init__(self, operations: Operations, plan: ConvertColumnOp) -> None:
        self._operations = operations
        self._plan = plan
        self._connection: sa.Connection = operations.get_bind()
        self._dialect: sa.Dialect = self._connection.dialect
        self._keyring = cache(default_keyring)
        self._look()

    def run(self) -> None:
        plan = self._plan
        has_second = plan.second in self._columns
        content = self._content(plan.column_name)
        content_of_second = self._content(plan.second) if has_second else None
        wanted, other = _contents(plan)
        if content is not None and content == content_of_second:
            raise RotationError(
                f"{plan.full_name} and {plan.second} both hold {content} values; one of them was "
                "not made by this operation. Give another name as through="
            )
        if content == wanted or (content is None and content_of_second == other):
            self._finish()
            return
        self._refuse_values_that_are_not_json()
        self._refuse_what_would_be_lost(plan.column_name)
        self._require_a_key_for_values()
        if not has_second:
            self._add()
        if plan.swap:
            began = time.monotonic()
            # Writers may never pause: the rest is filled under the lock.
            self._stop_if_failed(self._fill(passes=3, final=False))
            self._swap(self._compare_beforehand(patience=time.monotonic() - began))
        else:
            self._stop_if_failed(self._fill())
            self._stop_if_failed(self._fill(compare=True))
            logger.info("%s is filled from %s", plan.second, plan.full_name)
            if not _sql.is_mysql(self._dialect):  # where it would keep writers out for a copy
                self._finish_check(plan.second)

    def _look(self) -> None:
        """Read the table's columns; refuse a column that cannot be converted."""
        plan = self._plan
        self._columns, self._owner = reflect_table(
            self._connection, plan.table_name, plan.schema, plan.column_name, plan.bound_types
        )
        if len(plan.second.encode("utf-8")) > self._dialect.max_identifier_length:
            raise RotationError(
                f"the name of {plan.full_name} is too long for a second column beside it, "
                f"{plan.second}; rename the column in a revision before this one"
            )
        if plan.column_name in self._owner.columns:
            raise RotationError(f"{plan.full_name} is a column that identifies its row")
        if plan.reader is None and plan.writer is not None and not plan.to_sealed:
            raise RotationError(
                "pass reader= with writer=: each written value is read again and compared before "
                "the sealed values are dropped"
            )
        check_rows("batch_size", plan.batch_size)
        key = tuple(self._owner.primary_key.columns)
        Rows(self._owner.fullname, self._owner, key, self._dialect).check_keys(self._connection)

    def _content(self, name: str) -> Content | None:
        """Say what a column holds; ``None`` if it has no value and may be either."""
        plan = self._plan
        type_ = self._columns[name]["type"]
        if not isinstance(type_, _Binary):
            return "plain"
        value: sa.ColumnElement[Any] = sa.column(name)
        has = self._any(value.is_not(None))
        has_unsealed = self._any(value.is_not(None), _sql.key_version(value).is_(None))
        implementation = plan.plain_type.dialect_impl(self._dialect)
        implementation = getattr(implementation, "impl_instance", implementation)  # of a decorator
        plain_is_binary = isinstance(implementation, _Binary)
        if has_unsealed and not plain_is_binary:
            raise RotationError(
                f"{self._owner.fullname}.{name} is a binary column and holds values that are not "
                "sealed. If they are plaintext, pass existing_type=sa.LargeBinary() and a reader="
            )
        if has_unsealed:
            return "plain"
        return "sealed" if has or not plain_is_binary else None

    def _any(self, *conditions: Any) -> bool:
        return has_row(self._connection, self._owner, *conditions)

    def _require_a_key_for_values(self) -> None:
        """Raise a missing keyring once, not for every row. A column without values needs none."""
        if self._any(sa.column(self._plan.column_name).is_not(None)):
            self._keyring()

    def _refuse_what_would_be_lost(self, name: str) -> None:
        """Refuse a column that something depends on: a drop would lose it."""
        plan = self._plan
        check = self._check(name).find()  # dropped with the column
        ours = check and check["name"]
        found = dependents(self._connection, plan.table_name, plan.schema, name, ours=ours)
        if found:
            raise RotationError(
                f"{self._owner.fullname}.{name} is used by {', '.join(found)}, which would be lost "
                "with it or mean nothing on its new values. Drop these in an earlier revision, and "
                "create what the new values need in a later one"
            )

    def _refuse_values_that_are_not_json(self) -> None:
        """Refuse a type whose values are not JSON, unless `reader` and `writer` convert them."""
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
                "Pass functions that turn them into JSON and back, such as reader=str and a "
                "writer= that parses such text"
            )

    def _kind_of_values(self, plain: PlainColumn) -> str | None:
        """Return the name of the type of the first values, if none of them is a JSON value."""
        statement = sa.select(plain.expression()).select_from(self._owner).limit(_SAMPLE)
        values = self._connection.scalars(statement.where(sa.column(plain.name).is_not(None)))
        kinds = [plain.kind_unless_json(value) for value in values]
        return kinds[0] if kinds and all(kinds) else None

    def _check(self, column_name: str) -> SealedCheck:
        plan = self._plan
        return SealedCheck(self._operations, plan.table_name, column_name, plan.schema)

    def _finish_check(self, column_name: str) -> None:
        """Add a column's constraint, and have PostgreSQL validate it for existing rows."""
        if self._plan.wants_check:
            self._check(column_name).create()

    def _add(self) -> None:
        plan = self._plan
        type_ = plan.plain_type
        checks = []
        if plan.to_sealed:
            type_ = plan.sealed_type
            type_.create_constraint = False  # it comes last, under the name that the column keeps
            if plan.wants_check and self._dialect.name == "sqlite":
                last_name = plan.column_name if plan.swap else plan.second
                name = self._check(last_name).declared().name
                checks.append(
                    sa.CheckConstraint(condition_of(plan.second, self._dialect), name=name)
                )
        comment = self._columns[plan.column_name].get("comment")
        added: sa.Column[Any] = sa.Column(
            plan.second, type_, *checks, nullable=True, comment=comment
        )
        self._operations.add_column(plan.table_name, added, schema=plan.schema)
        self._look()

    def _job(
        self, *, compare: bool, written_since: sa.ColumnElement[bool] | None = None
    ) -> Backfill:
        plan = self._plan
        plain, sealed = (
            (plan.column_name, plan.second) if plan.to_sealed else (plan.second, plan.column_name)
        )
        owner = self._owner.to_metadata(sa.MetaData())
        owner.append_column(sa.Column(sealed, plan.sealed_type))
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
        return PlainColumn(name, plan.plain_type, codec, self._dialect, plan.reader, plan.writer)

    def _fill(
        self, *, compare: bool = False, passes: int | None = None, final: bool = True
    ) -> Failures:
        """Fill the second column in committed batches. A column without values needs no key.

        :param final: whether a row that is not filled is a failure. Otherwise, it may be new.
        """
        plan = self._plan
        failures = Failures()
        columns = [plan.column_name, *([plan.second] if compare else [])]
        if not any(self._any(sa.column(name).is_not(None)) for name in columns):
            return failures
        report = run_jobs(
            self._connection,
            [self._job(compare=compare)],
            self._keyring(),
            batch_size=plan.batch_size,
            on_progress=partial(log_progress, plan.verb, plan.full_name),
            passes=passes,
        )
        failures.named += report.failed
        failures.count = max(report.failed_count, report.remaining if final else 0)
        return failures

    def _stop_if_failed(self, failures: Failures) -> None:
        if not failures.count:
            return
        plan = self._plan
        log_failures(plan.full_name, "cannot be converted", failures.named, failures.count)
        raise RotationError(
            f"{failures.count} values of {plan.full_name} cannot be {plan.verb} (the first were "
            "logged by primary key). The column is as it was; the values that could be converted "
            f"are kept in {plan.second}. The revision is not stamped: mend these rows, or pass the "
            "reader= that they need, and run it again"
        )

    def _compare_beforehand(self, *, patience: float) -> sa.ColumnElement[bool] | None:
        """Compare every row before the lock; return the condition of those written since.

        Only PostgreSQL can tell: ``xmin`` is the transaction that wrote a row. If every transaction
        up to that one had ended before the first row was read, the comparison saw the row as it is
        now. For the rows just filled, every older transaction has to end: wait for that, but no
        longer than `patience` seconds. On other databases, :meth:`_reconcile` compares all rows.
        """
        if self._dialect.name != "postgresql":
            return None
        filled = self._end_of_snapshot("pg_snapshot_xmax")
        deadline = time.monotonic() + patience
        # pg_visible_in_snapshot() would be wrong about subtransactions, so compare with the oldest
        # transaction that has not ended. `xmin` has the lower 32 bits of a number; age() counts
        # back from the transaction of the lock. A row older than a wraparound counts as written.
        while (oldest := self._end_of_snapshot("pg_snapshot_xmin")) < filled:
            if time.monotonic() >= deadline:
                logger.info(
                    "a transaction older than the values of %s has not ended; they are compared "
                    "again under the lock",
                    self._plan.full_name,
                )
                break
            time.sleep(min(patience, 0.1))
        self._stop_if_failed(self._fill(compare=True, passes=1, final=False))
        current = sa.cast(sa.cast(sa.func.pg_current_xact_id(), sa.Text), sa.BigInteger)
        return sa.func.age(sa.column("xmin")) <= current - sa.literal(oldest, sa.BigInteger)

    def _end_of_snapshot(self, name: str) -> int:
        """Return the oldest transaction that has not ended, or the next one to begin."""
        end = sa.text(f"SELECT CAST(CAST({name}(pg_current_snapshot()) AS text) AS bigint)")
        return int(self._connection.execute(end).scalar_one())

    def _swap(self, written_since: sa.ColumnElement[bool] | None) -> None:
        plan = self._plan
        swap = Swap(self._operations, plan, self._columns)
        self._require_a_key_for_values()
        try:
            with ManagedConnection(self._connection) as database, swap.locked(database):
                self._stop_if_failed(self._reconcile(written_since))
                swap.exchange()
        except DBAPIError as error:
            fault = describe(error, self._dialect)
            is_refused = refuses_a_row(error, self._dialect)
        else:
            logger.info(
                "%s holds %s values now; the others are %s",
                plan.full_name,
                _contents(plan)[0],
                "dropped" if plan.drop else f"kept in {plan.second}",
            )
            self._finish_check(plan.column_name)
            return
        if is_refused:  # a value written meanwhile: name its row
            self._stop_if_failed(self._fill(compare=True, passes=1))
        raise RotationError(
            f"the database refused to swap {plan.full_name} and {plan.second}: {fault}. The "
            "column is as it was. Run it again to go on"
        )

    def _reconcile(self, written_since: sa.ColumnElement[bool] | None) -> Failures:
        """Fill again where a row differs from its source: all rows, or those `written_since`."""
        job = self._job(compare=True, written_since=written_since)
        pending = job.rows.count(self._connection, job.rows.pending)
        rows_read, failures = run_in_transaction(self._connection, job, self._plan.batch_size)
        # Nobody writes now. So if a row was skipped or read twice, the primary key has no reliable
        # order, and the swap would lose the value of a skipped row.
        if rows_read != pending:
            raise RotationError(
                f"table {self._owner.fullname} cannot be paged by its primary key, as with an "
                "inexact type (FLOAT). The column is as it was"
            )
        # Count again: under this lock, the swap loses every value that is missing.
        unfilled = job.rows.count(self._connection, job.unfilled)
        failures.count = max(failures.count, unfilled)
        return failures

    def _finish(self) -> None:
        """Finish after the swap: drop the other column, unless `drop` or `swap` is off."""
        plan = self._plan
        if plan.second in self._columns and plan.swap and plan.drop:
            self._refuse_what_would_be_lost(plan.second)
            Swap(self._operations, plan, self._columns).drop_column(plan.second)
            logger.info("dropped %s, which %s had replaced", plan.second, plan.full_name)
        else:
            logger.info("%s is %s already; nothing to do", plan.full_name, _contents(plan)[0])
        self._finish_check(plan.column_name)


def log_progress(verb: str, name: str, progress: RotationProgress) -> None:
    """Log how many values are done."""
    total = max(progress.total, progress.rotated)  # writers may have added values since the count
    if total:
        logger.info("%s %d of %d values of %s so far", verb, progress.rotated, total, name)


def log_failures(name: str, what: str, failed: Sequence[FailedRow], count: int) -> None:
    """Log the first failed values by primary key, and the number of the others."""
    for row in failed[:_FAILURES_LOGGED]:
        why = row.reason or row.error
        logger.error("%s of the row with primary key %r %s: %s", name, row.primary_key, what, why)
    if len(failed) > _FAILURES_LOGGED:
        logger.error("%s: %d more values, not logged", name, count - _FAILURES_LOGGED)


def _contents(plan: ConvertColumnOp) -> tuple[Content, Content]:
    """Return what the column will hold, and what the other one will."""
    return ("sealed", "plain") if plan.to_sealed else ("plain", "sealed")
