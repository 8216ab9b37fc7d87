"""Find the database and the models that a command works on. No message shows a password."""

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
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.orm import Mapper, registry
from sqlalchemy.pool import NullPool
from sqlalchemy.types import TypeEngine

from .._database.relations import Relation, relation_of
from ..models import LucentBase, LucentSecret, LucentSecretMixin
from ..rotation.targets import Target, TargetTable, columns_in, resolve_targets, tables_in
from .errors import CommandError, first_line, said_by

if TYPE_CHECKING:
    from alembic.config import Config

URL_VARIABLE: Final = "DATABASE_URL"
METADATA_VARIABLE: Final = "LUCENT_METADATA"

_CONNECT_TIMEOUT: Final = 10
"""Seconds to wait for PostgreSQL, whose driver would wait for minutes. PyMySQL has this default."""

# The drivers to look for, in order, each with its module.
_SYNC_DRIVERS: Final = {
    "sqlite": (("pysqlite", "sqlite3"),),
    "postgresql": (("psycopg", "psycopg"), ("psycopg2", "psycopg2")),
    "mysql": (("pymysql", "pymysql"), ("mysqldb", "MySQLdb")),
}
_SYNC_DRIVERS["mariadb"] = _SYNC_DRIVERS["mysql"]
_ASYNC_DRIVERS: Final = frozenset({"aiosqlite", "asyncpg", "psycopg_async", "asyncmy", "aiomysql"})
_PACKAGES: Final = {
    "psycopg": "'psycopg[binary]'",
    "psycopg2": "psycopg2-binary",
    "pymysql": "PyMySQL",
    "mysqldb": "mysqlclient",
}
"""What to install for a driver, quoted for a shell."""


# -- the URL ---------------------------------------------------------------------------------------


def alembic_config() -> Config | None:
    """Return the configuration of the Alembic environment in this directory, if there is one."""
    ini = Path(os.environ.get("ALEMBIC_CONFIG", "alembic.ini"))
    toml = Path("pyproject.toml")
    if not ini.is_file() and not (toml.is_file() and "[tool.alembic" in toml.read_text("utf-8")):
        return None
    from alembic.config import Config  # slow to import

    return Config(ini if ini.is_file() else None, toml_file=toml if toml.is_file() else None)


def find_url(given: str | None) -> sa.URL:
    """Return the URL of the database, with a synchronous driver."""
    return _with_sync_driver(*named_url(given))


def named_url(given: str | None) -> tuple[sa.URL, str]:
    """Return the URL of the database as it is named, and where: by the option ``--url``, else
    DATABASE_URL, else Alembic's `sqlalchemy.url`.
    """
    source, text = "--url", given
    if not text:
        source, text = URL_VARIABLE, os.environ.get(URL_VARIABLE)
    if not text:
        source, text = "sqlalchemy.url", _alembic_url()
    if text:
        return _parse(text, source), source
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
            # In TOML, the dot of an unquoted key makes a table.
            url = options.get("sqlalchemy.url") or (options.get("sqlalchemy") or {}).get("url")
    except (configparser.Error, tomllib.TOMLDecodeError, OSError, ValueError) as error:
        fault = type(error).__name__  # its message may quote the URL
    if fault:
        raise CommandError(f"sqlalchemy.url cannot be read from Alembic's configuration: {fault}")
    # `alembic init` writes a placeholder.
    return None if not isinstance(url, str) or url.startswith("driver://") else url


def _parse(text: str, source: str) -> sa.URL:
    # SQLAlchemy's messages may quote a part of the password.
    url = None
    with contextlib.suppress(ArgumentError, ValueError):
        url = sa.make_url(text)
    if url is None:
        raise CommandError(
            f"{source} is not a database URL: dialect://user:password@host:port/database, in which "
            "a : / @ or % of the password is written as %3A %2F %40 %25"
        )
    # The first @ ends the password. With a second one, a part of the password would be taken for
    # the host, the database or an option. The path of a SQLite file may have any number.
    expected = 0 if url.username is None else 1
    if text.count("@") > expected and not url.drivername.startswith("sqlite"):
        raise CommandError(
            f"{source} has an @ or / in its user or password: write it as %40 or %2F"
        )
    return url


def _with_sync_driver(url: sa.URL, source: str) -> sa.URL:
    name, _, driver = url.drivername.partition("+")
    # Some platforms put "postgres" into DATABASE_URL.
    backend = "postgresql" if name == "postgres" else name
    if backend not in _SYNC_DRIVERS:
        raise CommandError(
            f"{source} names a kind of database that is not supported; "
            f"these are: {', '.join(_SYNC_DRIVERS)}"
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
            elif driver == "asyncmy":
                query.pop("stmt_cache_size", None)
            return url.set(drivername=f"{backend}+{found}", query=query)
    wanted = f"{driver} is async, and the command needs a" if driver else "there is no"
    first, _ = _SYNC_DRIVERS[backend][0]
    raise CommandError(
        f"{wanted} synchronous driver for {backend}, such as {first}{_how_to_install(first)}"
    )


def _how_to_install(driver: str) -> str:
    package = _PACKAGES.get(driver)
    return "" if package is None else f": pip install {package}"


# -- the database ----------------------------------------------------------------------------------


@contextmanager
def connected(given: str | None) -> Iterator[sa.Engine]:
    """Give an engine for the database, after a first connection."""
    engine = _connect(find_url(given))
    try:
        yield engine
    finally:
        engine.dispose()


def _connect(url: sa.URL) -> sa.Engine:
    """Return an engine that has connected once, and whose errors do not show parameters."""
    if url.get_backend_name() == "sqlite":
        path = url.database or ":memory:"
        # SQLite would create an empty one.
        if path != ":memory:" and not path.startswith("file:") and not Path(path).is_file():
            raise CommandError(f"there is no SQLite database at {path}")
    timeout = {}
    if url.get_backend_name() == "postgresql" and "connect_timeout" not in url.query:
        timeout = {"connect_timeout": _CONNECT_TIMEOUT}
    try:
        engine = sa.create_engine(
            url, hide_parameters=True, poolclass=NullPool, connect_args=timeout
        )
        with engine.connect():
            return engine
    except NoSuchModuleError:
        fault = f"SQLAlchemy does not know the driver of {url.drivername}"
    except ImportError as error:
        install = _how_to_install(url.get_driver_name())
        fault = f"the driver of {url.drivername} is not installed ({first_line(error)}){install}"
    except (ArgumentError, TypeError, ValueError):
        fault = f"the URL has an option that {url.drivername} does not take"
    except DBAPIError as error:
        fault = f"cannot connect to {where(url)}: {_without_password(error, url)}"
    except OSError as error:
        fault = f"cannot connect to {where(url)}: {error.strerror or type(error).__name__}"
    raise CommandError(fault)


def where(url: sa.URL) -> str:
    """Return what may be shown of `url`: no user, no password, no options."""
    if url.get_backend_name() == "sqlite":
        return f"SQLite at {url.database or ':memory:'}"
    port = f":{url.port}" if url.port else ""
    return (
        f"{url.get_backend_name()} at {url.host or 'the local socket'}{port}/{url.database or ''}"
    )


def _without_password(error: DBAPIError, url: sa.URL) -> str:
    sentence = " ".join(str(said_by(error)).split())
    options = url.normalized_query
    passwords = {str(url.password or ""), *options.get("password", ()), *options.get("passwd", ())}
    for password in passwords - {"", url.username, url.host, url.database}:
        # Not cut out: the text around the gap would tell what was there.
        if password in sentence:
            return f"{type(error.orig).__name__}; its message is not shown, to keep the password"
    return sentence


# -- the models ------------------------------------------------------------------------------------


def load_targets(names: Sequence[str] | None) -> list[Target]:
    """Import the objects that `names` say, each ``package.module:name``. Default: LucentBase.

    If a module sets the application's own keyring, it is set from now on.
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
        raise CommandError(f"{source} has the form package.module:Base, not {name!r}")
    if "/" in module_name or module_name.endswith(".py"):
        dotted = module_name.removeprefix("./").removesuffix(".py").replace("/", ".").strip(".")
        raise CommandError(
            f"{source} takes a module, and {module_name} is a path: write {dotted}:{attribute}"
        )
    try:
        # What an application prints on import is not our output.
        with contextlib.redirect_stdout(sys.stderr):
            module = importlib.import_module(module_name)
        target: Target = operator.attrgetter(attribute)(module)
    except ImportError as error:
        fault = f"{source} {name}: {first_line(error)}"
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


def with_stored_secrets(engine: sa.Engine, targets: Sequence[Target]) -> list[Target]:
    """Return `targets`, and ``lucent_secrets`` with its versions if the database has the table.

    A key must not go because somebody forgot to name the package's own tables.
    """
    own: Any = LucentSecret.__table__
    is_another = any(
        column.table.name == own.name and column.table is not own for column in columns_in(targets)
    )
    if is_another or not sa.inspect(engine).has_table(own.name):
        return list(targets)
    return [*targets, LucentSecret]


@dataclass(frozen=True)
class Selection:
    """The options ``--metadata``, ``--table`` and ``--column``."""

    metadata: Sequence[str] | None
    tables: Sequence[str] | None = None
    columns: Sequence[str] | None = None

    def targets(self) -> Sequence[Target]:
        """Import the models, and return their selected columns."""
        targets = load_targets(self.metadata)
        if not self.tables and not self.columns:
            return targets
        found = list(columns_in(targets))
        for option, given, names in (
            ("--table", self.tables or (), _table_names),
            ("--column", self.columns or (), _column_names),
        ):
            known = {name for column in found for name in names(column)}
            for name in given:
                if name not in known:
                    raise CommandError(
                        f"{option} {name}: no such encrypted column; there are "
                        f"{', '.join(sorted(map(str, found))) or 'none'}"
                    )
            found = [c for c in found if not given or not names(c).isdisjoint(given)]
        if not found:
            raise CommandError("no encrypted column is both in --table and named by --column")
        return found


def _table_names(column: sa.Column[Any]) -> set[str]:
    return {column.table.name, column.table.fullname}


def _column_names(column: sa.Column[Any]) -> set[str]:
    return {column.name, *(f"{table}.{column.name}" for table in _table_names(column))}


class Found(NamedTuple):
    """A target as the database has it."""

    target: TargetTable
    relation: Relation | None
    types: dict[str, TypeEngine[Any]]
    """By the lower-case name of each column: SQLite and MySQL accept any case."""

    def missing(self, columns: Iterable[sa.ColumnClause[Any]]) -> list[str]:
        """Return the names of those `columns` that the table lacks."""
        return [column.name for column in columns if column.name.lower() not in self.types]


def look_up(engine: sa.Engine, targets: Iterable[TargetTable]) -> Iterator[Found]:
    """Look each table up in the database."""
    inspector = sa.inspect(engine)
    for target in targets:
        name, schema = target.clause.name, target.clause.schema
        with engine.connect() as connection:
            relation = relation_of(connection, name, schema)
        is_table = relation is not None and relation.is_table
        columns = inspector.get_columns(name, schema=schema) if is_table else ()
        yield Found(target, relation, {c["name"].lower(): c["type"] for c in columns})


@contextmanager
def opened(
    url: str | None, targets: Sequence[Target]
) -> Iterator[tuple[sa.Engine, list[TargetTable]]]:
    """Give an engine and the tables of `targets`, without views and foreign tables."""
    with connected(url) as engine:
        found = list(look_up(engine, resolve_targets(targets, engine)))
        for each in found:
            _require_migrated(each, engine)
        yield engine, [each.target for each in found if each.types]


def _require_migrated(table: Found, engine: sa.Engine) -> None:
    name, place = table.target.name, where(engine.url)
    if table.relation is None:
        if table.target.may_be_missing:
            return
        remedy = "run your migrations, or name another database"
        if name == LucentSecret.__tablename__:  # the default: perhaps no models were named
            remedy += f"; or name your models with --metadata or {METADATA_VARIABLE}"
        raise CommandError(f"table {name} is not in the database ({place}): {remedy}")
    if not table.relation.is_table:
        return
    missing = table.missing(table.target.clause.columns)
    if missing:
        raise CommandError(
            f"table {name} lacks {', '.join(missing)} in the database ({place}): run your "
            "migrations (alembic upgrade head)"
        )
    for column in table.target.columns:
        type_ = table.types[column.name.lower()]
        if holds_text(type_):
            raise CommandError(
                f"column {name}.{column.name} is {type_.compile(engine.dialect)} in the database "
                f"({place}), which holds no sealed bytes: run the migration that encrypts it "
                "(op.encrypt_column)"
            )


def holds_text(type_: TypeEngine[Any]) -> bool:
    """Say whether a column has a type in which databases refuse to look for sealed bytes."""
    return isinstance(type_, (sa.JSON, sa.String))


def secrets_model(names: Sequence[str] | None) -> type[LucentSecretMixin]:
    """Return the only model of scoped secrets among the objects that `names` say."""
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
    is_whole = isinstance(target, (sa.MetaData, registry, type)) and not _is_mapped(target)
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
    return isinstance(sa.inspect(target, raiseerr=False), Mapper)
