"""Errors of a database or driver: whether to retry, and what to tell the user."""

from __future__ import annotations

import re
from typing import Any, Final

from sqlalchemy import Dialect
from sqlalchemy.exc import DataError, DBAPIError, PendingRollbackError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from .._sql import is_mysql

# PostgreSQL, appendix A. Serialization failure (a standby's recovery conflict too), deadlock, lock
# timeout, statement timeout or cancelled, too many connections; the server or the connection goes
# away or is not there yet; connection exceptions, but for a broken protocol.
_PASSING_SQLSTATES: Final = (
    *("40001", "40P01", "55P03", "57014", "53300"),
    *("57P01", "57P02", "57P03", "57P05", "25P03", "25P04"),
    *("08000", "08001", "08003", "08006"),
)
# Lock wait timeout, deadlock, statement timeout (MariaDB, MySQL), a statement that was cancelled, a
# row that changed since the snapshot (MariaDB); too many connections, a connection that was killed,
# a server that shuts down or is not ready (Galera, group replication).
_PASSING_MYSQL_CODES: Final = frozenset(
    {1205, 1213, 1969, 3024, 1317, 1020, 1040, 1203, 1927, 1053, 1047, 3101}
)

# A login that is refused, or a database that does not exist: a retry would end the same. psycopg
# has no code for errors while connecting.
_REFUSED_SQLSTATES: Final = ("28", "3D")
_REFUSED_MYSQL_CODES: Final = frozenset({1044, 1045, 1049, 1130, 1698})
_REFUSED_WORDS: Final = re.compile(
    r"authentication failed|no pg_hba\.conf entry|no password supplied"
    r"|FATAL: +(?:role|database) .* does not exist|statement pooling mode"
    r"|translate host name|resolve host|Name or service not known|getaddrinfo"
)

_TOO_LARGE: Final = 1153  # a packet, by max_allowed_packet

# PostgreSQL, appendix A: data exception, integrity constraint violation, check option violation,
# an exception that PL/pgSQL raised.
_REFUSING_SQLSTATES: Final = ("22", "23", "44", "P0")
# MySQL and MariaDB. Column cannot be NULL, duplicate, foreign key (2), SIGNAL, check constraint
# (2), a packet that is too large; out of range, cut off, wrong value (4), too long, not JSON.
_REFUSING_MYSQL_CODES: Final = frozenset(
    {_TOO_LARGE, 1048, 1062, 1451, 1452, 1644, 3819, 4025}
    | {1264, 1265, 1292, 1300, 1366, 1367, 1406, 3140}
)

# Errors whose messages quote only names of the schema or a trigger's own words. The others may
# quote a value.
_MYSQL_CODES_WITH_NAMES: Final = frozenset(
    {1044, 1045, 1048, 1049, 1054, 1130, 1142, 1143, 1146, 1227, 1264, 1290, 1364, 1370, 1406}
    | {1451, 1452, 1644, 1665, 1698, 1792, 1836, 1927, 3819, 4025, _TOO_LARGE}
)

_STATEMENT_POOLING: Final = (
    "The pooler is in statement mode, in which there are no transactions. Connect to the database "
    "itself, or to a pooler in transaction or session mode"
)
_MAY_NOT_ALTER: Final = re.compile(r"must be owner of|ALTER command denied")
_READ_ONLY: Final = "Connect to a server, and as a user, that may write"
_ADVICE: Final[dict[str | int, str]] = {
    **dict.fromkeys(("42501", 1142, 1143), "Grant this user SELECT and UPDATE on the table"),
    **dict.fromkeys(("25006", 1290, 1792, 1836), _READ_ONLY),
    **dict.fromkeys(("53100", 1021, 1114, "SQLITE_FULL"), "Make room on the server's disk"),
    "SQLITE_READONLY": "Open the database so that it may be written",
    _TOO_LARGE: "Raise max_allowed_packet",
    1665: "Set binlog_format to ROW or MIXED: rotations read what is committed, row by row",
}


class Fault(Exception):  # noqa: N818  (callers get a `RotationError` with its message)
    """Why the database or its driver ended some work.

    :param message: what the database said, without a value of a row.
    :param advice: what to do before a retry.
    :param passes: whether a retry may succeed.
    """

    def __init__(self, message: str, advice: str, passes: bool) -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice
        self.passes = passes

    def next_step(self, to_go_on: str = "Run it again to go on") -> str:
        """Say whether another run helps, and what to do first."""
        if self.advice:
            return f"{self.advice}, then run it again"
        return to_go_on if self.passes else "Another run would end like this one"


def errors_of(dialect: Dialect) -> tuple[type[Exception], ...]:
    """Return the errors that the database or its driver may raise.

    SQLAlchemy does not wrap the errors of a round trip outside of a statement, nor those of the
    network or asyncpg while connecting.
    """
    dbapi: Any = dialect.loaded_dbapi
    raised: list[type[Exception]] = [StatementError, PoolTimeoutError, PendingRollbackError]
    raised += [OSError, EOFError, dbapi.Error]
    asyncpg = getattr(dbapi, "asyncpg", None)
    if asyncpg is not None:
        raised += [asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError]
    return tuple(raised)


def fault_of(error: Exception, dialect: Dialect, *, lost: bool) -> Fault:
    """Return `error` as a fault.

    :param lost: whether there is no connection, or it was lost.
    """
    if isinstance(error, Fault):
        return error
    passes = _passes(error, dialect, lost=lost)
    return Fault(describe(error, dialect), _advice(error, dialect), passes)


def _passes(error: Exception, dialect: Dialect, *, lost: bool) -> bool:
    if isinstance(error, PoolTimeoutError):
        return False  # the pool has waited for its timeout already
    if isinstance(error, StatementError) and not isinstance(error, DBAPIError):
        return False  # the fault of a type
    code = _code(error, dialect)
    if dialect.name == "sqlite":
        return str(code).startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
    if is_mysql(dialect):
        known = code in _PASSING_MYSQL_CODES
        refused = code == _TOO_LARGE or code in _REFUSED_MYSQL_CODES
    else:
        known = code in _PASSING_SQLSTATES
        refused = str(code).startswith(_REFUSED_SQLSTATES)
    if refused or _REFUSED_WORDS.search(str(_original(error))):
        return False
    return known or lost


def refuses_a_row(error: DBAPIError, dialect: Dialect) -> bool:
    """Say whether a single row is at fault: it is too large, or a constraint or trigger objects."""
    code = _code(error, dialect)
    if dialect.name == "sqlite":
        return str(code).startswith(("SQLITE_CONSTRAINT", "SQLITE_TOOBIG"))
    if is_mysql(dialect):
        return code in _REFUSING_MYSQL_CODES
    # psycopg's own error has no code: Python cannot represent a value, such as an infinite date.
    of_driver = code is None and isinstance(error, DataError)
    return of_driver or str(code).startswith(_REFUSING_SQLSTATES)


def breaks_off(error: BaseException, dialect: Dialect) -> bool:
    """Say whether a packet was too large, and the server still waits for the rest of it."""
    return isinstance(error, DBAPIError) and _code(error, dialect) == _TOO_LARGE


def describe(error: Exception, dialect: Dialect) -> str:
    """Return what the database said, without anything that may be a value of a row."""
    if isinstance(error, PendingRollbackError):
        return "the connection was lost"  # and SQLAlchemy waits for a rollback
    original = _original(error)
    name = type(original).__name__
    if _may_show_anything(error, dialect):
        return name
    if is_mysql(dialect) and len(original.args) > 1:
        code, words = original.args[0], str(original.args[1])
        if code not in _MYSQL_CODES_WITH_NAMES and not 2000 <= code < 3000:  # the client's own
            words = _without_values(words)
        return f"{name}: {code}, {_first_line(words.splitlines())}"
    lines = re.sub(r"^<class '[^']*'>: ", "", str(original)).splitlines()
    first = _first_line(lines)
    code = _code(error, dialect)
    # SQLite's driver quotes text that is not UTF-8, by an error without a code.
    of_driver = code is None and dialect.name == "sqlite"
    if of_driver or isinstance(error, DataError) or str(code).startswith("22"):
        first = _without_values(first)
    hint = next((line for line in lines[1:] if line.startswith("HINT:")), None)
    return f"{name}: {first}" + (f" ({' '.join(hint.split())})" if hint else "")


def _advice(error: Exception, dialect: Dialect) -> str:
    if isinstance(error, PoolTimeoutError):
        return "Give it an engine of its own, such as one with poolclass=NullPool"
    if "statement pooling mode" in str(_original(error)):
        return _STATEMENT_POOLING
    if _MAY_NOT_ALTER.search(str(_original(error))):
        return "Connect as the table's owner, or grant this user ALTER on the table"
    code = _code(error, dialect)
    if dialect.name == "sqlite":
        code = "_".join(str(code).split("_")[:2])  # without the details, SQLITE_READONLY_DBMOVED
    return _ADVICE.get(code or "", "")


def _original(error: Exception) -> Any:
    """Return the driver's own exception."""
    found = getattr(error, "orig", None)
    return error if found is None else found


def _code(error: Exception, dialect: Dialect) -> str | int | None:
    """Return the database's own code, or the driver's for SQLite."""
    original = _original(error)
    if dialect.name == "sqlite":
        return getattr(original, "sqlite_errorname", None)
    if is_mysql(dialect):
        number = original.args[0] if original.args else None
        return number if isinstance(number, int) and not isinstance(original, OSError) else None
    code = getattr(original, "sqlstate", None)
    return code if isinstance(code, str) else None


def _may_show_anything(error: Exception, dialect: Dialect) -> bool:
    """Say whether the message comes from a type or a driver, and not from the database.

    A driver that cannot read its arguments may repeat a password.
    """
    if isinstance(error, (OSError, EOFError, PoolTimeoutError)):
        return False
    if isinstance(error, StatementError) and not isinstance(error, DBAPIError):
        return True
    dbapi: Any = dialect.loaded_dbapi
    of_database = (dbapi.OperationalError, dbapi.InternalError)
    connects = getattr(error, "statement", None) is None and _code(error, dialect) is None
    return connects and not isinstance(_original(error), of_database)


def _first_line(lines: list[str]) -> str:
    return lines[0].rstrip(". ") if lines else ""


_QUOTED: Final = re.compile(r"'.*'|\".*\"|(?:0x[0-9a-fA-F]+ ?)+|(?<=near ).*|(?<=: ).*", re.DOTALL)


def _without_values(words: str) -> str:
    return _QUOTED.sub("…", words)
