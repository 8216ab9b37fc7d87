"""What the steps on versions share: the tables and how they join, arguments, what is shown.

The row of ``lucent_secrets`` holds the current value, ``lucent_secret_versions`` all others. A row
of ``lucent_secret_states`` describes the current value while its `written_at` is the secret's
`updated_at`. A store that knows nothing of these tables changes `updated_at`, and so the row says
nothing about the value that it stored.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from ._driver_errors import sqlstate
from ._sql import is_mysql
from ._upsert import Execute, has_key, key_columns, same_key
from .exceptions import (
    ConfigurationError,
    InvalidKeyError,
    SecretNotFoundError,
    SerializationError,
)
from .models import LifecycleTables, UTCDateTime, lifecycle_tables, utc_now
from .secret_key import SecretKey

Stage = Literal["current", "previous", "staged", "pending", "deleted"]

READABLE_STAGES: Final = ("current", "previous", "staged", "pending")

NO_NUMBER: Final = 2**31 - 1
"""Stands for the number of a current value that has none: it is the newest."""


@dataclass(frozen=True)
class SecretVersion:
    """What is known about a version of a secret without opening it.

    `number` is ``None`` for a current value that a store without versions has written. `stage` is
    ``current``, ``previous`` (the one before it), ``staged`` (tried before it counts), ``pending``
    (a renewal's answer that came late), ``deleted``, or ``None`` for an older one. `created_at` is
    when the value was stored.
    """

    number: int | None
    stage: Stage | None
    created_at: datetime
    expires_at: datetime | None
    key_version: str | None


# -- tables and conditions -------------------------------------------------------------------------


def required_tables(table: sa.Table) -> LifecycleTables:
    """Return the tables beside `table`.

    :raises ConfigurationError: its metadata has none.
    """
    found = lifecycle_tables(table)
    if found is None:
        raise ConfigurationError(
            f"the model of {table.name} has no tables of versions and states. Decorate it with "
            "@with_lifecycle, and run a migration with op.upgrade_lucent_secrets()"
        )
    return found


def describes(states: sa.Table, table: sa.Table) -> sa.ColumnElement[bool]:
    """Return the condition that a state is that of the secret's current value."""
    return sa.and_(same_key(states, table), states.c.written_at == table.c.updated_at)


def is_ordinary(versions: sa.Table, current: Any) -> sa.ColumnElement[bool]:
    """Return the condition that a version was current, or was to be before `current` was stored.

    A pending value is overtaken by whatever is stored after it. This is read from the numbers, so
    that no writer needs another statement for it.
    """
    stage = versions.c.stage
    return sa.or_(stage.is_(None), sa.and_(stage == "pending", versions.c.number < current))


def select_deleted(table: sa.Table, tables: LifecycleTables) -> Any:
    """Select what is known about the secrets that can be undeleted."""
    versions, states = tables
    return (
        sa.select(
            *key_columns(versions),
            versions.c.key_version,
            sa.func.coalesce(states.c.created_at, versions.c.created_at, type_=UTCDateTime).label(
                "created_at"
            ),
            versions.c.created_at.label("updated_at"),
            sa.null().label("prefix"),
            versions.c.number,
            versions.c.expires_at,
            states.c.deleted_at,
            states.c.purge_at,
        )
        .join_from(versions, states, same_key(versions, states))
        .where(
            versions.c.stage == "deleted",
            ~sa.exists().where(same_key(table, versions)).correlate(versions),
        )
    )


def time_of(dialect: sa.Dialect) -> sa.ColumnElement[datetime]:
    """Return the database's current time as an expression.

    A SQLite database is on this machine, and has its clock.
    """
    if dialect.name == "sqlite":
        return sa.bindparam("now", callable_=utc_now, type_=UTCDateTime())
    now = sa.func.utc_timestamp(6) if is_mysql(dialect) else sa.func.clock_timestamp()
    return sa.type_coerce(now, UTCDateTime())


def missing_tables(error: DBAPIError, tables: LifecycleTables) -> ConfigurationError | None:
    """Return what to raise for an error of the database, if it is that a table is missing."""
    driver: Any = error.orig
    code = driver.args[0] if driver.args else None
    is_missing = (
        sqlstate(driver) == "42P01"
        or code == 1146
        or (isinstance(code, str) and code.startswith("no such table"))
    )
    shown = str(driver)
    missing = [table.name for table in tables if table.name in shown]
    if not is_missing or not missing:
        return None
    return ConfigurationError(
        f"this database has no table {missing[0]}, which versions, due dates and soft delete need: "
        "run a migration with op.upgrade_lucent_secrets(), which autogenerate writes"
    )


def run(
    execute: Execute, tables: LifecycleTables, statement: Any, parameters: Any = None
) -> sa.CursorResult[Any]:
    """Execute a statement that needs the tables.

    :raises ConfigurationError: they are missing in the database.
    """
    try:
        return execute(statement, parameters)
    except DBAPIError as error:
        fault = missing_tables(error, tables)
        if fault is None:
            raise
    raise fault


# -- listing ------------------------------------------------------------------------------------


def list_versions(table: sa.Table, key: SecretKey, execute: Execute) -> list[SecretVersion]:
    """Return what is known about each version of a secret, the newest first."""
    tables = required_tables(table)
    versions, states = tables
    current = run(
        execute,
        tables,
        sa.select(states.c.number, table.c.updated_at, states.c.expires_at, table.c.key_version)
        .select_from(table.outerjoin(states, describes(states, table)))
        .where(has_key(table, key)),
    ).first()
    archived = run(
        execute,
        tables,
        sa.select(*(versions.c[field.name] for field in fields(SecretVersion)))
        .where(has_key(versions, key), sa.func.coalesce(versions.c.stage, "") != "deleted")
        .order_by(versions.c.number.desc()),
    ).all()
    if current is None:
        return [SecretVersion(*tuple(row)) for row in archived if row.stage == "staged"]
    number, *rest = tuple(current)
    listed = [SecretVersion(number, "current", *rest)]
    has_previous = False
    for row in archived:
        if row.number == number:
            continue  # another writer archived it after it was read
        stage = row.stage
        if stage == "pending" and (number is None or row.number < number):
            stage = None
        if stage is None and not has_previous:
            stage, has_previous = "previous", True
        listed.append(SecretVersion(row.number, stage, *tuple(row)[2:]))
    listed.sort(key=lambda version: version.number or NO_NUMBER, reverse=True)
    return listed


# -- arguments -------------------------------------------------------------------------------------


def check_expiry(expires_at: object) -> datetime | None:
    """Return `expires_at` if it is in the future, or ``None``.

    :raises SerializationError: it is no datetime, has no time zone, or is in the past.
    """
    if expires_at is None:
        return None
    moment = check_moment("expires_at", expires_at)
    if moment <= utc_now():
        raise SerializationError(
            f"expires_at= is in the past, {moment.isoformat()}: the value would count as expired "
            "at once"
        )
    return moment


def check_moment(name: str, given: object) -> datetime:
    """Return `given` if it is a datetime with a time zone, in UTC.

    :raises SerializationError: it is not.
    """
    if not isinstance(given, datetime):
        raise SerializationError(f"{name}= takes a datetime, not {type(given).__name__}")
    if given.utcoffset() is None:
        raise SerializationError(
            f"{name}= takes a datetime with a time zone, such as datetime.now(UTC) + "
            "timedelta(hours=1)"
        )
    try:
        return given.astimezone(UTC)
    except OverflowError:
        pass
    raise SerializationError(f"{name}= is out of range in UTC")


def check_delay(purge_after: object) -> timedelta | None:
    """Return `purge_after` if it is a positive timedelta, or ``None``.

    :raises SerializationError: it is not.
    """
    if purge_after is None:
        return None
    if not isinstance(purge_after, timedelta):
        raise SerializationError(
            f"purge_after= takes a timedelta, not {type(purge_after).__name__}"
        )
    if purge_after <= timedelta(0):
        raise SerializationError("purge_after= takes a positive timedelta")
    try:
        utc_now() + purge_after
    except OverflowError:
        pass
    else:
        return purge_after
    raise SerializationError("purge_after= is longer than a datetime can express")


def check_number(number: object) -> int:
    """Return the number of a version.

    :raises InvalidKeyError: it is none.
    """
    if isinstance(number, int) and not isinstance(number, bool) and 0 < number < 2**31:
        return number
    shown = number if isinstance(number, int) else type(number).__name__
    raise InvalidKeyError(f"the number of a version is an integer from 1 on, not {shown}")


def version_not_found(key: SecretKey, what: str) -> SecretNotFoundError:
    """Return the error for a version that is not there."""
    return SecretNotFoundError(
        f"the secret {key} has no {what}: it was never stored, or is no longer kept"
    )
