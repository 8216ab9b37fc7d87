"""The way to the tables of the registry: each step is one transaction, done once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from .. import _key_tables
from .._arguments import require_engine
from .._database.connection import ManagedConnection
from .._database.faults import Fault
from .._database.reflection import translated
from ..exceptions import ConfigurationError, ConflictError

_ATTEMPTS: Final = 20
"""Attempts at a step while other processes take steps. Each step has a receipt, and two receipts
cannot have one number, so the database lets one of two steps at a time through."""

_PAUSE: Final = 0.02

_T = TypeVar("_T")


class Store:
    """Reads and writes the tables of the registry.

    :raises ConfigurationError: `engine` is not an engine.
    """

    def __init__(self, engine: sa.Engine) -> None:
        require_engine(engine, "a key registry", "AsyncKeyRegistry")
        self.engine = engine

    def read(self, what: str, work: Callable[[sa.Connection], _T]) -> _T:
        """Return what `work` reads, in one short transaction.

        :param what: what it is for, as messages name it.
        :raises ConfigurationError: the tables are missing.
        :raises RotationError: the database ended it, or is a replica.
        """
        return self.work(what, lambda database: database.read(work), read_only=True)

    def step(self, what: str, work: Callable[[sa.Connection], _T]) -> _T:
        """Return what `work` does, in one transaction of its own.

        `work` looks first whether it was done: after a lost connection it is called again.

        :raises ConflictError: other processes took steps at each attempt.
        """

        def once(database: ManagedConnection) -> tuple[_T] | None:
            try:
                with database.transaction() as connection:
                    return (work(connection),)
            except IntegrityError:
                return None  # another process took a step meanwhile

        def attempts(database: ManagedConnection) -> _T:
            for _ in range(_ATTEMPTS):
                done = database.retry(lambda _: once(database))
                if done is not None:
                    return done[0]
                database.sleep(_PAUSE)
            raise ConflictError(
                f"{what} was not done: other processes kept changing the key registry. Call it "
                "again"
            )

        return self.work(what, attempts)

    def work(
        self, what: str, work: Callable[[ManagedConnection], _T], *, read_only: bool = False
    ) -> _T:
        """Do `work` with a connection open, if the tables are there."""
        database = ManagedConnection(self.engine, read_only=read_only)

        def checked() -> _T:
            database.read(_require_tables)
            return work(database)

        return database.run(checked, lambda fault: _describe(what, fault))


def has_tables(connection: sa.Connection) -> bool:
    """Say whether this database has a key registry."""
    schema = translated(connection, None)
    return sa.inspect(connection).has_table(_key_tables.keys.name, schema=schema)


def _require_tables(connection: sa.Connection) -> None:
    if not has_tables(connection):
        raise ConfigurationError(
            f"there is no table {_key_tables.keys.name} in this database: run a migration with "
            "op.create_lucent_keys(), or pass the right engine"
        )


def _describe(what: str, fault: Fault) -> str:
    return (
        f"the database ended {what}: {fault.message}. What was not committed was rolled back. "
        f"{fault.next_step('Call it again to go on')}"
    )
