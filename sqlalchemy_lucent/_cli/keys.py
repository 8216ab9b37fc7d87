"""The commands for a key's life: each takes one step of the key registry, and prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Annotated

import typer

import sqlalchemy_lucent as lucent

from .._database.connection import DEFAULT_LOCK_TIMEOUT, DEFAULT_RETRIES
from .._envelope import is_older
from ..keys import DEFAULT_QUIET, KeyRegistry, RegisteredKey
from .commands import ExcludeOption, JsonOption, MetadataOption, UrlOption, app
from .database import load_targets, opened, with_stored_secrets
from .errors import CommandError, Exit
from .terminal import counted, say, tell, write, write_json, write_rows

keys = typer.Typer(help="Keys: those of this environment, and their life in the registry.")
app.add_typer(keys, name="keys")

VersionArgument = Annotated[
    str, typer.Argument(metavar="VERSION", help="The key version.", show_default=False)
]
KindOption = Annotated[
    list[str] | None,
    typer.Option(
        "--kind",
        metavar="KIND",
        help="A kind of process that must have announced itself, such as web; may be repeated.",
    ),
]
QuietOption = Annotated[
    float,
    typer.Option(
        min=1,
        metavar="SECONDS",
        help="How long a process may have been silent. Others count as gone.",
    ),
]
RotateOption = Annotated[
    bool,
    typer.Option(
        "--rotate",
        help="Re-encrypt what processes still seal under it, before and after the fence is there.",
    ),
]
LockTimeoutOption = Annotated[
    float,
    typer.Option(
        min=0.001,
        metavar="SECONDS",
        help="How long to wait for a table. Others queue behind it meanwhile.",
    ),
]
RetriesOption = Annotated[
    int, typer.Option(min=0, metavar="N", help="Further attempts, up to 4 seconds apart.")
]


@contextmanager
def _registry(url: str | None, metadata: Sequence[str] | None) -> Iterator[KeyRegistry]:
    targets = load_targets(metadata)
    lucent.default_keyring()  # raises before a database is asked
    with opened(url, targets) as (engine, _):
        yield KeyRegistry(engine, targets=with_stored_secrets(engine, targets))


def _write_keys(found: Sequence[RegisteredKey]) -> None:
    rows = [
        (key.version, key.state, key.check_id[:8], _moment(_since(key)), _moment(key.leaked_since))
        for key in found
    ]
    write_rows(("version", "state", "check id", "since", "leaked"), rows)


def _since(key: RegisteredKey) -> datetime:
    return key.retired_at or key.fenced_at or key.promoted_at or key.registered_at


def _moment(moment: datetime | None) -> str:
    return "-" if moment is None else f"{moment:%Y-%m-%d %H:%M}"


@keys.callback(invoke_without_command=True)
def show(context: typer.Context, metadata: MetadataOption = None) -> None:
    """Show versions and fingerprints of the configured keys, or take a step of a key's life."""
    if context.invoked_subcommand is not None:
        source = context.get_parameter_source("metadata")
        if source is not None and source.name == "COMMANDLINE":
            raise CommandError("--metadata goes after the name of the step")
        return
    load_targets(metadata)
    keyring = lucent.default_keyring()
    uses = dict.fromkeys(keyring.versions, "opens")
    uses[keyring.primary] = "seals and opens"
    if keyring.oldest is not None:
        uses.update((v, "retired") for v in uses if is_older(v, keyring.oldest))
    rows = [(version, keyring.fingerprint(version), use) for version, use in uses.items()]
    write_rows(("version", "fingerprint", "use"), rows)


@keys.command()
def register(
    url: UrlOption = None, metadata: MetadataOption = None, as_json: JsonOption = False
) -> None:
    """Register the configured keys that are new, and show all with their states."""
    with _registry(url, metadata) as registry:
        found = registry.register()
    if as_json:
        write_json([key.as_dict() for key in found])
    else:
        _write_keys(found)


@keys.command()
def check(
    url: UrlOption = None, metadata: MetadataOption = None, as_json: JsonOption = False
) -> None:
    """Fail if the configured keys are not those of the registry, or one is missing.

    Registers nothing. A missing fence is noted, and no failure.
    """
    with _registry(url, metadata) as registry:
        checked = registry.check(register=False)
    if as_json:
        found = [key.as_dict() for key in checked.keys]
        write_json({"keys": found, "notes": list(checked.notes)})
        return
    _write_keys(checked.keys)
    for note in checked.notes:
        tell(note)


@keys.command()
def ready(
    version: VersionArgument,
    kind: KindOption = None,
    quiet: QuietOption = DEFAULT_QUIET,
    url: UrlOption = None,
    metadata: MetadataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which processes have a key, and which lack it. Exit code 1 if it cannot be promoted."""
    with _registry(url, metadata) as registry:
        found = registry.readiness(version, kind or (), quiet=quiet)
    if as_json:
        write_json(found.as_dict())
    else:
        lacking = {holder.id for holder in found.lacking}
        rows = [
            (h.kind, h.host, h.id[:8], h.primary_version, "no" if h.id in lacking else "yes")
            for h in found.holders
        ]
        write_rows(("kind", "host", "process", "primary", f"has {version}"), rows)
        say(found.reason or f"{version} can be promoted")
    raise typer.Exit(Exit.DONE if found.ok else Exit.LEFT)


@keys.command()
def promote(
    version: VersionArgument,
    kind: KindOption = None,
    quiet: QuietOption = DEFAULT_QUIET,
    url: UrlOption = None,
    metadata: MetadataOption = None,
) -> None:
    """Make a key the primary, if every process has it."""
    with _registry(url, metadata) as registry:
        registry.promote(version, kind or (), quiet=quiet)
    say(
        f"{version} is the primary. Processes that follow the registry seal with it within 30 "
        "seconds; then run lucent rotate"
    )


@keys.command()
def fence(
    version: VersionArgument,
    url: UrlOption = None,
    metadata: MetadataOption = None,
    exclude: ExcludeOption = None,
    rotate: RotateOption = False,
    lock_timeout: LockTimeoutOption = DEFAULT_LOCK_TIMEOUT,
    retries: RetriesOption = DEFAULT_RETRIES,
) -> None:
    """Have the database refuse new values under a key."""
    with _registry(url, metadata) as registry:
        registry.fence(
            version,
            exclude=exclude or (),
            rotate=rotate,
            lock_timeout=lock_timeout,
            retries=retries,
        )
    say(f"the database refuses values under {version}")


@keys.command()
def unfence(
    version: VersionArgument, url: UrlOption = None, metadata: MetadataOption = None
) -> None:
    """Have the database take values under a fenced key again."""
    with _registry(url, metadata) as registry:
        registry.unfence(version)
    say(f"the database takes values under {version} again")


@keys.command()
def retire(
    version: VersionArgument,
    url: UrlOption = None,
    metadata: MetadataOption = None,
    exclude: ExcludeOption = None,
    rotate: RotateOption = False,
    lock_timeout: LockTimeoutOption = DEFAULT_LOCK_TIMEOUT,
    retries: RetriesOption = DEFAULT_RETRIES,
) -> None:
    """Fence a key, prove that no value needs it, and write a receipt.

    Name every model that the key was used for: other tables are not counted.
    """
    with _registry(url, metadata) as registry:
        registry.retire(
            version,
            exclude=exclude or (),
            rotate=rotate,
            lock_timeout=lock_timeout,
            retries=retries,
        )
        head = registry.receipts()[-1].head
    say(f"{version} is retired; take its key out of every environment")
    write(f"receipt {head}\n")
    if not metadata:
        tell("only scoped secrets were counted: name your models with --metadata as well")


@keys.command()
def unretire(
    version: VersionArgument, url: UrlOption = None, metadata: MetadataOption = None
) -> None:
    """Bring a retired key back, for a backup that was restored. Drops its fence."""
    with _registry(url, metadata) as registry:
        registry.unretire(version)
    say(f"values under {version} open again: run lucent rotate, then retire it")


@keys.command()
def leaked(
    version: VersionArgument,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="When it leaked, as in 2026-05-04T13:00Z. Default: now."),
    ] = None,
    url: UrlOption = None,
    metadata: MetadataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write that a key has leaked, and list the values to replace. Exit code 1 while any is left.

    A line closes when another value is stored in its row, and not by re-encryption.
    """
    with _registry(url, metadata) as registry:
        report = registry.leaked(version, since=_parse_time(since))
    if as_json:
        write_json(report.as_dict())
    else:
        rows = [
            (f"{v.table}.{v.column}", ", ".join(v.primary_key), v.owner or "-", v.outcome or "open")
            for v in report.values
        ]
        write_rows(("column", "primary key", "owner", "state"), rows)
        say(f"{counted(len(report.open), 'value')} left to replace")
        for name, number in report.rotated_away.items():
            tell(
                f"{name}: {counted(number, 'value')} had left {version} before, and cannot be named"
            )
        if report.unopened:
            tell(f"{counted(report.unopened, 'value')} under {version} did not open: lucent verify")
    raise typer.Exit(Exit.LEFT if report.open else Exit.DONE)


def _parse_time(text: str | None) -> datetime | None:
    if text is None:
        return None
    with suppress(ValueError):
        found = datetime.fromisoformat(text)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found
    raise CommandError("--since takes a time such as 2026-05-04T13:00Z")


@keys.command()
def receipts(
    head: Annotated[
        str | None,
        typer.Option(metavar="HEAD", help="A head that was kept: tells if lines were cut off."),
    ] = None,
    url: UrlOption = None,
    metadata: MetadataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show and prove what was done to keys. Exit code 1 if a line is not as it was written."""
    with _registry(url, metadata) as registry:
        lines = registry.receipts()
        proof = registry.verify_receipts(head)
    if as_json:
        write_json({"receipts": [line.as_dict() for line in lines], "proof": proof.as_dict()})
    else:
        rows = [
            (line.seq, _moment(line.at), line.action, line.version, _who(line.details))
            for line in lines
        ]
        write_rows(("line", "time", "action", "version", "by"), rows)
        for fault in proof.faults:
            say(fault.reason)
        if proof.ok:
            say(f"{counted(proof.lines, 'line')} proven")
        write(f"head {proof.head or '-'}\n")
    raise typer.Exit(Exit.DONE if proof.ok else Exit.LEFT)


def _who(details: dict[str, object]) -> str:
    who = details.get("who")
    return f"{who.get('user')}@{who.get('host')}" if isinstance(who, dict) else "-"
