"""The commands for scoped secrets. A value is never an argument and in no message."""

from __future__ import annotations

import contextlib
import getpass
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from sqlalchemy.orm import Session

import sqlalchemy_lucent as lucent

from .._json import STRICT
from ..exceptions import SerializationError
from ..repository import LucentSecrets, SecretInfo
from ..secret_key import SecretKey
from .commands import MetadataOption, UrlOption
from .commands import app as app  # with all commands
from .database import opened, secrets_model
from .errors import CommandError
from .terminal import confirm, printable, say, write_json, write_rows, write_text

_UNITS: Final = {"d": 86400, "h": 3600, "m": 60, "s": 1}

_PAGE: Final = 500  # secrets listed by one statement

YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
KeyArgument = Annotated[
    str, typer.Argument(metavar="KEY", help="scope:ownerId:provider:name", show_default=False)
]


@contextmanager
def open_secrets(
    url: str | None, metadata: Sequence[str] | None, *, keep: int | None = None
) -> Iterator[tuple[Session, LucentSecrets]]:
    """Give the repository, and its session to commit.

    :param keep: how many values of a secret to keep.
    """
    model = secrets_model(metadata)
    with opened(url, [model]) as (engine, _), Session(engine) as session:
        yield session, LucentSecrets(session, model=model, keep=keep)


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
    deleted: Annotated[
        bool, typer.Option("--deleted", help="Also those that can be undeleted.")
    ] = False,
) -> None:
    """List secrets: key, key version, last change, age, expiry. Opens none."""
    if owner is not None and scope is None:
        raise CommandError("--owner goes with --scope: name the scope of this owner too")
    if provider is not None and owner is None:
        raise CommandError("--provider goes with --scope and --owner: name both too")
    with open_secrets(url, metadata) as (session, secrets):
        after: SecretKey | None = None
        while True:
            page = secrets.list(
                scope=scope,
                owner_id=owner,
                provider=provider,
                limit=_PAGE,
                after=after,
                deleted=deleted,
            )
            session.rollback()  # hold no transaction while the user reads
            rows = [_row(info, deleted=deleted) for info in page]
            headings = ("key", "version", "updated", "age", "expires")
            write_rows((*headings, "purged") if deleted else headings, rows)
            if len(page) < _PAGE:
                return
            after = page[-1].key


def _row(info: SecretInfo, *, deleted: bool) -> tuple[object, ...]:
    version = info.key_version or "not sealed"
    updated, expires = moment(info.updated_at), moment(info.expires_at)
    row = (info.key, version, updated, _age(info.updated_at), expires)
    return (*row, moment(info.purge_at)) if deleted else row


@app.command("get")
def get_secret(
    key: KeyArgument,
    url: UrlOption = None,
    metadata: MetadataOption = None,
    reveal: Annotated[
        bool, typer.Option("--reveal", help="Print the value as JSON; asks on a terminal.")
    ] = False,
    text: Annotated[
        bool, typer.Option("--text", help="With --reveal, print a text as it is, with a line end.")
    ] = False,
    yes: YesOption = False,
) -> None:
    """Show a secret, redacted unless --reveal.

    With --reveal, print only its value, as JSON; with --text as well, the bare text.
    """
    if text and not reveal:
        raise CommandError("--text goes with --reveal: it says how the value is printed")
    secret_key = SecretKey.parse(key)
    with open_secrets(url, metadata) as (_, secrets):
        value = secrets.require(secret_key)
        info = None if reveal else secrets.info(secret_key)
    if reveal:
        if text and not isinstance(value, str):
            raise CommandError(
                f"{secret_key} is not text but of the JSON type {_kind(value)}: leave --text out"
            )
        if sys.stdout.isatty() and not yes:
            confirm(f"Show the value of {printable(secret_key)} on this terminal?")
        if text:
            write_text(value)
        else:
            write_json(value)
        return
    if info is None:  # deleted between the two statements
        raise not_found(secret_key)
    created, updated = moment(info.created_at), moment(info.updated_at)
    row = (info.key, info.key_version, created, updated, f"<redacted {_kind(value)}>")
    write_rows(("key", "version", "created", "updated", "value"), [row])


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
        typer.Option("--text", help="The value is text, not JSON; one line end after it is cut."),
    ] = False,
    expires_at: Annotated[
        str | None,
        typer.Option(
            "--expires-at", metavar="TIME", help="When it expires, as in 2027-01-31T12:00:00Z."
        ),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option("--keep", min=1, metavar="N", help="Keep N values of it, this one included."),
    ] = None,
) -> None:
    """Store a secret, read from a file or from standard input as JSON.

    The value is never an argument: a shell keeps those in its history, and other users see them.
    """
    secret_key = SecretKey.parse(key)
    expiry = None if expires_at is None else _parse_moment(expires_at)
    with open_secrets(url, metadata, keep=keep) as (session, secrets):
        version = lucent.default_keyring().primary
        secrets.set(secret_key, _read_value(file, as_text=text), expires_at=expiry)
        session.commit()
    say(f"stored {printable(secret_key)} under key version {version}")


@app.command("delete")
def delete_secret(
    key: KeyArgument,
    url: UrlOption = None,
    metadata: MetadataOption = None,
    yes: YesOption = False,
    purge_after: Annotated[
        str | None,
        typer.Option(
            "--purge-after", metavar="TIME", help="Keep it so long for `undelete`: 12h, 7d."
        ),
    ] = None,
) -> None:
    """Delete a secret, after asking; with --purge-after, only for a while."""
    secret_key = SecretKey.parse(key)
    delay = None if purge_after is None else duration("--purge-after", purge_after)
    with open_secrets(url, metadata) as (session, secrets):
        exists = secrets.exists(secret_key)
        session.rollback()  # hold no transaction while the user thinks
        if exists and not yes:
            how = " for good" if delay is None else ""
            confirm(f"Delete {printable(secret_key)}{how}?")
        deleted = secrets.delete(secret_key, purge_after=delay)
        session.commit()
    if not deleted:
        raise not_found(secret_key)
    say(f"deleted {printable(secret_key)}")


def _read_value(file: Path | None, *, as_text: bool) -> Any:
    """Return the value to store. No message quotes it."""
    text = _read_text(file, as_text=as_text)
    if file is None and not text.strip("\r\n"):
        raise CommandError(
            'nothing was given on standard input; to store an empty text, give the JSON ""'
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
    raise CommandError(f"the value is not JSON{where}; to store plain text, add --text")


def _read_text(file: Path | None, *, as_text: bool) -> str:
    if file is None and sys.stdin is None:  # closed, as by `<&-`
        return ""
    if file is None and as_text and sys.stdin.isatty():
        # Only the first of several pasted lines would be stored.
        raise CommandError(
            "--text does not read a terminal, which gives one line at a time: name a file with "
            "--file, or pipe the text in. To type one line, leave --text out and type JSON in "
            'double quotes: "…"'
        )
    try:
        if file is not None:
            return file.read_bytes().decode("utf-8")  # keeps line ends
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
    """Return JSON's name for the type of `value`."""
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return next((name for type_, name in kinds.items() if isinstance(value, type_)), "number")


def moment(value: datetime | None) -> str:
    """Return the text of a time, to the second."""
    return "-" if value is None else value.isoformat(timespec="seconds")


def _age(since: datetime) -> str:
    """Return how long ago a time was, in its largest unit."""
    seconds = max(0, int((datetime.now(UTC) - since).total_seconds()))
    for unit, size in _UNITS.items():
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return "0s"


def duration(option: str, text: str) -> timedelta:
    """Return the duration that an option gives, such as ``12h``."""
    found = re.fullmatch(r"(\d{1,6})([dhms])", text, re.ASCII)
    if found is None:
        raise CommandError(f"{option} takes a number of days, hours, minutes or seconds: 7d, 12h")
    return timedelta(seconds=int(found[1]) * _UNITS[found[2]])


def _parse_moment(text: str) -> datetime:
    """Return a time that was given as text; the repository refuses one without a time zone."""
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(text)
    raise CommandError("--expires-at takes a time with its zone, as in 2027-01-31T12:00:00Z")


def not_found(key: SecretKey) -> lucent.SecretNotFoundError:
    """Return the error for a secret that is not there."""
    return lucent.SecretNotFoundError(f"no secret is stored under {key}")
