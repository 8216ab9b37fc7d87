"""Which database and which models a command works on. The password of a URL is never shown."""

from __future__ import annotations

import configparser
import contextlib
import importlib
import operator
import os
import sys
import tomllib
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    JSON,
    URL,
    Column,
    Engine,
    MetaData,
    String,
    create_engine,
    inspect,
    make_url,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.orm import Mapper, registry
from sqlalchemy.pool import NullPool
from sqlalchemy.types import TypeEngine

from .._database.relations import relation_of
from ..models import LucentBase, LucentSecretMixin
from ..rotation.targets import Target, TargetTable, columns_in, resolve_targets, tables_in
from .terminal import CommandError

if TYPE_CHECKING:
    from alembic.config import Config

URL_VARIABLE: Final = "DATABASE_URL"
METADATA_VARIABLE: Final = "LUCENT_METADATA"

_CONNECT_TIMEOUT: Final = 10
"""Seconds to wait for PostgreSQL, whose driver would wait for minutes; PyMySQL's default."""

_BACKENDS: Final = {
    "sqlite": "sqlite",
    "postgresql": "postgresql",
    "postgres": "postgresql",  # what some platforms put into DATABASE_URL
    "mysql": "mysql",
    "mariadb": "mariadb",
}
# The drivers that are looked for, in order, each with the module that it is.
_SYNC_DRIVERS: Final = {
    "sqlite": (("pysqlite", "sqlite3"),),
    "postgresql": (("psycopg", "psycopg"), ("psycopg2", "psycopg2")),
    "mysql": (("pymysql", "pymysql"), ("mysqldb", "MySQLdb")),
}
_SYNC_DRIVERS["mariadb"] = _SYNC_DRIVERS["mysql"]
_ASYNC_DRIVERS: Final = frozenset({"aiosqlite", "asyncpg", "psycopg_async", "asyncmy", "aiomysql"})
_EXTRAS: Final = {"postgresql": "postgresql", "mysql": "mysql", "mariadb": "mysql"}


# -- the URL ---------------------------------------------------------------------------------------


def alembic_config() -> Config | None:
    """Return the configuration of the Alembic environment in this directory, if there is one."""
    ini = Path(os.environ.get("ALEMBIC_CONFIG", "alembic.ini"))
    toml = Path("pyproject.toml")
    if not ini.is_file() and not (toml.is_file() and "[tool.alembic" in toml.read_text("utf-8")):
        return None
    from alembic.config import Config  # not before: it takes its time to import

    return Config(ini if ini.is_file() else None, toml_file=toml if toml.is_file() else None)


def find_url(given: str | None) -> URL:
    """Return the URL of the database, with a synchronous driver.

    :param given: what the command line says; then come DATABASE_URL and Alembic's `sqlalchemy.url`.
    :raises CommandError: there is none, or it cannot be one.
    """
    for source, text in (("--url", given), (URL_VARIABLE, os.environ.get(URL_VARIABLE))):
        if text:
            return _with_sync_driver(_parse(text, source), source)
    text = _alembic_url()
    if text:
        return _with_sync_driver(_parse(text, "sqlalchemy.url"), "sqlalchemy.url")
    raise CommandError(
        f"no database is named: set {URL_VARIABLE}, or sqlalchemy.url in alembic.ini, or pass --url"
    )


def _alembic_url() -> str | None:
    fault = None
    try:
        config = alembic_config()
        if config is None:
            return None
        url: Any = config.get_main_option("sqlalchemy.url")
        if url is None:
            options = config.toml_alembic_config
            # TOML takes the dot of a key that is not quoted for a table.
            url = options.get("sqlalchemy.url") or (options.get("sqlalchemy") or {}).get("url")
    except (configparser.Error, tomllib.TOMLDecodeError, OSError, ValueError) as error:
        fault = type(error).__name__  # its message may quote the URL
    if fault:
        raise CommandError(f"sqlalchemy.url cannot be read from Alembic's configuration: {fault}")
    # What `alembic init` writes is no database.
    return None if not isinstance(url, str) or url.startswith("driver://") else url


def _parse(text: str, source: str) -> URL:
    # SQLAlchemy's own messages are not passed on: they may quote a part of the password.
    url = None
    with contextlib.suppress(ArgumentError, ValueError):
        url = make_url(text)
    if url is None:
        raise CommandError(
            f"{source} is not a database URL: dialect://user:password@host:port/database, in which "
            "a : / @ or % of the password is written as %3A %2F %40 %25"
        )
    # The first @ ends the password, so that behind another one a part of it would be taken for the
    # host, the database or an option. The path of a SQLite file may have any.
    expected = 0 if url.username is None else 1
    if text.count("@") > expected and not url.drivername.startswith("sqlite"):
        raise CommandError(
            f"{source} has an @ or / in its user or password: write it as %40 or %2F"
        )
    return url


def _with_sync_driver(url: URL, source: str) -> URL:
    name, _, driver = url.drivername.partition("+")
    backend = _BACKENDS.get(name)
    if backend is None:
        raise CommandError(
            f"{source} is for a kind of database that is not supported; "
            "these are: sqlite, postgresql, mysql, mariadb"
        )
    if driver and driver not in _ASYNC_DRIVERS:
        return url.set(drivername=f"{backend}+{driver}")
    for found, module in _SYNC_DRIVERS[backend]:
        if find_spec(module) is not None:
            query = dict(url.query)
            if driver == "asyncpg":
                query = {k: v for k, v in query.items() if not k.startswith("prepared_statement")}
                if "ssl" in query:
                    query["sslmode"] = query.pop("ssl")
            return url.set(drivername=f"{backend}+{found}", query=query)
    wanted = f"{driver} is an async driver, and the command needs a" if driver else "there is no"
    raise CommandError(
        f"{wanted} synchronous driver for {backend}: "
        f"pip install 'sqlalchemy-lucent[{_EXTRAS[backend]}]'"
    )


# -- the database ----------------------------------------------------------------------------------


@contextmanager
def connected(given: str | None) -> Iterator[Engine]:
    """Give an engine over the database that is named, which did answer.

    :raises CommandError: it does not, and why.
    """
    url = find_url(given)
    engine = engine_of(url)
    try:
        _try_connecting(engine)
        yield engine
    finally:
        engine.dispose()


def engine_of(url: URL) -> Engine:
    """Return an engine over `url`, whose errors do not show parameters.

    :raises CommandError: its driver is not installed, or `url` has an option that it lacks.
    """
    if url.get_backend_name() == "sqlite":
        path = url.database or ":memory:"
        # SQLite would make one, and find it empty.
        if path != ":memory:" and not path.startswith("file:") and not Path(path).is_file():
            raise CommandError(f"there is no SQLite database at {path}")
    timeout = {}
    if url.get_backend_name() == "postgresql" and "connect_timeout" not in url.query:
        timeout = {"connect_timeout": _CONNECT_TIMEOUT}
    try:
        return create_engine(url, hide_parameters=True, poolclass=NullPool, connect_args=timeout)
    except NoSuchModuleError:
        fault = f"SQLAlchemy does not know the driver of {url.drivername}"
    except ImportError as error:
        extra = _EXTRAS.get(url.get_backend_name(), "all")
        fault = (
            f"the driver of {url.drivername} is not installed ({_first_line(error)}): "
            f"pip install 'sqlalchemy-lucent[{extra}]'"
        )
    except (ArgumentError, TypeError, ValueError):
        fault = f"the URL has an option that {url.drivername} does not take"
    raise CommandError(fault)


def _try_connecting(engine: Engine) -> None:
    try:
        with engine.connect():
            return
    except DBAPIError as error:
        fault = f"cannot connect to {where(engine.url)}: {_without_password(error, engine.url)}"
    except (TypeError, ValueError):
        fault = f"the URL has an option that {engine.url.drivername} does not take"
    except OSError as error:
        fault = f"cannot connect to {where(engine.url)}: {error.strerror or type(error).__name__}"
    raise CommandError(fault)


def where(url: URL) -> str:
    """Return what of `url` may be shown: no user, no password, no options."""
    if url.get_backend_name() == "sqlite":
        return f"SQLite at {url.database or ':memory:'}"
    port = f":{url.port}" if url.port else ""
    return (
        f"{url.get_backend_name()} at {url.host or 'the local socket'}{port}/{url.database or ''}"
    )


def refusal_of(error: DBAPIError) -> str:
    """Return what the database said: its first line, because the next ones may repeat the row."""
    return _first_line(_said(error))


def _said(error: DBAPIError) -> object:
    original = error.orig
    if original is not None and len(original.args) == 2 and isinstance(original.args[0], int):
        return original.args[1]  # PyMySQL's: a number and a sentence
    return original


def _without_password(error: DBAPIError, url: URL) -> str:
    sentence = " ".join(str(_said(error)).split())
    passwords = {str(url.password or ""), *_strings(url, "password"), *_strings(url, "passwd")}
    for password in passwords - {"", url.username, url.host, url.database}:
        # Nothing is cut out: what is left around it would say what was there.
        if password in sentence:
            return f"{type(error.orig).__name__}; its message is not shown, to keep the password"
    return sentence


def _strings(url: URL, option: str) -> Sequence[str]:
    return url.normalized_query.get(option) or ()


def _first_line(error: object) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# -- the models ------------------------------------------------------------------------------------


def load_targets(names: Sequence[str] | None) -> list[Target]:
    """Return the objects that `names` say, each ``package.module:name``; LucentBase if none is.

    The modules are imported, so an application's own keyring is set if one of them sets it.

    :raises CommandError: one cannot be imported, or has no such name.
    """
    if not names:
        return [LucentBase]
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as for `python -m`
    return [_load(name) for name in names]


def _load(name: str) -> Target:
    given = name in os.environ.get(METADATA_VARIABLE, "").split()
    source = METADATA_VARIABLE if given else "--metadata"
    module_name, separator, attribute = name.partition(":")
    if not module_name or not separator or not attribute:
        raise CommandError(f"{source} is of the form package.module:Base, not {name!r}")
    if "/" in module_name or module_name.endswith(".py"):
        dotted = module_name.removeprefix("./").removesuffix(".py").replace("/", ".").strip(".")
        raise CommandError(
            f"{source} takes a module, and {module_name} is a path: {dotted}:{attribute}"
        )
    try:
        # What an application prints while it is imported is not our output.
        with contextlib.redirect_stdout(sys.stderr):
            module = importlib.import_module(module_name)
        target: Target = operator.attrgetter(attribute)(module)
    except ImportError as error:
        fault = f"{source} {name}: {_first_line(error)}"
    except AttributeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            fault = _raised(f"{source} {name}", error)
        else:
            fault = f"{source} {name}: module {module_name} has no {attribute}"
    except (Exception, SystemExit) as error:  # noqa: BLE001  (an application may raise anything)
        fault = _raised(f"{source} {name}", error)
    else:
        return target
    raise CommandError(fault)


def _raised(named: str, error: BaseException) -> str:
    (*_, last) = traceback.extract_tb(error.__traceback__)
    return (
        f"{named}: importing it raised {type(error).__name__} at "
        f"{last.filename}:{last.lineno}; import it in Python to see why"
    )


@dataclass(frozen=True)
class Selection:
    """What the options ``--metadata``, ``--table`` and ``--column`` name."""

    metadata: Sequence[str] | None
    tables: Sequence[str] | None = None
    columns: Sequence[str] | None = None

    def targets(self) -> Sequence[Target]:
        """Import the models, and return what is selected of them.

        :raises CommandError: a name is not that of an encrypted column, or of a table with one.
        """
        return _narrowed(load_targets(self.metadata), self.tables, self.columns)


def _narrowed(
    targets: Sequence[Target], tables: Sequence[str] | None, columns: Sequence[str] | None
) -> Sequence[Target]:
    """Return `targets`, or those of their columns that are in `tables` and among `columns`."""
    if not tables and not columns:
        return targets
    found = list(columns_in(targets))
    for option, given, names in (
        ("--table", tables or (), _table_names),
        ("--column", columns or (), _column_names),
    ):
        known = {name for column in found for name in names(column)}
        for name in given:
            if name not in known:
                raise CommandError(
                    f"{option} {name}: no such encrypted column; there are "
                    f"{', '.join(sorted(str(column) for column in found)) or 'none'}"
                )
        found = [c for c in found if not given or not names(c).isdisjoint(given)]
    if not found:
        raise CommandError("no encrypted column is both in --table and named by --column")
    return found


def _table_names(column: Column[Any]) -> set[str]:
    return {column.table.name, column.table.fullname}


def _column_names(column: Column[Any]) -> set[str]:
    return {column.name, *(f"{table}.{column.name}" for table in _table_names(column))}


def present_tables(engine: Engine, targets: Sequence[Target]) -> list[TargetTable]:
    """Return the tables of `targets`, without what is a view or foreign table there.

    :raises CommandError: one is not in the database, or one of the columns that are needed is not,
        or is not encrypted there.
    :raises RotationError: there is no encrypted column among them.
    """
    tables = []
    inspector = inspect(engine)
    for table in resolve_targets(targets, engine):
        name, schema = table.clause.name, table.clause.schema
        with engine.connect() as connection:
            found = relation_of(connection, name, schema)
        if found is None:
            raise CommandError(
                f"table {table.name} is not in the database ({where(engine.url)}): run your "
                "migrations, or name another database"
            )
        if not found.is_table:
            continue
        tables.append(table)
        # SQLite and MySQL take a column by its name in any case.
        columns = inspector.get_columns(name, schema=schema)
        types = {c["name"].lower(): c["type"] for c in columns}
        missing = [c.name for c in table.clause.columns if c.name.lower() not in types]
        if missing:
            raise CommandError(
                f"table {table.name} lacks {', '.join(missing)} in the database "
                f"({where(engine.url)}): run your migrations (alembic upgrade head)"
            )
        for column in table.columns:
            type_ = types[column.name.lower()]
            if holds_text(type_):
                raise CommandError(
                    f"column {table.name}.{column.name} is {type_.compile(engine.dialect)} in the "
                    f"database ({where(engine.url)}), which holds no sealed bytes: run the "
                    "migration that encrypts it (op.encrypt_column)"
                )
    return tables


def holds_text(type_: TypeEngine[Any]) -> bool:
    """Say whether a column of the database has the type that it had before it was encrypted.

    PostgreSQL and MySQL refuse to look for sealed bytes in it.
    """
    return isinstance(type_, (JSON, String))


def secrets_model(names: Sequence[str] | None) -> type[LucentSecretMixin]:
    """Return the model of scoped secrets among what `names` say.

    :raises CommandError: there is none, or there are several.
    """
    models = {model for target in load_targets(names) for model in _secrets_models(target)}
    if not models:
        raise CommandError(
            "--metadata has no model of scoped secrets (LucentSecretMixin); the table "
            "lucent_secrets is --metadata sqlalchemy_lucent:LucentBase"
        )
    if len(models) > 1:
        raise CommandError(
            "--metadata has several models of scoped secrets (LucentSecretMixin); name the model "
            "itself, as in --metadata package.module:Secret"
        )
    return models.pop()


def _secrets_models(target: Any) -> Iterator[type[LucentSecretMixin]]:
    if isinstance(target, Iterable) and not isinstance(target, (str, bytes)):
        for member in target:
            yield from _secrets_models(member)
        return
    is_whole = isinstance(target, (MetaData, registry, type)) and not _is_mapped(target)
    named = tables_in(target) if is_whole else [target]
    for model in _mapped_below(LucentSecretMixin):
        if any(it is model or it is model.__table__ for it in named):
            yield model


def _mapped_below(class_: type[Any]) -> Iterator[type[Any]]:
    """Give the mapped classes that derive from `class_`."""
    for below in class_.__subclasses__():
        if _is_mapped(below):
            yield below
        yield from _mapped_below(below)


def _is_mapped(target: object) -> bool:
    return isinstance(inspect(target, raiseerr=False), Mapper)
