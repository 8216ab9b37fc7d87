"""What is sent to a worker of an executor, and what comes back: a range of one table.

A task is pickled here, by Python's own pickle, and given to the executor as bytes: whatever it
names (a function, a class) goes by its name, and is never taken apart as cloudpickle would do,
which copies the constants and globals of a function that it cannot import.

No key is in it. A worker makes its own keyring, and the task has the versions and fingerprints
that it must have.
"""

from __future__ import annotations

import inspect
import pickle
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine, NullPool, column, create_engine, table, text
from sqlalchemy.types import TypeEngine

from .._dialects import is_mysql
from ..exceptions import LucentError, RotationError
from ..keyring import Keyring, default_keyring
from ..types import EncryptedJSON
from ._faults import Fault
from ._ranges import KeyRange
from .report import Failures
from .targets import TargetColumn, TargetTable


@dataclass(frozen=True)
class Outcome:
    """What a worker made of a range."""

    rotated: int
    """Values written, and committed."""
    failures: Failures
    rest: KeyRange | None = None
    """What is left of the range; ``None`` when it is done."""
    fault: Fault | None = None
    """Why the database ended the work, if it did. The range is to be done again."""


Place = tuple[str | None, ...]
"""The database that a connection is in, and where it looks for tables without a schema."""


def place_of(connection: Connection) -> Place:
    """Return the place of `connection`, on PostgreSQL, MySQL or MariaDB."""
    statement = (
        "SELECT database()"
        if is_mysql(connection.dialect)
        else "SELECT current_database(), CAST(current_schemas(false) AS text)"
    )
    return tuple(connection.execute(text(statement)).one())


@dataclass(frozen=True)
class TableDescription:
    """What a worker must know of a table: names, types of keys, contexts.

    The application's models stay where they are: a worker need not be able to import them, unless
    a primary key or binding column has a type of the application's own.
    """

    name: str
    table: str
    schema: str | None
    plain: tuple[tuple[str, TypeEngine[Any]], ...]
    primary_key: tuple[str, ...]
    sealed: tuple[tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...]
    """Of each column: its name, contexts, ``bound_to``, and the names of those columns."""

    @classmethod
    def of(cls, target: TargetTable) -> TableDescription:
        """Describe `target`."""
        primary_key = tuple(part.name for part in target.primary_key)
        bound = (name for found in target.columns for name in found.bound_to)
        plain = dict.fromkeys((*primary_key, *bound))
        return cls(
            target.name,
            target.clause.name,
            target.clause.schema,
            tuple((name, target.clause.c[name].type) for name in plain),
            primary_key,
            tuple((c.name, c.type.contexts, c.type.bound_to, c.bound_to) for c in target.columns),
        )

    def target(self) -> TargetTable:
        """Return the table that is described."""
        clause = table(
            self.table,
            *(column(name, type_) for name, type_ in self.plain),
            *(column(name) for name, *_ in self.sealed),
            schema=self.schema,
        )
        columns = tuple(
            TargetColumn(
                name,
                EncryptedJSON(context=first, accept_contexts=earlier, bound_to=bound_to),
                bound_columns,
            )
            for name, (first, *earlier), bound_to, bound_columns in self.sealed
        )
        key = tuple(clause.c[name] for name in self.primary_key)
        return TargetTable(self.name, clause, key, columns)


@dataclass(frozen=True)
class Workplace:
    """How a worker comes by a connection and a keyring, and which keyring that must be."""

    url: str
    """Used without `connect`. Has no password."""
    dialect_name: str
    connect: Callable[[], Engine] | None
    keyring: Callable[[], Keyring] | None
    primary: str
    fingerprints: tuple[tuple[str, str], ...]

    @classmethod
    def of(
        cls,
        engine: Engine,
        connect: Callable[[], Engine] | None,
        make_keyring: Callable[[], Keyring] | None,
        keyring: Keyring,
    ) -> Workplace:
        """Describe where a worker of this process's `engine` and `keyring` works.

        :raises RotationError: the URL has a password or may have one.
        """
        url = ""
        if connect is None:
            if engine.url.password is not None or set(engine.url.query) - _HARMLESS_OPTIONS:
                raise RotationError(
                    "the engine's URL has a password or options that may hold one, which are not "
                    "sent to the workers of an executor: pass connect=, a function at the top "
                    "level of a module that returns an Engine, and let it take the password from "
                    "where you keep it"
                )
            url = engine.url.render_as_string(hide_password=False)
        return cls(
            url,
            engine.dialect.name,
            connect,
            make_keyring,
            keyring.primary,
            _fingerprints(keyring),
        )

    def open(self) -> Engine:
        """Return an engine for this worker alone.

        :raises RotationError: `connect` gives something else, or fails.
        """
        if self.connect is None:
            return create_engine(self.url, poolclass=NullPool)
        engine = _call("connect", self.connect)
        if not isinstance(engine, Engine) or engine.dialect.name != self.dialect_name:
            raise RotationError(
                f"connect= returns an Engine of the dialect {self.dialect_name!r}, "
                f"not {engine.dialect.name if isinstance(engine, Engine) else type(engine)!r}"
            )
        return engine

    def own_keyring(self) -> Keyring:
        """Return this worker's keyring.

        :raises RotationError: it has none, or not the one that the caller has.
        """
        try:
            keyring = _call("keyring", self.keyring or default_keyring)
        except RotationError:
            raise
        except LucentError as error:
            fault = f"has no keyring ({error})"
        else:
            if not isinstance(keyring, Keyring):
                fault = f"was given a {type(keyring).__name__} by keyring="
            elif (keyring.primary, _fingerprints(keyring)) != (self.primary, self.fingerprints):
                fault = f"has another keyring: {keyring!r}"
            else:
                return keyring
        expected = ", ".join(f"{version}={digits}" for version, digits in self.fingerprints)
        raise RotationError(
            f"a worker of the executor {fault}, where the caller has primary={self.primary} "
            f"{expected}. It wrote nothing. Give the workers the same LUCENT_SECRETS_KEYS, or "
            "pass keyring=, a function at the top level of a module that returns the keyring"
        )


@dataclass(frozen=True)
class Task:
    """One turn of work on a range."""

    workplace: Workplace
    table: TableDescription
    range: KeyRange
    options: Any
    place: Place
    """Where the caller finds the table."""
    id: uuid.UUID = field(default_factory=uuid.uuid4)
    """Makes no two tasks the same: Dask takes those for one, and gives the result that it has."""

    def check_place(self, connection: Connection) -> None:
        """Check that `connection`, a worker's, leads where the caller's does.

        :raises RotationError: it leads elsewhere.
        """
        found = place_of(connection)
        if found != self.place:
            raise RotationError(
                "the worker's connection leads to another database or schema "
                f"({_shown(found)}) than the caller's ({_shown(self.place)}). It wrote nothing. "
                "Pass connect=, a function at the top level of a module that returns an Engine "
                "with the arguments and listeners of the caller's"
            )

    def dumps(self) -> bytes:
        """Return the task as bytes.

        :raises RotationError: a type or function in it cannot be pickled by name.
        """
        try:
            return pickle.dumps(self)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            fault = f"{type(error).__name__}: {error}"
        raise RotationError(
            f"a range of {self.table.name} cannot be sent to a worker ({fault}); functions, and "
            "the types of keys, must stand at the top level of a module"
        )

    @classmethod
    def loads(cls, data: bytes) -> Task:
        """Return the task that was made bytes of by :meth:`dumps`.

        :raises RotationError: a type or function in it cannot be imported here.
        """
        try:
            task = pickle.loads(data)  # noqa: S301  (of the caller, through the executor)
        except (ImportError, AttributeError) as error:
            fault = f"{type(error).__name__}: {error}"
        else:
            assert isinstance(task, cls)
            return task
        raise RotationError(
            f"a worker of the executor cannot import what a range needs ({fault}); the functions "
            "given as connect= and keyring=, and the types of keys, must be importable there"
        )


def _shown(place: Place) -> str:
    return " ".join(part or "none" for part in place)


# All others may hold a secret: a driver may have a dozen ways to be given one.
_HARMLESS_OPTIONS = frozenset(
    {
        "application_name",
        "charset",
        "connect_timeout",
        "host",
        "port",
        "sslmode",
        "sslrootcert",
        "target_session_attrs",
    }
)


def check_goes_by_name(name: str, function: object) -> None:
    """Refuse what a pickle would hold more of than a name: a partial may have a key in it.

    :raises RotationError: `function` is not ``None``, and not a function that pickles by its name.
    """
    if function is None:
        return
    given = function
    if inspect.ismethod(function):
        function = function.__self__  # of a class: Keyring.from_env
        goes = inspect.isclass(function)
    else:
        goes = inspect.isfunction(function) or inspect.isclass(function)
    fault = f"this {type(function).__name__} is none"
    if goes:
        try:
            pickle.dumps(given)
        except (pickle.PicklingError, AttributeError, TypeError):
            fault = f"{getattr(given, '__qualname__', 'this one')} is not found there"
        else:
            return
    raise RotationError(
        f"{name}= is a function at the top level of a module, which workers import by its name; "
        f"{fault}"
    )


def _fingerprints(keyring: Keyring) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((version, keyring.fingerprint(version)) for version in keyring.versions))


def _call(name: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except LucentError:
        raise
    except Exception as error:  # noqa: BLE001  (a function of the user's may raise anything)
        fault = type(error).__name__
    # Not chained, and its words not repeated: they may hold what it read.
    raise RotationError(f"{name}= raised {fault} in a worker of the executor")
