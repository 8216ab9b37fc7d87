"""The connection of a run: short explicit transactions, and what may be tried again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

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

# PostgreSQL, appendix A: serialization failure, deadlock, lock timeout, statement timeout or
# cancelled, too many connections.
_TRANSIENT_SQLSTATES: Final = frozenset({"40001", "40P01", "55P03", "57014", "53300"})
# Lock wait timeout, deadlock, statement timeout (MariaDB, MySQL), a row that changed since the
# snapshot (MariaDB).
_TRANSIENT_MYSQL_CODES: Final = frozenset({1205, 1213, 1969, 3024, 1020})


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
        if bind.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
            if bind.in_transaction():
                raise RotationError(
                    "the connection is inside a transaction; a rotation commits batch by batch and "
                    "will not end a transaction that is not its own. Commit it first, or pass the "
                    "engine"
                )
            level = bind.get_isolation_level()
            bind.rollback()  # asking began a transaction
            bind.execution_options(isolation_level="AUTOCOMMIT")
            self._restored_level = level
        self._begin_outermost(bind)
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
        if self._engine is not None:
            connection.close()
        elif self._restored_level is not None and not connection.invalidated:
            connection.rollback()
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
        if _is_in_transaction(connection):
            connection.close()
            raise RotationError(
                "the engine gives a connection that is inside a transaction already, as that of a "
                "SQLite memory database does within one thread: end that transaction first"
            )
        try:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            self._begin_outermost(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _begin_outermost(self, connection: Connection) -> None:
        # SQLAlchemy's documented recipe for SQLite emits BEGIN from a listener each time that
        # SQLAlchemy begins, also in AUTOCOMMIT mode. Let it do so now, and only now.
        if not connection.in_transaction():
            connection.begin()
        if _is_in_transaction(connection):
            connection.exec_driver_sql("COMMIT")

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
    if connection.dialect.name == "sqlite" and not _is_in_transaction(connection):
        return  # SQLite takes that for an error
    try:
        connection.exec_driver_sql("ROLLBACK")
    except DBAPIError as error:
        # Nothing but the end of the connection is sure to end the transaction. What is raised is
        # the error that the caller is about.
        connection.invalidate(error)


def _is_in_transaction(connection: Connection) -> bool:
    """Say whether the driver of a SQLite connection is in a transaction."""
    driver = connection.connection.driver_connection
    return connection.dialect.name == "sqlite" and bool(getattr(driver, "in_transaction", False))


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
