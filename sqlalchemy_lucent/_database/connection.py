"""The connection of a run: short explicit transactions, retried after passing faults."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final, Self, TypeVar

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool, QueuePool
from sqlalchemy.util.concurrency import in_greenlet

from .._sql import is_mysql
from ..exceptions import RotationError
from .async_bridge import sleep, wait_for
from .faults import Fault, breaks_off, errors_of, fault_of
from .visibility import require_primary

DEFAULT_RETRIES: Final = 12
"""Further attempts at a batch, with half the rows each: about half a minute in all."""

DEFAULT_LOCK_TIMEOUT: Final = 1.0
"""Seconds that a change of a table waits for its lock. Others queue behind it meanwhile."""

_FIRST_PAUSE: Final = 0.05  # seconds; doubled at each attempt
_LONGEST_PAUSE: Final = 4.0

_T = TypeVar("_T")

# READ COMMITTED, whatever the engine's default is. Under a stricter level a concurrent writer would
# make a batch fail, and MySQL's REPEATABLE READ locks the gaps between rows, where nobody could
# insert then. IMMEDIATE, because a SQLite transaction that reads first and writes later fails if
# somebody else has written in between.
_BEGIN: Final[dict[str, tuple[str, ...]]] = {
    "sqlite": ("BEGIN IMMEDIATE",),
    "postgresql": ("BEGIN ISOLATION LEVEL READ COMMITTED",),
    "mysql": ("SET TRANSACTION ISOLATION LEVEL READ COMMITTED", "BEGIN"),
}
_BEGIN["mariadb"] = _BEGIN["mysql"]

# Without a strict mode, MySQL silently truncates a value that is too long for its column. With
# "safe updates", it refuses an UPDATE with a join.
_SESSION: Final = text(
    "SELECT @@SESSION.sql_mode, @@SESSION.sql_safe_updates, @@log_bin, @@SESSION.binlog_format"
)
_SET_SESSION: Final = text("SET SESSION sql_mode = :sql_mode, SESSION sql_safe_updates = :safe")


def check_retries(retries: object) -> int:
    """Return `retries`, a number of further attempts.

    :raises RotationError: it is something else.
    """
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise RotationError("retries is a whole number, 0 or more")
    return retries


def back_off(attempt: int) -> float:
    """Return the seconds to wait after an attempt; the first has number 0."""
    return min(_FIRST_PAUSE * 2.0 ** min(attempt, 10), _LONGEST_PAUSE)


class ManagedConnection:
    """A connection that is replaced when it is lost, with short explicit transactions and retries.

    It is in AUTOCOMMIT mode, because it may be the connection of Alembic's autocommit block. There,
    SQLAlchemy's own transaction commits nothing.

    :param bind: an engine, whose connection is replaced when it is lost; or a connection, which is
        given back as it was.
    :param retries: further attempts after a passing fault.
    :param read_only: whether nothing will be written. Then a connection may be in a transaction of
        the caller's; everything is read in it, and nothing is retried.
    :raises RotationError: `bind` is neither, or its dialect is not supported.
    """

    def __init__(
        self,
        bind: Engine | Connection,
        *,
        retries: int = DEFAULT_RETRIES,
        read_only: bool = False,
    ) -> None:
        if not isinstance(bind, (Engine, Connection)):
            raise _not_a_bind(type(bind).__name__)
        if isinstance(bind, Connection) and bind.closed:
            raise RotationError("the connection is closed. Pass an open one, or the engine")
        if bind.dialect.is_async and not in_greenlet():
            raise RotationError(
                "the engine is an async one. Pass the AsyncEngine or AsyncConnection itself to the "
                "function that is to be awaited, such as arotate()"
            )
        self._bind = bind
        self._has_engine = isinstance(bind, Engine)
        self._connection: Connection | None = None
        self._retries = retries
        self._read_only = read_only
        self._in_callers_transaction = False
        self._was_connected = False
        self._restored_level: Any = None
        self._restored_session: dict[str, Any] | None = None
        self._began = False
        self.dialect = bind.dialect
        self._errors = errors_of(bind.dialect)
        if self.dialect.name not in _BEGIN:
            raise RotationError(
                f"there is no rotation for the dialect {self.dialect.name!r}; "
                f"there is one for {', '.join(_BEGIN)}"
            )

    def run(self, work: Callable[[], _T], describe: Callable[[Fault], str]) -> _T:
        """Do `work` with the connection open.

        :param describe: returns the message for the fault that ended it.
        :raises RotationError: the database ended it.
        """
        try:
            with self:
                return work()
        except Fault as fault:
            message = describe(fault)
        raise RotationError(message)

    def __enter__(self) -> Self:
        self.retry(lambda _: None)
        return self

    def __exit__(self, *_: object) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._restore(connection)

    @property
    def connection(self) -> Connection:
        """The connection, in AUTOCOMMIT mode unless it is in the caller's transaction."""
        assert self._connection is not None
        return self._connection

    @contextmanager
    def spare(self) -> Iterator[ManagedConnection | None]:
        """Another connection of the engine, for another thread; ``None`` if it has none to spare.

        It takes none beyond the pool's size: the overflow is for the application.
        """
        own = None
        with ExitStack() as stack:
            if _has_to_spare(self._bind):
                with suppress(Fault, RotationError):
                    own = stack.enter_context(ManagedConnection(self._bind, retries=0))
            yield own

    def sleep(self, seconds: float) -> None:
        """Wait; with an async driver, while the event loop goes on."""
        sleep(seconds, self.dialect)

    def retry(self, work: Callable[[int], _T], limit: int = 1, *, retries: int | None = None) -> _T:
        """Do `work` with `limit` rows at most; after a passing fault, retry with half the rows.

        :param retries: further attempts, if not as many as those of this run.
        :raises Fault: the fault is not a passing one, or did not pass.
        """
        attempt = 0
        while True:
            try:
                self.reconnect()
                return work(limit)
            except self._errors as error:
                fault, is_retried = self._fault(error)
            if attempt == (self._retries if retries is None else retries) or not is_retried:
                raise fault
            # Under contention, a whole batch may never get through. Half of it may.
            limit = max(1, limit // 2)
            # Without any connection so far, the address may be wrong: say so soon.
            longest = _LONGEST_PAUSE if self._was_connected else _LONGEST_PAUSE / 8
            pause = min(back_off(attempt), longest)
            self.sleep(pause * random.uniform(0.5, 1))  # noqa: S311  (jitter)
            attempt += 1

    def read(self, work: Callable[[Connection], _T]) -> _T:
        """Do `work`, which only reads, in a short transaction; retry after a passing fault.

        :raises Fault: the fault is not a passing one, or did not pass.
        """

        def once(_: int) -> _T:
            with self.reading() as connection:
                return work(connection)

        return self.retry(once)

    def _fault(self, error: Exception) -> tuple[Fault, bool]:
        """Return `error` as a fault, and whether to retry; give up a lost connection."""
        connection = self._connection
        lost = connection is None or connection.invalidated
        if connection is not None and not lost and not isinstance(error, SQLAlchemyError):
            # SQLAlchemy has not seen the error, and would go on with a broken connection.
            connection.invalidate(error)
            lost = True
        fault = fault_of(error, self.dialect, lost=lost)
        is_gone = lost and not self._has_engine
        if is_gone and not fault.advice:
            fault.advice = "Pass the engine, whose connection is replaced when it is lost"
        return fault, fault.passes and not self._in_callers_transaction and not is_gone

    def reconnect(self) -> None:
        """Connect, or replace a connection of the engine that was lost."""
        if self._connection is not None:
            if not (self._has_engine and self._connection.invalidated):
                return
            self._restore(self._connection)
            self._connection = None
        bind = self._bind
        connection = bind.connect() if isinstance(bind, Engine) else bind
        try:
            self._set_up(connection)
            self._connection = connection
            with self.reading():
                require_primary(connection)
        except BaseException as error:
            self._connection = None
            if isinstance(error, self._errors) and not isinstance(error, SQLAlchemyError):
                connection.invalidate(error)
            self._restore(connection)
            raise
        self._was_connected = True

    def _set_up(self, connection: Connection) -> None:
        """Put `connection` in the mode of this run; remember what to restore."""
        self._restored_level = self._restored_session = None
        self._began = False
        is_open = is_in_transaction(connection)
        if self._has_engine:
            if is_open and not self._read_only:
                raise RotationError(
                    "the engine gives a connection that is inside a transaction already, as that "
                    "of a SQLite memory database does within one thread: end that transaction first"
                )
        else:
            # If an event listener began the transaction for SQLAlchemy, it is ended below.
            is_open = is_open and not connection.dispatch.begin
            is_open = is_open or (connection.in_transaction() and not _is_autocommit(connection))
            if is_open and not self._read_only:
                raise RotationError(
                    "the connection is inside a transaction; a rotation commits batch by batch and "
                    "will not end a transaction that is not its own. Commit it first, or pass the "
                    "engine"
                )
        self._in_callers_transaction = is_open
        if is_open:
            return
        # First a statement by SQLAlchemy, which then detects a dead connection of the pool and
        # invalidates those as old as it. On MySQL, the driver changes the mode by itself.
        session = self._session(connection)
        if self._has_engine:
            # A server-side cursor would need a transaction, and every batch is read whole.
            connection.execution_options(
                isolation_level="AUTOCOMMIT", stream_results=False, yield_per=None
            )
        elif not _is_autocommit(connection):
            if connection.connection.is_detached:
                raise RotationError(
                    "the connection is detached from its pool, and not in AUTOCOMMIT mode, into "
                    "which SQLAlchemy puts only others. Pass the engine, or one of its connections"
                )
            level = connection.get_isolation_level()
            connection.rollback()  # asking began a transaction
            connection.execution_options(isolation_level="AUTOCOMMIT")
            self._restored_level = level
        # SQLAlchemy's documented recipe for SQLite emits BEGIN from a listener whenever SQLAlchemy
        # begins, even in AUTOCOMMIT mode. Let it do so now, and only now.
        if not connection.in_transaction():
            connection.begin()
            self._began = True
        if is_in_transaction(connection):
            connection.exec_driver_sql("COMMIT")
        if session is not None:
            self._restored_session = session
            # asyncmy escapes by backslashes whatever the mode says.
            kept = (m for m in session["sql_mode"].split(",") if m != "NO_BACKSLASH_ESCAPES")
            strict = ",".join(filter(None, (*kept, "STRICT_ALL_TABLES")))
            connection.execute(_SET_SESSION, {"sql_mode": strict, "safe": 0})

    def _restore(self, connection: Connection) -> None:
        # What fails here fails for the next user as well, and what was done stays done.
        with suppress(*self._errors):
            # The session of a lost connection is gone.
            if self._restored_session is not None and not connection.invalidated:
                connection.execute(_SET_SESSION, self._restored_session)
        if self._has_engine:
            with suppress(*self._errors):
                connection.close()
            return
        if self._began:
            with suppress(*self._errors):
                connection.rollback()
        if self._restored_level is not None:
            with suppress(*self._errors):
                connection.execution_options(isolation_level=self._restored_level)

    def _session(self, connection: Connection) -> dict[str, Any] | None:
        """Return the session's own settings on MySQL and MariaDB."""
        if not is_mysql(self.dialect):
            return None
        was_in_transaction = connection.in_transaction()
        sql_mode, safe, logs, log_format = connection.execute(_SESSION).one()
        if not was_in_transaction:
            connection.rollback()
        if logs and log_format == "STATEMENT" and not self._read_only:
            raise RotationError(
                "the server's binlog_format is STATEMENT, with which it refuses every update of a "
                "rotation, as they read what is committed. Set it to ROW or MIXED"
            )
        return {"sql_mode": sql_mode, "safe": safe}

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One short transaction; rolled back when anything is raised, including an interrupt."""
        connection = self.connection
        try:
            self._begin(connection)
            yield connection
            # A COMMIT may fail and leave the transaction open: on SQLite, while others read.
            connection.exec_driver_sql("COMMIT")
        except BaseException as error:
            if breaks_off(error, self.dialect):
                connection.invalidate(error)
            _roll_back(connection)
            raise

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A short transaction on PostgreSQL; elsewhere the connection as it is.

        A pooler of PostgreSQL may run each transaction, and so each statement outside of one, on
        another server.
        """
        if self._in_callers_transaction or self.dialect.name != "postgresql":
            yield self.connection
        else:
            with self.transaction() as connection:
                yield connection

    def _begin(self, connection: Connection) -> None:
        for statement in _BEGIN[self.dialect.name]:
            if self.dialect.driver == "asyncpg":
                # asyncpg would prepare it in a transaction of its own, which a pooler may run on
                # another server.
                driver: Any = connection.connection.driver_connection
                wait_for(driver.execute(statement))
            else:
                connection.exec_driver_sql(statement)


def _has_to_spare(bind: Engine | Connection) -> bool:
    if not isinstance(bind, Engine) or bind.dialect.is_async or bind.dialect.name == "sqlite":
        return False
    pool = bind.pool
    is_within = isinstance(pool, QueuePool) and pool.checkedout() < pool.size()
    return is_within or isinstance(pool, NullPool)


def _roll_back(connection: Connection) -> None:
    if connection.invalidated:
        return
    if connection.dialect.name == "sqlite" and not is_in_transaction(connection):
        return  # SQLite refuses a ROLLBACK then
    try:
        connection.exec_driver_sql("ROLLBACK")
    except errors_of(connection.dialect) as error:
        # Only closing the connection is sure to end the transaction. The caller raises the error
        # that led here.
        connection.invalidate(error)


def _is_autocommit(connection: Connection) -> bool:
    """Say whether `connection` is in AUTOCOMMIT mode, by itself or by its engine.

    The database cannot tell: it is a mode of the driver.
    """
    of_engine = getattr(connection.dialect, "_on_connect_isolation_level", None)
    level = connection.get_execution_options().get("isolation_level", of_engine)
    return isinstance(level, str) and level.upper().replace("_", " ") == "AUTOCOMMIT"


def is_in_transaction(connection: Connection) -> bool:
    """Say whether the driver's connection is in a transaction, whatever SQLAlchemy's state is."""
    driver: Any = connection.connection.driver_connection
    name = connection.dialect.name
    if name == "sqlite":
        return bool(getattr(driver, "in_transaction", False))
    if name == "postgresql":
        if hasattr(driver, "is_in_transaction"):  # asyncpg
            return bool(driver.is_in_transaction())
        info = getattr(driver, "info", None)  # psycopg; 0 is idle
        return bool(getattr(info, "transaction_status", 0))
    return bool(getattr(driver, "server_status", 0) & 1)  # SERVER_STATUS_IN_TRANS


def _not_a_bind(name: str) -> RotationError:
    hint = "; there are arotate(), astatus() … for it" if name.startswith("Async") else ""
    return RotationError(f"the bind is an Engine or a Connection, not {name}{hint}")
