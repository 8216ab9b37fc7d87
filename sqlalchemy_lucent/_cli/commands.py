"""The commands for keys and for all tables: each parses, calls one function, and prints."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import sqlalchemy_lucent as lucent

from .._envelope import VERSION_PATTERN
from .._environment import DEFAULT_KEY_VERSION, ENV_FILE_SUFFIX, ENV_KEY, ENV_KEYS, ENV_VARIABLES
from ..exceptions import hide_locals
from ..rotation import DEFAULT_BATCH_SIZE
from ..rotation.targets import TargetTable, resolve_targets
from .database import METADATA_VARIABLE, Selection, load_targets, opened, with_stored_secrets
from .doctor import examine
from .errors import CommandError, Exit
from .rotate import run_rotation, tell_left_out, write_failures
from .terminal import counted, say, tell, write, write_finding, write_json, write_rows

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
        help="The database. Default: DATABASE_URL, then sqlalchemy.url of alembic.ini. Prefer "
        "these: other users can read a command line.",
    ),
]
MetadataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--metadata",
        metavar="MODULE:NAME",
        envvar=METADATA_VARIABLE,
        help="Your models, as in app.models:Base; may be repeated, and the variable may name "
        "several, separated by spaces. Default: sqlalchemy_lucent:LucentBase.",
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
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="VIEW",
        help="A view or foreign table of your models that shows no value under VERSION; may be "
        "repeated.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


def _version(wanted: bool) -> None:
    if wanted:
        write(f"sqlalchemy-lucent {lucent.__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
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
        typer.Option("--env", help="Print shell lines that put the new key before those in use."),
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

    With --env, print shell lines that promote it. They refer to the keys in use by the variables
    that hold them, so they show none of these.
    """
    if key_version is not None and not env:
        raise CommandError("--key-version goes with --env: without --env, keygen prints only a key")
    write(_promoting_lines(key_version) if env else f"{lucent.generate_master_key()}\n")
    if sys.stdout.isatty():
        tell("Keep a copy outside the database: without the key, nothing sealed under it opens.")


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
    keyring.adding(new, key)  # refuses a version that is taken or malformed
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
    """Return what a shell expands to the value of `variable`, or to the content of its file."""
    return f'$(cat -- "${variable}")' if variable.endswith(ENV_FILE_SUFFIX) else f"${variable}"


def _next_version(versions: Sequence[str]) -> str:
    numbers = [int(found[1]) for v in versions if (found := re.fullmatch(r"v(\d{1,9})", v))]
    if not numbers:
        raise CommandError(
            "the versions in use are not v1, v2, …: name the new version with --key-version"
        )
    return f"v{max(numbers) + 1}"


# -- values of all tables --------------------------------------------------------------------------


@app.command()
def status(
    url: UrlOption = None,
    metadata: MetadataOption = None,
    table: TableOption = None,
    column: ColumnOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count values per column and key. Needs the primary server, but no key."""
    targets = Selection(metadata, table, column).targets()
    with opened(url, targets) as (engine, _):
        report = lucent.status(engine, targets)
    if as_json:
        write_json(report.as_dict())
        return
    rows = [
        (f"{r.table}.{r.column}", r.key_version or "not sealed", r.fingerprint or "-", r.count)
        for r in report.rows
    ]
    write_rows(("column", "version", "fingerprint", "values"), rows, is_report=True)
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
        typer.Option(min=1, metavar="ROWS", help="Only the first ROWS rows of each table."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Open every value, and name those that do not open."""
    targets = Selection(metadata, table, column).targets()
    lucent.default_keyring()  # raises before a database is asked
    with opened(url, targets) as (engine, tables):
        report = lucent.verify(engine, targets, sample=sample)
    if as_json:
        write_json(report.as_dict())
    else:
        say(f"{counted(report.opened, 'value')} opened in {_names(tables)}")
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
            help="Start PROCESSES rotators that share the rows; always one on SQLite and in a dry "
            "run.",
        ),
    ] = 1,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="ROWS", help="Rows per transaction, at most.")
    ] = DEFAULT_BATCH_SIZE,
    batch_time: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            metavar="SECONDS",
            help="Adjust the batch so that a transaction takes this long.",
        ),
    ] = None,
    max_rate: Annotated[
        float | None, typer.Option(min=1, metavar="ROWS", help="Rows per second, at most.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Re-encrypt every value under the primary key.

    You may interrupt it and run it again. Ctrl-C finishes the current batch; a second Ctrl-C rolls
    it back.
    """
    selection = Selection(metadata, table, column)
    targets = selection.targets()
    lucent.default_keyring()
    with opened(url, targets) as (engine, _):
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
    version: Annotated[str, typer.Argument(metavar="VERSION", help="The key version to retire.")],
    url: UrlOption = None,
    metadata: MetadataOption = None,
    settle: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Count twice, this long apart. Make it longer than your longest transaction.",
        ),
    ] = 0.0,
    exclude: ExcludeOption = None,
) -> None:
    """Say whether any value still needs a key version. Opens nothing.

    Name every model that the key was used for: other tables are not counted, except lucent_secrets.
    A version that neither the keyring nor a value has is refused, because it must be misspelt.
    """
    if not VERSION_PATTERN.fullmatch(version):
        raise CommandError("retire-check takes a key version, such as v1")
    named = load_targets(metadata)
    with opened(url, named) as (engine, _):
        targets = with_stored_secrets(engine, named)
        tables = resolve_targets(targets, engine)
        lucent.retire_check(engine, version, targets, settle=settle, exclude=exclude or ())
        report = lucent.status(engine, targets)
    say(f"no value in these tables needs key version {version}")
    rows = []
    for table in tables:
        for column in table.columns:
            of_column = (table.name, column.name)
            found = [row for row in report.rows if (row.table, row.column) == of_column]
            under = sum(row.count for row in found if row.key_version == version)
            rows.append((".".join(of_column), under, sum(row.count for row in found)))
    write_rows(("column", f"under {version}", "all values"), rows, is_report=True)
    tell_left_out(report)
    if not settle:
        tell(
            "counted once, which does not see what open transactions are about to commit: "
            "--settle SECONDS counts again after them"
        )
    if not metadata:
        verb = "was" if len(tables) == 1 else "were"
        tell(f"only {_names(tables)} {verb} counted: name your models with --metadata as well")


def _names(tables: Sequence[TargetTable]) -> str:
    return ", ".join(table.name for table in tables)


# -- doctor ----------------------------------------------------------------------------------------


@app.command()
def doctor(url: UrlOption = None, metadata: MetadataOption = None) -> None:
    """Look for what is wrong, and say what to do.

    It checks keys, database, tables, values, migrations and clock. Exit code 1 if there is anything
    to do.
    """
    targets = load_targets(metadata)
    code = Exit.DONE
    for finding in examine(targets, url):
        write_finding(finding.level, finding.what, finding.advice)
        if finding.level == "fix":
            code = Exit.LEFT
    raise typer.Exit(code)
