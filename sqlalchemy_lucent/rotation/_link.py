"""The connection of a run: short explicit transactions, and what may be tried again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Final, Self

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from .._dialects import is_mysql
from ..exceptions import RotationError

# READ COMMITTED whatever the engine's default is: under a stricter level a batch would fail
# because of a concurrent writer, and MySQL's REPEATABLE READ locks the gaps between rows, so that
# nobody could insert there. IMMEDIATE, because a SQLite transaction that reads first and writes
# later fails as soon as somebody else has written in between.
_BEGIN: Final[dict[str, tuple[str, ...]]] = {
    "sqlite": ("BEGIN IMMEDIATE",),
    "postgresql": ("BEGIN ISOLATION LEVEL READ COMMITTED",),
    "mysql": ("SET TRANSACTION ISOLATION LEVEL READ COMMITTED", "BEGIN"),
}
_BEGIN["mariadb"] = _BEGIN["mysql"]

# A cursor of the server's would need a transaction, and every batch is read whole.
OUTSIDE_OF_TRANSACTIONS: Final[dict[str, Any]] = {
    "isolation_level": "AUTOCOMMIT",
    "stream_results": False,
    "yield_per": None,
}
"""Execution options of a connection that an engine gave."""

# PostgreSQL, appendix A: serialization failure, deadlock, lock timeout, statement timeout or
# cancelled, too many connections.
_TRANSIENT_SQLSTATES: Final = frozenset({"40001", "40P01", "55P03", "57014", "53300"})
# Lock wait timeout, deadlock, statement timeout (MariaDB, MySQL), a statement that was cancelled, a
# row that changed since the snapshot (MariaDB).
_TRANSIENT_MYSQL_CODES: Final = frozenset({1205, 1213, 1969, 3024, 1317, 1020})

# Without a strict mode, MySQL cuts a value that its column has no room for and says that it was
# written. And an UPDATE by a join is refused where "safe updates" are on.
_SESSION: Final = text("SELECT @@SESSION.sql_mode, @@SESSION.sql_safe_updates")
_SET_SESSION: Final = text("SET SESSION sql_mode = :sql_mode, SESSION sql_safe_updates = :safe")


class Link:
    """A connection in AUTOCOMMIT mode, on which :meth:`transaction` begins and commits.

    SQLAlchemy's own transaction does not serve: the connection may be Alembic's, inside its
    autocommit block, where that transaction is a stand-in that commits nothing.

    :param bind: an engine, whose connection is replaced when it is lost; or a connection that is
        in no transaction, which is given back as it was.
    :raises RotationError: `bind` is neither, is in a transaction, or is of another dialect.
    """

    def __init__(self, bind: Engine | Connection) -> None:
        if not isinstance(bind, (Engine, Connection)):
            raise not_a_bind(bind)
        self._engine = bind if isinstance(bind, Engine) else None
        self._connection = bind if isinstance(bind, Connection) else None
        self._restored_level: Any = None
        self._restored_session: tuple[str, int] | None = None
        self._began = False
        self.dialect = bind.dialect
        if self.dialect.name not in _BEGIN:
            raise RotationError(
                f"there is no rotation for the dialect {self.dialect.name!r}; "
                f"there is one for {', '.join(_BEGIN)}"
            )

    def __enter__(self) -> Self:
        if self._connection is None:
            self.renew()
            return self
        bind = self._connection
        if _is_autocommit(bind):
            # A transaction that a listener began for SQLAlchemy is ended below.
            if is_in_transaction(bind) and not bind.dispatch.begin:
                raise _inside_a_transaction()
        else:
            if bind.in_transaction():
                raise _inside_a_transaction()
            level = bind.get_isolation_level()
            bind.rollback()  # asking began a transaction
            bind.execution_options(isolation_level="AUTOCOMMIT")
            self._restored_level = level
        self._begin_outermost(bind)
        self._set_session(bind)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        connection = self._connection
        if connection is None:
            return
        self._restore_session(connection)
        if self._engine is not None:
            connection.close()
            return
        if self._began:
            connection.rollback()
        if self._restored_level is not None:
            # One that was lost connects again for it, which may fail: then so would its next use.
            with suppress(DBAPIError):
                connection.execution_options(isolation_level=self._restored_level)

    @property
    def connection(self) -> Connection:
        """The connection, in AUTOCOMMIT mode."""
        assert self._connection is not None
        return self._connection

    def renew(self) -> None:
        """Replace the connection if it is lost. Only the connections of an engine are."""
        if self._engine is None:
            return
        if self._connection is not None:
            if not self._connection.invalidated:
                return
            self._connection.close()
            self._connection = None
        connection = self._engine.connect()
        if is_in_transaction(connection):
            connection.close()
            raise RotationError(
                "the engine gives a connection that is inside a transaction already, as that of a "
                "SQLite memory database does within one thread: end that transaction first"
            )
        try:
            connection.execution_options(**OUTSIDE_OF_TRANSACTIONS)
            self._begin_outermost(connection)
            self._set_session(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _begin_outermost(self, connection: Connection) -> None:
        # SQLAlchemy's documented recipe for SQLite emits BEGIN from a listener each time that
        # SQLAlchemy begins, also in AUTOCOMMIT mode. Let it do so now, and only now.
        if not connection.in_transaction():
            connection.begin()
            self._began = True
        if is_in_transaction(connection):
            connection.exec_driver_sql("COMMIT")

    def _set_session(self, connection: Connection) -> None:
        if not is_mysql(self.dialect):
            return
        sql_mode, safe = connection.execute(_SESSION).one()
        self._restored_session = (sql_mode, safe)
        strict = ",".join(filter(None, (sql_mode, "STRICT_ALL_TABLES")))
        connection.execute(_SET_SESSION, {"sql_mode": strict, "safe": 0})

    def _restore_session(self, connection: Connection) -> None:
        # A connection that is lost has taken its session with it.
        if self._restored_session is not None and not connection.invalidated:
            sql_mode, safe = self._restored_session
            with suppress(DBAPIError):
                connection.execute(_SET_SESSION, {"sql_mode": sql_mode, "safe": safe})

    def recovers_from(self, error: DBAPIError) -> bool:
        """Say whether the same work may succeed if it is tried again."""
        if error.connection_invalidated or self._connection is None:
            return self._engine is not None
        return _is_transient(error, self.dialect.name)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One short transaction; rolled back when anything is raised, an interrupt included."""
        connection = self.connection
        try:
            for statement in _BEGIN[self.dialect.name]:
                connection.exec_driver_sql(statement)
            yield connection
            # A COMMIT may fail and leave the transaction open: on SQLite, while others read.
            connection.exec_driver_sql("COMMIT")
        except BaseException:
            _roll_back(connection)
            raise


def _roll_back(connection: Connection) -> None:
    if connection.invalidated:
        return
    if connection.dialect.name == "sqlite" and not is_in_transaction(connection):
        return  # SQLite takes that for an error
    try:
        connection.exec_driver_sql("ROLLBACK")
    except DBAPIError as error:
        # Nothing but the end of the connection is sure to end the transaction. What is raised is
        # the error that the caller is about.
        connection.invalidate(error)


def _inside_a_transaction() -> RotationError:
    return RotationError(
        "the connection is inside a transaction; a rotation commits batch by batch and will not "
        "end a transaction that is not its own. Commit it first, or pass the engine"
    )


def _is_autocommit(connection: Connection) -> bool:
    """Say whether `connection` was put in AUTOCOMMIT mode, or its engine puts all in it.

    The database does not know: to it, that is a mode of the driver's.
    """
    of_engine = getattr(connection.dialect, "_on_connect_isolation_level", None)
    level = connection.get_execution_options().get("isolation_level", of_engine)
    return isinstance(level, str) and level.upper().replace("_", " ") == "AUTOCOMMIT"


def is_in_transaction(connection: Connection) -> bool:
    """Say whether the driver's connection is in a transaction, whatever SQLAlchemy knows of it."""
    driver: Any = connection.connection.driver_connection
    name = connection.dialect.name
    if name == "sqlite":
        return bool(getattr(driver, "in_transaction", False))
    if name == "postgresql":
        if hasattr(driver, "is_in_transaction"):  # asyncpg
            return bool(driver.is_in_transaction())
        info = getattr(driver, "info", None)  # psycopg; 0 is idle
        return bool(getattr(info, "transaction_status", 0))
    return bool(getattr(driver, "server_status", 0) & _SERVER_STATUS_IN_TRANS)


_SERVER_STATUS_IN_TRANS: Final = 1  # of MySQL's protocol: Protocol::OK_Packet


# PostgreSQL, appendix A: data exception, integrity constraint violation, check option violation,
# an exception that PL/pgSQL raised.
_REFUSING_SQLSTATES: Final = ("22", "23", "44", "P0")
# Column cannot be NULL, duplicate, foreign key (2), out of range, wrong value, too long, SIGNAL,
# check constraint (MySQL, MariaDB).
_REFUSING_MYSQL_CODES: Final = frozenset(
    {1048, 1062, 1451, 1452, 1264, 1366, 1406, 1644, 3819, 4025}
)


def refuses_a_row(error: DBAPIError, dialect_name: str) -> bool:
    """Say whether the database would let other rows of the batch be changed: a constraint or a
    trigger is against one of them.
    """
    original: Any = error.orig
    if dialect_name == "sqlite":
        name = getattr(original, "sqlite_errorname", "")
        return name.startswith(("SQLITE_CONSTRAINT", "SQLITE_TOOBIG"))
    if dialect_name == "postgresql":
        return str(getattr(original, "sqlstate", None)).startswith(_REFUSING_SQLSTATES)
    return bool(original.args) and original.args[0] in _REFUSING_MYSQL_CODES


def _is_transient(error: DBAPIError, dialect_name: str) -> bool:
    original: Any = error.orig
    if dialect_name == "sqlite":
        name = getattr(original, "sqlite_errorname", "")
        return name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
    if dialect_name == "postgresql":
        return getattr(original, "sqlstate", None) in _TRANSIENT_SQLSTATES
    return bool(original.args) and original.args[0] in _TRANSIENT_MYSQL_CODES


def not_a_bind(bind: object) -> RotationError:
    """Return the error for what is neither an engine nor a connection."""
    name = type(bind).__name__
    hint = "; there are arotate(), astatus() … for it" if name.startswith("Async") else ""
    return RotationError(f"the bind is an Engine or a Connection, not {name}{hint}")
