"""The commands: each parses its arguments, calls one function of the package, and prints."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from sqlalchemy.orm import Session

import sqlalchemy_lucent as lucent

from .._envelope import VERSION_PATTERN
from .._environment import (
    DEFAULT_KEY_VERSION,
    ENV_FILE_SUFFIX,
    ENV_KEY,
    ENV_KEYS,
    ENV_VARIABLES,
)
from .._json import STRICT
from ..exceptions import SerializationError, hide_locals
from ..repository import LucentSecrets
from ..rotation import DEFAULT_BATCH_SIZE
from ..rotation.targets import TargetTable
from ..secret_key import SecretKey
from .database import (
    METADATA_VARIABLE,
    Selection,
    connected,
    load_targets,
    present_tables,
    secrets_model,
)
from .doctor import examine
from .rotate import run_rotation, tell_left_out, write_failures
from .terminal import (
    CommandError,
    Exit,
    confirm,
    counted,
    printable,
    tell,
    wrapped,
    write,
    write_finding,
    write_json,
    write_rows,
    write_text,
)

_PAGE: Final = 500  # secrets listed by one statement

app = typer.Typer(
    help="Encrypted JSON for SQLAlchemy: keys, rotation, secrets.",
    # Plain help, and plain tracebacks, which show no local variables.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="The database. Others see the command line: better set DATABASE_URL, or "
        "sqlalchemy.url in alembic.ini, which come next.",
    ),
]
MetadataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--metadata",
        metavar="MODULE:NAME",
        envvar=METADATA_VARIABLE,
        help="Your models, as in app.models:Base; may be repeated, or stand in the variable "
        "one after the other. sqlalchemy_lucent:LucentBase if left out.",
    ),
]
TableOption = Annotated[
    list[str] | None,
    typer.Option("--table", metavar="TABLE", help="Only this table; may be repeated."),
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="COLUMN", help="Only this column, or table.column; may be repeated."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
KeyArgument = Annotated[
    str, typer.Argument(metavar="KEY", help="scope:ownerId:provider:name", show_default=False)
]


def _version(wanted: bool) -> None:
    if wanted:
        write(f"sqlalchemy-lucent {lucent.__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Encrypted JSON for SQLAlchemy: keys, rotation, secrets.

    Exit codes: 0 done, 1 rows are left or did not open, 2 wrong use, 130 interrupted.
    """


# -- keys ------------------------------------------------------------------------------------------


@app.command()
def keygen(
    env: Annotated[
        bool,
        typer.Option(
            "--env", help="Print shell lines that put the new key in front of those in use."
        ),
    ] = False,
    key_version: Annotated[
        str | None,
        typer.Option(
            "--key-version",
            metavar="VERSION",
            help="The new key's version, with --env; the next number if left out.",
        ),
    ] = None,
) -> None:
    """Print a new master key.

    With --env, shell lines that promote it: they refer to the keys in use by the variables that
    hold them, and show none of these.
    """
    if key_version is not None and not env:
        raise CommandError("--key-version goes with --env: without it, keygen prints the key alone")
    write(_promoting_lines(key_version) if env else f"{lucent.generate_master_key()}\n")
    if sys.stdout.isatty():
        tell("Keep a copy outside of the database: without it nothing sealed under it opens.")


@hide_locals
def _promoting_lines(version: str | None) -> str:
    """Return the shell lines that make a new key the primary of the environment's keyring."""
    present = [name for name in ENV_VARIABLES if name in os.environ]
    key = lucent.generate_master_key()
    if not present:
        keyring = lucent.Keyring({version or DEFAULT_KEY_VERSION: key})
        return f'export {ENV_KEYS}="{keyring.primary}:{key}"\n'
    keyring = lucent.Keyring.from_env()
    new = version or _next_version(keyring.versions)
    keyring.adding(new, key)  # refuses a version that is taken, or none
    several = next((name for name in present if name.startswith(ENV_KEYS)), None)
    if several is None:
        single = next(n for n in present if n in (ENV_KEY, ENV_KEY + ENV_FILE_SUFFIX))
        old = f"{keyring.primary}:{_reference(single)}"
    else:
        old = _reference(several)
    lines = [f'export {ENV_KEYS}="{new}:{key},{old}"']
    stale = [name for name in present if name != ENV_KEYS]
    if stale:
        lines.append(f"unset {' '.join(stale)}")
    return "\n".join(lines) + "\n"


def _reference(variable: str) -> str:
    """Return what a shell replaces by the value that `variable` holds, or names the file of."""
    return f'$(cat -- "${variable}")' if variable.endswith(ENV_FILE_SUFFIX) else f"${variable}"


def _next_version(versions: Sequence[str]) -> str:
    numbers = [int(found[1]) for v in versions if (found := re.fullmatch(r"v(\d{1,9})", v))]
    if not numbers:
        raise CommandError(
            "the versions in use are not v1, v2, …: name the new one with --key-version"
        )
    return f"v{max(numbers) + 1}"


@app.command()
def keys(metadata: MetadataOption = None) -> None:
    """Show versions and fingerprints of the configured keys."""
    load_targets(metadata)
    keyring = lucent.default_keyring()
    write_rows(
        ("version", "fingerprint", "use"),
        [
            (version, keyring.fingerprint(version), "opens" if n else "seals and opens")
            for n, version in enumerate(keyring.versions)
        ],
    )


# -- values of all tables --------------------------------------------------------------------------


@app.command()
def status(
    url: UrlOption = None,
    metadata: MetadataOption = None,
    table: TableOption = None,
    column: ColumnOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count values per column and key. Needs no key, and the primary server."""
    targets = Selection(metadata, table, column).targets()
    with connected(url) as engine:
        present_tables(engine, targets)
        report = lucent.status(engine, targets)
    if as_json:
        write_json(report.as_dict())
        return
    write_rows(
        ("column", "version", "fingerprint", "values"),
        [
            (
                f"{row.table}.{row.column}",
                row.key_version or "not sealed",
                row.fingerprint or "-",
                row.count,
            )
            for row in report.rows
        ],
    )
    if not report.rows:
        tell("no values")
    tell_left_out(report)


@app.command()
def verify(
    url: UrlOption = None,
    metadata: MetadataOption = None,
    table: TableOption = None,
    column: ColumnOption = None,
    sample: Annotated[
        int | None,
        typer.Option(min=1, metavar="ROWS", help="Only the first so many rows of each table."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Open every value, and name those that do not open."""
    targets = Selection(metadata, table, column).targets()
    lucent.default_keyring()  # missing, it is missed before anything else
    with connected(url) as engine:
        tables = present_tables(engine, targets)
        report = lucent.verify(engine, targets, sample=sample)
    if as_json:
        write_json(report.as_dict())
    else:
        write(wrapped(f"{counted(report.opened, 'value')} opened in {_names(tables)}") + "\n")
        write_failures(report.failed, report.failed_count)
        tell_left_out(report)
    raise typer.Exit(Exit.DONE if report.ok else Exit.LEFT)


@app.command()
def rotate(
    url: UrlOption = None,
    metadata: MetadataOption = None,
    table: TableOption = None,
    column: ColumnOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Open and seal in memory; write nothing.")
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="PROCESSES",
            help="Processes that share the work; one on SQLite and for a dry run.",
        ),
    ] = 1,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="ROWS", help="Rows per transaction, at most.")
    ] = DEFAULT_BATCH_SIZE,
    batch_time: Annotated[
        float | None,
        typer.Option(
            min=0.001, metavar="SECONDS", help="What a transaction should take; its size follows."
        ),
    ] = None,
    max_rate: Annotated[
        float | None, typer.Option(min=1, metavar="ROWS", help="Rows per second, at most.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Re-encrypt every value under the primary key.

    It may be interrupted and run again. Ctrl-C finishes the current batch, a second one rolls it
    back.
    """
    selection = Selection(metadata, table, column)
    targets = selection.targets()
    lucent.default_keyring()
    with connected(url) as engine:
        present_tables(engine, targets)
        code = run_rotation(
            engine,
            selection,
            workers=workers,
            as_json=as_json,
            dry_run=dry_run,
            batch_size=batch_size,
            batch_time=batch_time,
            max_rate=max_rate,
        )
    raise typer.Exit(code)


@app.command("retire-check")
def retire_check(
    version: Annotated[
        str, typer.Argument(metavar="VERSION", help="The key version that is to go.")
    ],
    url: UrlOption = None,
    metadata: MetadataOption = None,
    settle: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Count twice, so far apart: longer than your longest transaction.",
        ),
    ] = 0.0,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VIEW",
            help="A view or foreign table of your models that shows no value under VERSION; may be "
            "repeated.",
        ),
    ] = None,
) -> None:
    """Say whether any value still needs a key version. Opens nothing.

    Name every model that the key was used for: other tables are not looked at. The keyring has the
    version, unless a value does: one that nobody knows is misspelt.
    """
    if not VERSION_PATTERN.fullmatch(version):
        raise CommandError("retire-check takes a key version, such as v1")
    targets = load_targets(metadata)
    with connected(url) as engine:
        tables = present_tables(engine, targets)
        lucent.retire_check(engine, version, targets, settle=settle, exclude=exclude or ())
        report = lucent.status(engine, targets)
    counts = {(table.name, column.name): 0 for table in tables for column in table.columns}
    for row in report.rows:
        counts[row.table, row.column] += row.count
    write_rows(
        ("column", "values"),
        [(f"{table}.{column}", count) for (table, column), count in counts.items()],
    )
    write(wrapped(f"no value in these tables needs key version {version}") + "\n")
    tell_left_out(report)
    if not settle:
        tell(
            "counted once, which does not see what open transactions are about to commit: "
            "--settle counts again after so many seconds"
        )
    if not metadata:
        tell(f"only {_names(tables)} was looked at: name your models with --metadata as well")


def _names(tables: Sequence[TargetTable]) -> str:
    return ", ".join(table.name for table in tables)


# -- scoped secrets --------------------------------------------------------------------------------


@contextmanager
def _secrets(
    url: str | None, metadata: Sequence[str] | None
) -> Iterator[tuple[Session, LucentSecrets]]:
    """Give the repository, and its session to commit."""
    model = secrets_model(metadata)
    with connected(url) as engine:
        present_tables(engine, [model])
        with Session(engine) as session:
            yield session, LucentSecrets(session, model=model)


@app.command("list")
def list_secrets(
    url: UrlOption = None,
    metadata: MetadataOption = None,
    scope: Annotated[str | None, typer.Option(help="Only this scope.", metavar="SCOPE")] = None,
    owner: Annotated[
        str | None, typer.Option(help="Only this owner, of the scope.", metavar="ID")
    ] = None,
    provider: Annotated[
        str | None, typer.Option(help="Only this provider, of the owner.", metavar="NAME")
    ] = None,
) -> None:
    """List secrets: key, key version, last change. Opens none."""
    if owner is not None and scope is None:
        raise CommandError("--owner goes with --scope: it is an owner of that scope")
    if provider is not None and owner is None:
        raise CommandError("--provider goes with --scope and --owner: it is one of that owner's")
    with _secrets(url, metadata) as (session, secrets):
        after: SecretKey | None = None
        while True:
            page = secrets.list(
                scope=scope, owner_id=owner, provider=provider, limit=_PAGE, after=after
            )
            session.rollback()  # nothing stays open while somebody reads
            write_rows(
                ("key", "version", "updated"),
                [
                    (info.key, info.key_version or "not sealed", _moment(info.updated_at))
                    for info in page
                ],
            )
            if len(page) < _PAGE:
                return
            after = page[-1].key


@app.command("get")
def get_secret(
    key: KeyArgument,
    url: UrlOption = None,
    metadata: MetadataOption = None,
    reveal: Annotated[
        bool, typer.Option("--reveal", help="Print the value as JSON; asks on a terminal.")
    ] = False,
    text: Annotated[
        bool,
        typer.Option("--text", help="With --reveal, print a text as it is, and a line end."),
    ] = False,
    yes: YesOption = False,
) -> None:
    """Show a secret, redacted unless --reveal.

    With --reveal, its value alone, as JSON; with --text as well, the bare text.
    """
    if text and not reveal:
        raise CommandError("--text goes with --reveal: it says how the value is printed")
    secret_key = SecretKey.parse(key)
    with _secrets(url, metadata) as (_, secrets):
        value = secrets.require(secret_key)
        info = secrets.info(secret_key)
    if info is None:  # deleted between the two statements
        raise _not_found(secret_key)
    if reveal:
        if text and not isinstance(value, str):
            raise CommandError(
                f"{secret_key} is no text, but of the JSON type {_kind(value)}: leave --text out"
            )
        if sys.stdout.isatty() and not yes:
            confirm(f"Show the value of {printable(secret_key)} on this terminal?")
        if text:
            write_text(value)
        else:
            write_json(value)
        return
    write_rows(
        ("key", "version", "created", "updated", "value"),
        [
            (
                info.key,
                info.key_version,
                _moment(info.created_at),
                _moment(info.updated_at),
                f"<redacted {_kind(value)}>",
            )
        ],
    )


@app.command("set")
def set_secret(
    key: KeyArgument,
    url: UrlOption = None,
    metadata: MetadataOption = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="PATH", help="Read the value from this file."),
    ] = None,
    text: Annotated[
        bool,
        typer.Option("--text", help="The value is text, not JSON; a line end behind it is cut."),
    ] = False,
) -> None:
    """Store a secret. Its value is read from a file or from standard input, as JSON.

    It is never an argument: those are in the shell's history, and others see them.
    """
    secret_key = SecretKey.parse(key)
    with _secrets(url, metadata) as (session, secrets):
        version = lucent.default_keyring().primary
        secrets.set(secret_key, _read_value(file, as_text=text))
        session.commit()
    write(wrapped(f"stored {printable(secret_key)} under key version {version}") + "\n")


@app.command("delete")
def delete_secret(
    key: KeyArgument,
    url: UrlOption = None,
    metadata: MetadataOption = None,
    yes: YesOption = False,
) -> None:
    """Delete a secret, after asking."""
    secret_key = SecretKey.parse(key)
    with _secrets(url, metadata) as (session, secrets):
        there = secrets.exists(secret_key)
        session.rollback()  # nothing stays open while somebody thinks
        if there and not yes:
            confirm(f"Delete {printable(secret_key)} for good?")
        deleted = secrets.delete(secret_key)
        session.commit()
    if not deleted:
        raise _not_found(secret_key)
    write(wrapped(f"deleted {printable(secret_key)}") + "\n")


def _read_value(file: Path | None, *, as_text: bool) -> Any:
    """Return the value to store; nothing of it is in any message."""
    text = _read_text(file, as_text=as_text)
    if file is None and not text.strip("\r\n"):
        raise CommandError(
            'nothing was given on standard input; an empty text is stored as the JSON ""'
        )
    if as_text:
        return text.removesuffix("\n").removesuffix("\r")
    with contextlib.suppress(SerializationError):
        return STRICT.loads(text.encode())
    where = ""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        where = f" (line {error.lineno}, column {error.colno})"
    except (ValueError, RecursionError):
        pass
    raise CommandError(f"the value is not JSON{where}; a text that is none is stored with --text")


def _read_text(file: Path | None, *, as_text: bool) -> str:
    if file is None and sys.stdin is None:  # closed, as by `<&-`
        return ""
    if file is None and as_text and sys.stdin.isatty():
        # Of several lines that are pasted, the first alone would be stored.
        raise CommandError(
            "--text does not ask on a terminal, which gives one line at a time: name the file with "
            "--file, or pipe the text into the command; one line is asked for without --text, as "
            'JSON in double quotes: "…"'
        )
    try:
        if file is not None:
            return file.read_bytes().decode("utf-8")  # its line ends too
        if sys.stdin.isatty():
            return getpass.getpass("The value (not shown): ")
        return sys.stdin.buffer.read().decode("utf-8")
    except OSError as error:
        fault = f"{file} cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        fault = "the value is not UTF-8 text"
    except EOFError:
        return ""
    raise CommandError(fault)


def _kind(value: object) -> str:
    """Return what JSON calls the type of `value`."""
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return next((name for type_, name in kinds.items() if isinstance(value, type_)), "number")


def _moment(value: datetime) -> str:
    return value.isoformat(timespec="seconds")


def _not_found(key: SecretKey) -> lucent.SecretNotFoundError:
    return lucent.SecretNotFoundError(f"no secret is stored under {key}")


# -- the whole -------------------------------------------------------------------------------------


@app.command()
def doctor(url: UrlOption = None, metadata: MetadataOption = None) -> None:
    """Look for what is wrong; say what to do.

    At keys, database, tables, values, migrations and clock. Exit code 1 if anything is to be done.
    """
    targets = load_targets(metadata)
    code = Exit.DONE
    for finding in examine(targets, url):
        write_finding(finding.level, finding.what, finding.advice)
        if finding.level == "fix":
            code = Exit.LEFT
    raise typer.Exit(code)
