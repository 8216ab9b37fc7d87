"""Refuse what may hide rows: a replica, a read-only server, row-level security.

A hidden row would be counted as done, and stay as it is.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from .._sql import is_mariadb, is_mysql
from ..exceptions import RotationError
from .relations import regclass

_HIDES: Final = text("SELECT row_security_active(CAST(to_regclass(:name) AS oid))")


def require_full_visibility(connection: Connection, name: str, schema: str | None) -> None:
    """Refuse a table of which PostgreSQL shows this user only some rows.

    :raises RotationError: a policy of row-level security applies to this user.
    """
    if connection.dialect.name != "postgresql":
        return
    if connection.scalar(_HIDES, {"name": regclass(connection, name, schema)}):
        raise RotationError(
            f"row-level security may hide rows of {name} from this user, and what is hidden would "
            "not be converted or counted. Connect as a role with BYPASSRLS, or as the table's "
            "owner without FORCE ROW LEVEL SECURITY"
        )


_POSTGRESQL: Final = text("SELECT pg_is_in_recovery(), current_setting('transaction_read_only')")
_MYSQL: Final = text(
    "SHOW VARIABLES WHERE Variable_name IN ('read_only', 'super_read_only', 'innodb_read_only',"
    " 'tx_read_only', 'transaction_read_only')"
)


def require_primary(connection: Connection) -> None:
    """Refuse a server that may lag behind another one, and a connection that may not write.

    :raises RotationError: it is a replica, or read-only.
    """
    name = connection.dialect.name
    if name == "postgresql":
        is_replica, read_only = connection.execute(_POSTGRESQL).one()
        fault = _REPLICA if is_replica else _read_only("transaction_read_only", read_only)
    elif is_mysql(connection.dialect):
        fault = _fault_on_mysql(connection)
    else:
        fault = _fault_on_sqlite(connection)
    if fault is not None:
        raise RotationError(
            f"{fault}: nothing can be re-encrypted here, and what is counted here is no proof that "
            "a key may go. Connect to the primary server, with a connection that may write"
        )


_REPLICA: Final = "this server is a replica, which may lag behind its primary"


def _read_only(setting: str, value: str) -> str | None:
    if value.upper() in ("OFF", "0"):
        return None
    return f"this server or connection is read-only ({setting} = {value})"


def _fault_on_mysql(connection: Connection) -> str | None:
    for setting, value in connection.execute(_MYSQL):
        fault = _read_only(setting, value)
        if fault is not None:
            return fault
    every = "ALL REPLICAS" if is_mariadb(connection.dialect) else "REPLICA"
    try:
        channels = connection.exec_driver_sql(f"SHOW {every} STATUS").mappings().all()
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        return None  # this user may not ask
    # Group replication has channels on its primary too; its other members are read-only.
    if all(str(row.get("Channel_Name")).startswith("group_replication") for row in channels):
        return None
    return f"{_REPLICA} (SHOW {every} STATUS; if it is none any more, RESET REPLICA ALL)"


def _fault_on_sqlite(connection: Connection) -> str | None:
    if connection.exec_driver_sql("PRAGMA query_only").scalar():
        return _read_only("PRAGMA query_only", "ON")
    # EXPLAIN only shows the program of the statement, and begins nothing. If the file was opened
    # read-only, the program's transaction does not write.
    program = connection.exec_driver_sql("EXPLAIN BEGIN IMMEDIATE").all()
    if any(opcode == "Transaction" and not writes for _, opcode, _, writes, *_ in program):
        return _read_only("the file", "opened to be read only")
    return None
