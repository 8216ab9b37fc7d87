"""``lucent doctor``: look at keys, tables, values, migrations and clock; say what to do.

It opens no value.
"""

from __future__ import annotations

import ast
import configparser
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from sqlalchemy import Column, Connection, Engine, Inspector, Table, func, inspect, select
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeEngine, _Binary

from .._aead import MASTER_KEY_SIZE
from .._database.relations import relation_of
from .._database.visibility import require_primary
from .._sql import is_mysql
from ..exceptions import ConfigurationError, RotationError
from ..keyring import Keyring, default_keyring
from ..rotation import StatusRow, status
from ..rotation.targets import Target, TargetTable, columns_in, resolve_targets
from .database import alembic_config, connected, holds_text, where
from .terminal import counted
from .unnamed import unnamed_values

_CLOCK_TOLERANCE: Final = timedelta(seconds=5)
"""A clock kept by NTP is off by milliseconds; a request takes less than this."""

Level = Literal["ok", "note", "fix"]


class Finding(NamedTuple):
    """One thing that was looked at. Only ``fix`` asks for something to be done."""

    level: Level
    what: str
    advice: str = ""


def examine(targets: Sequence[Target], url: str | None) -> Iterator[Finding]:
    """Look at everything, one thing after the other.

    :raises CommandError: no database is named, or it does not answer.
    """
    keyring = _keyring()
    if isinstance(keyring, Keyring):
        others = [f"{v} ({keyring.fingerprint(v)})" for v in keyring.versions[1:]]
        opens = f"; {', '.join(others)} can be opened" if others else ""
        primary = f"{keyring.primary} ({keyring.fingerprint(keyring.primary)})"
        yield Finding("ok", f"keyring: {primary} seals{opens}")
        yield from _constant_keys(keyring)
    else:
        yield Finding("fix", "keyring: none", keyring)
    yield from _alembic()
    with connected(url) as engine:
        yield Finding("ok", f"database: {where(engine.url)}, by {engine.dialect.driver}")
        yield from _clock(engine)
        inspector = inspect(engine)
        metadata_tables = {column.table.fullname: column.table for column in columns_in(targets)}
        tables = resolve_targets(targets, engine)
        fault = _why_no_witness(engine)
        if fault is not None:
            yield Finding("fix", f"database: {fault}")
        for table in tables:
            yield from _table(
                engine,
                inspector,
                table,
                metadata_tables[table.name],
                keyring if isinstance(keyring, Keyring) else None,
                counts=fault is None,
            )
        yield from _unnamed(engine, tables)


def _why_no_witness(engine: Engine) -> str | None:
    """Return why values are not counted here; ``None`` if they are."""
    with engine.connect() as connection:
        try:
            require_primary(connection)
        except RotationError as error:
            return str(error)
    return None


def _keyring() -> Keyring | str:
    """Return the configured keyring, or why there is none."""
    try:
        return default_keyring()
    except ConfigurationError as error:
        return str(error)


def _constant_keys(keyring: Keyring) -> Iterator[Finding]:
    """Name the keys that are one byte 32 times: a placeholder that was never replaced."""
    constants = {
        Keyring({"v": bytes([byte]) * MASTER_KEY_SIZE}).fingerprint("v") for byte in range(256)
    }
    for version in keyring.versions:
        if keyring.fingerprint(version) in constants:
            yield Finding(
                "fix",
                f"keyring: the key of {version} is one byte {MASTER_KEY_SIZE} times",
                "make a random key with lucent keygen, and rotate to it",
            )


# -- Alembic ---------------------------------------------------------------------------------------


def _alembic() -> Iterator[Finding]:
    try:
        config = alembic_config()
        location = config.get_alembic_option("script_location") if config else None
    except (configparser.Error, ValueError) as error:
        # Its message may quote a URL.
        yield Finding("fix", f"Alembic: its configuration raised {type(error).__name__}", "mend it")
        return
    if config is None:
        yield Finding("note", "Alembic: no alembic.ini and no [tool.alembic] in this directory")
        return
    if not location:
        yield Finding("fix", "Alembic: script_location is not set", "set it in alembic.ini")
        return
    if ":" in location and not Path(location).exists():
        yield Finding("note", f"Alembic: {location} is inside a package and was not looked at")
        return
    env = Path(location) / "env.py"
    if not env.is_file():
        yield Finding("fix", f"Alembic: there is no {env}", "set script_location to where it is")
        return
    try:
        said = _names_in(ast.parse(env.read_text("utf-8")))
    except (SyntaxError, ValueError):
        yield Finding("fix", f"Alembic: {env} is not Python that can be read", "mend it")
        return
    missing = [option for option, names in _wiring().items() if said.isdisjoint(names)]
    if missing:
        yield Finding(
            "fix",
            f"Alembic: {env} lacks {', '.join(missing)}",
            "import sqlalchemy_lucent.migrations as lucent_migrations, and pass to "
            "context.configure() render_item=lucent_migrations.render_item, autogenerate_plugins="
            '["alembic.autogenerate.*", "sqlalchemy_lucent.*"], transaction_per_migration=True',
        )
    else:
        yield Finding("ok", f"Alembic: {env} has the import and the options")


def _wiring() -> dict[str, set[str]]:
    """Return what an ``env.py`` needs, each with the names by which it is recognized."""
    import alembic

    wiring = {
        "the import": {"sqlalchemy_lucent.migrations"},
        "render_item": {"render_item"},
        "transaction_per_migration": {"transaction_per_migration"},
    }
    if tuple(map(int, alembic.__version__.split(".")[:2])) >= (1, 18):  # the first with plugins
        wiring["autogenerate_plugins"] = {"autogenerate_plugins"}
    return wiring


def _names_in(tree: ast.AST) -> set[str]:
    """Return the modules, keywords and texts in a program; its comments are not among them."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.keyword):
            names.add(node.arg or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names


# -- the clock -------------------------------------------------------------------------------------


def _clock(engine: Engine) -> Iterator[Finding]:
    if engine.dialect.name == "sqlite":
        return  # the same clock
    with engine.connect() as connection:
        now = func.utc_timestamp(6) if is_mysql(engine.dialect) else func.clock_timestamp()
        before = datetime.now(UTC)
        theirs: datetime = connection.execute(select(now)).scalar_one()
        after = datetime.now(UTC)
    if theirs.tzinfo is None:
        theirs = theirs.replace(tzinfo=UTC)
    apart = max(before - theirs, theirs - after, timedelta())
    if apart > _CLOCK_TOLERANCE:
        yield Finding(
            "fix",
            f"clock: {apart.total_seconds():.0f} seconds away from the database's",
            "set both by NTP: created_at and updated_at are written by the application's clock",
        )
    else:
        yield Finding("ok", "clock: as the database's")


# -- tables and values -----------------------------------------------------------------------------


def _table(
    engine: Engine,
    inspector: Inspector,
    target: TargetTable,
    table: Table,
    keyring: Keyring | None,
    *,
    counts: bool,
) -> Iterator[Finding]:
    name, schema = target.clause.name, target.clause.schema
    with engine.connect() as connection:
        found = relation_of(connection, name, schema)
    if found is not None and not found.is_table:
        yield Finding(
            "note",
            f"{target.name}: a {found.kind}, which is left out",
            "name the tables behind it; retire-check asks for them",
        )
        return
    if found is None:
        yield Finding(
            "fix",
            f"table {target.name}: not in the database",
            "run your migrations (alembic upgrade head), or name another database",
        )
        return
    types = {c["name"]: c["type"] for c in inspector.get_columns(name, schema=schema)}
    missing = [c.name for c in table.columns if c.name not in types]
    if missing:
        yield Finding(
            "fix",
            f"table {target.name}: lacks {', '.join(missing)}",
            "run your migrations (alembic upgrade head)",
        )
    present = [column for column in target.columns if column.name in types]
    for column in present:
        yield _column_type(engine, f"{target.name}.{column.name}", types[column.name])
    yield from _index(inspector, target, table, types)
    sealed = {column.name for column in present if not holds_text(types[column.name])}
    countable = [column for column in columns_in(table) if column.name in sealed]
    if countable and counts:
        with engine.connect() as connection:
            yield from _values(connection, table, countable, keyring)


def _column_type(engine: Engine, name: str, type_: TypeEngine[Any]) -> Finding:
    shown = type_.compile(engine.dialect)
    if not isinstance(type_, _Binary):
        return Finding(
            "fix",
            f"{name}: {shown}, which holds no sealed bytes",
            "turn it into an encrypted column by a migration with op.encrypt_column()",
        )
    if is_mysql(engine.dialect) and not isinstance(type_, mysql.LONGBLOB):
        return Finding(
            "fix",
            f"{name}: {shown}, in which a longer value is refused, or cut where sql_mode is lax",
            f"ALTER TABLE … MODIFY … LONGBLOB, with the NOT NULL that {name} has",
        )
    return Finding("ok", f"{name}: {shown}")


def _index(
    inspector: Inspector, target: TargetTable, table: Table, types: dict[str, Any]
) -> Iterator[Finding]:
    """Say whether the database finds rows by their key version."""
    if "key_version" in table.columns and "key_version" not in types:
        return  # said already: it is a column that the table lacks
    indexes = inspector.get_indexes(target.clause.name, schema=target.clause.schema)
    sealed = {column.name for column in target.columns}
    for index in indexes:
        first = next(iter(index["column_names"]), None)
        expression = " ".join(index.get("expressions", []))
        if first == "key_version" or (first is None and any(c in expression for c in sealed)):
            yield Finding("ok", f"table {target.name}: {index['name']} is on the key version")
            return
    if "key_version" in table.columns:
        yield Finding(
            "fix",
            f"table {target.name}: its key_version has no index",
            "run your migrations (alembic upgrade head), or create the index",
        )
    else:
        yield Finding(
            "note",
            f"table {target.name}: no index on the key version was found",
            "no command needs one: they read the table either way; an index on "
            "column.key_version is for queries of your own",
        )


def _values(
    connection: Connection, table: Table, columns: Sequence[Column[Any]], keyring: Keyring | None
) -> Iterator[Finding]:
    rows = status(connection, columns).rows
    if not rows:
        yield Finding("ok", f"table {table.fullname}: no values")
    for row in rows:
        yield _values_under_one_key(row, keyring)


def _unnamed(engine: Engine, tables: list[TargetTable]) -> Iterator[Finding]:
    """Say where sealed values are that no model names."""
    level: Level = "ok"
    for found in unnamed_values(engine, tables):
        if found.unread is not None:
            level = "note"
            yield Finding(
                "note",
                f"{found.name}: was not looked through for sealed values ({found.unread})",
                "run doctor as a user who may read it whole",
            )
            continue
        level = "fix"
        under = ", ".join(f"{number} under {v}" for v, number in found.versions.items())
        yield Finding(
            "fix",
            f"{found.name}: sealed values that no model names: {under}",
            "name its model with --metadata, so that they are rotated and counted; or delete them "
            "before the key is retired",
        )
    if level == "ok":
        yield Finding("ok", "other columns of the database: no sealed values")
    yield Finding(
        "note", "values: counted by the keys that they name, none was opened", "lucent verify opens"
    )


def _values_under_one_key(row: StatusRow, keyring: Keyring | None) -> Finding:
    what = f"{row.table}.{row.column}: {counted(row.count, 'value')}"
    version = row.key_version
    if version is None:
        return Finding(
            "fix",
            f"{what} not sealed",
            "encrypt them by a migration with op.encrypt_column(), or restore them from a backup",
        )
    what = f"{what} under {version} ({row.fingerprint})"
    if keyring is None:
        return Finding("note", f"{what}; without a keyring none opens")
    if version not in keyring.versions:
        return Finding(
            "fix", f"{what}, which the keyring lacks", f"add the key of {version} to the keyring"
        )
    if row.fingerprint != keyring.fingerprint(version):
        return Finding(
            "fix",
            f"{what}, but the keyring's {version} is another key ({keyring.fingerprint(version)})",
            "find the key with that fingerprint; a new key needs a new version",
        )
    if version != keyring.primary:
        return Finding("fix", f"{what}, not under the primary {keyring.primary}", "lucent rotate")
    return Finding("ok", what)
