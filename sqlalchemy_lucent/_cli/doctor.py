"""``lucent doctor``: check keys, tables, values, migrations and clock; say what to do.

It opens no value.
"""

from __future__ import annotations

import ast
import configparser
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from sqlalchemy import URL, Engine, Inspector, Table, inspect
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeEngine, _Binary

from .._aead import MASTER_KEY_SIZE
from .._database.clock import database_time
from .._database.visibility import require_primary
from .._sql import is_mysql
from ..exceptions import ConfigurationError, LucentError, RotationError
from ..keyring import Keyring, default_keyring
from ..keys import KeyRegistry
from ..rotation import StatusRow, status
from ..rotation.targets import Target, TargetTable, columns_in, resolve_targets
from .database import Found, alembic_config, connected, holds_text, look_up, named_url, where
from .terminal import counted
from .unnamed import unnamed_values

# What an env.py needs, each with the name that shows it.
_WIRING: Final = {
    "the import": "sqlalchemy_lucent.migrations",
    "render_item": "render_item",
    "transaction_per_migration": "transaction_per_migration",
    "autogenerate_plugins": "autogenerate_plugins",
}

_CLOCK_TOLERANCE: Final = timedelta(seconds=5)
"""NTP keeps clocks within milliseconds, and a request takes less than this."""

Level = Literal["ok", "note", "fix"]


class Finding(NamedTuple):
    """The result of one check. Only ``fix`` asks for action."""

    level: Level
    what: str
    advice: str = ""


def examine(targets: Sequence[Target], url: str | None) -> Iterator[Finding]:
    """Run all checks, one after the other."""
    keyring = None
    try:
        keyring = default_keyring()
    except ConfigurationError as error:
        yield Finding("fix", "keyring: none", str(error))
    else:
        others = [f"{v} ({keyring.fingerprint(v)})" for v in keyring.versions[1:]]
        opens = f"; {', '.join(others)} can be opened" if others else ""
        primary = f"{keyring.primary} ({keyring.fingerprint(keyring.primary)})"
        limit = f"; none older than {keyring.oldest}, though" if keyring.oldest else ""
        yield Finding("ok", f"keyring: {primary} seals{opens}{limit}")
        yield from _constant_keys(keyring)
    yield _alembic()
    with connected(url) as engine:
        yield Finding("ok", f"database: {where(engine.url)}, by {engine.dialect.driver}")
        yield from _driver(named_url(url)[0])
        yield from _clock(engine)
        models = {column.table.fullname: column.table for column in columns_in(targets)}
        tables = resolve_targets(targets, engine)
        is_primary = True
        try:
            with engine.connect() as connection:
                require_primary(connection)
        except RotationError as error:
            is_primary = False  # so that values cannot be counted here
            yield Finding("fix", f"database: {error}")
        for found in look_up(engine, tables):
            yield from _table(engine, found, models[found.target.name])
            if is_primary:
                yield from _values(engine, found, models[found.target.name], keyring)
        yield from _unnamed(engine, tables)
        if keyring is not None and is_primary:
            yield from _registry(KeyRegistry(engine, targets=targets, keyring=keyring))


def _registry(registry: KeyRegistry) -> Iterator[Finding]:
    """Compare the keyring with the key registry, if there is one. Registers nothing."""
    if not registry.exists():
        return
    try:
        checked = registry.check(register=False)
    except LucentError as error:
        yield Finding("fix", f"key registry: {error}")
        return
    named = ", ".join(f"{key.version} {key.state}" for key in checked.keys)
    yield Finding("ok", f"key registry: {named or 'no key is registered'}")
    for note in checked.notes:
        yield Finding("fix", f"key registry: {note}")


def _constant_keys(keyring: Keyring) -> Iterator[Finding]:
    """Name the keys that repeat one byte: placeholders that were never replaced."""
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


def _alembic() -> Finding:
    try:
        config = alembic_config()
        location = config.get_alembic_option("script_location") if config else None
    except (configparser.Error, ValueError) as error:
        # Its message may quote a URL.
        return Finding(
            "fix", f"Alembic: its configuration raised {type(error).__name__}", "correct it"
        )
    if config is None:
        return Finding("note", "Alembic: no alembic.ini and no [tool.alembic] in this directory")
    if not location:
        return Finding("fix", "Alembic: script_location is not set", "set it in alembic.ini")
    if ":" in location and not Path(location).exists():
        return Finding("note", f"Alembic: {location} is inside a package and was not checked")
    env = Path(location) / "env.py"
    if not env.is_file():
        return Finding("fix", f"Alembic: there is no {env}", "set script_location to where it is")
    try:
        names = _names_in(ast.parse(env.read_text("utf-8")))
    except (SyntaxError, ValueError):
        return Finding("fix", f"Alembic: {env} is not valid Python", "correct it")
    missing = [option for option, shown_by in _WIRING.items() if shown_by not in names]
    if missing:
        return Finding(
            "fix",
            f"Alembic: {env} lacks {', '.join(missing)}",
            "import sqlalchemy_lucent.migrations as lucent_migrations, and pass to "
            "context.configure() render_item=lucent_migrations.render_item, autogenerate_plugins="
            '["alembic.autogenerate.*", "sqlalchemy_lucent.*"], transaction_per_migration=True',
        )
    return Finding("ok", f"Alembic: {env} has the import and the options")


def _names_in(tree: ast.AST) -> set[str]:
    """Return the modules, keywords and strings in a program, without its comments."""
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


# -- the driver ------------------------------------------------------------------------------------


def _driver(url: URL) -> Iterator[Finding]:
    if url.drivername.endswith("+asyncmy") and "stmt_cache_size" not in url.query:
        yield Finding(
            "note",
            "database: the URL has no stmt_cache_size, without which asyncmy is slow at writing "
            "bytes",
            "add ?stmt_cache_size=128 to it, unless your code has it in connect_args=",
        )


# -- the clock -------------------------------------------------------------------------------------


def _clock(engine: Engine) -> Iterator[Finding]:
    if engine.dialect.name == "sqlite":
        return  # the same clock
    with engine.connect() as connection:
        before = datetime.now(UTC)
        theirs = database_time(connection)
        after = datetime.now(UTC)
    apart = max(before - theirs, theirs - after, timedelta())
    if apart > _CLOCK_TOLERANCE:
        yield Finding(
            "fix",
            f"clock: {apart.total_seconds():.0f} seconds away from the database's",
            "set both by NTP: created_at and updated_at come from the application's clock",
        )
    else:
        yield Finding("ok", "clock: as the database's")


# -- tables and values -----------------------------------------------------------------------------


def _table(engine: Engine, found: Found, model: Table) -> Iterator[Finding]:
    name, relation = found.target.name, found.relation
    if relation is None:
        advice = "run your migrations (alembic upgrade head), or name another database"
        if found.target.may_be_missing:
            advice = (
                "run a migration with op.upgrade_lucent_secrets(): listing secrets, their versions "
                "and due dates need it"
            )
        yield Finding("fix", f"table {name}: not in the database", advice)
    elif not relation.is_table:
        yield Finding(
            "note",
            f"{name}: a {relation.kind}, which is left out",
            "name the tables that it reads; retire-check asks for them",
        )
    else:
        missing = found.missing(model.columns)
        if missing:
            yield Finding(
                "fix",
                f"table {name}: lacks {', '.join(missing)}",
                "run your migrations (alembic upgrade head)",
            )
        for column in found.target.columns:
            if column.name not in missing:
                type_ = found.types[column.name.lower()]
                yield _column_type(engine, f"{name}.{column.name}", type_)
        if "key_version" not in missing:
            yield _index(inspect(engine), found.target, model)


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
            f"ALTER TABLE … MODIFY … LONGBLOB, and repeat NOT NULL if {name} has it",
        )
    return Finding("ok", f"{name}: {shown}")


def _index(inspector: Inspector, target: TargetTable, model: Table) -> Finding:
    """Say whether an index begins with the key version."""
    sealed = {column.name for column in target.columns}
    for index in inspector.get_indexes(target.clause.name, schema=target.clause.schema):
        first = next(iter(index["column_names"]), None)
        expression = " ".join(index.get("expressions", []))
        if first == "key_version" or (first is None and any(c in expression for c in sealed)):
            return Finding("ok", f"table {target.name}: {index['name']} is on the key version")
    if "key_version" in model.columns:
        return Finding(
            "fix",
            f"table {target.name}: its key_version has no index",
            "run your migrations (alembic upgrade head), or create the index",
        )
    return Finding(
        "note",
        f"table {target.name}: no index on the key version was found",
        "no command needs one: they read the table either way; an index on "
        "column.key_version is for queries of your own",
    )


def _values(
    engine: Engine, found: Found, model: Table, keyring: Keyring | None
) -> Iterator[Finding]:
    """Count the values of the columns that hold sealed bytes."""
    own = [column for column in columns_in(model) if column.table is model]
    types = {column: found.types.get(column.name.lower()) for column in own}
    sealed = [c for c, type_ in types.items() if type_ is not None and not holds_text(type_)]
    if not sealed:
        return
    with engine.connect() as connection:
        rows = status(connection, sealed).rows
    if not rows:
        yield Finding("ok", f"table {found.target.name}: no values")
    for row in rows:
        yield _values_under_one_key(row, keyring)


def _unnamed(engine: Engine, tables: list[TargetTable]) -> Iterator[Finding]:
    """Name the columns with sealed values that no model names."""
    found = None
    for found in unnamed_values(engine, tables):
        if found.unread is not None:
            yield Finding(
                "note",
                f"{found.name}: was not searched for sealed values ({found.unread})",
                "run doctor as a user who may read the whole table",
            )
        else:
            under = ", ".join(f"{number} under {v}" for v, number in found.versions.items())
            yield Finding(
                "fix",
                f"{found.name}: sealed values that no model names: {under}",
                "name its model with --metadata, so that they are rotated and counted; or delete "
                "them before you retire the key",
            )
    if found is None:
        yield Finding("ok", "other columns of the database: no sealed values")
    yield Finding(
        "note", "values: counted by the keys they name; none was opened", "lucent verify opens them"
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
