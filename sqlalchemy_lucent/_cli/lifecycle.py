"""The commands for secrets that expire, their versions, and those that were deleted."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

import sqlalchemy_lucent as lucent

from ..secret_key import SecretKey
from .commands import MetadataOption, UrlOption, app
from .database import opened, secrets_model
from .errors import Exit
from .secrets import KeyArgument, duration, moment, not_found, open_secrets
from .terminal import counted, printable, say, write_rows


@app.command()
def due(
    url: UrlOption = None,
    metadata: MetadataOption = None,
    within: Annotated[
        str, typer.Option(metavar="TIME", help="How far to look ahead: 30m, 12h, 7d.")
    ] = "7d",
    scope: Annotated[str | None, typer.Option(help="Only this scope.", metavar="SCOPE")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the N that expire first.")
    ] = None,
) -> None:
    """List secrets that expire soon, or have expired. Opens none.

    Exit code 1 if there is one.
    """
    before = datetime.now(UTC) + duration("--within", within)
    with open_secrets(url, metadata) as (_, secrets):
        found = secrets.due(before, scope=scope, limit=limit)
    now = datetime.now(UTC)
    rows = [
        (
            info.key,
            moment(info.expires_at),
            "expired" if info.expires_at is not None and info.expires_at <= now else "-",
            "needs reauthorization" if info.needs_reauthorization else "-",
        )
        for info in found
    ]
    write_rows(("key", "expires", "state", "renewal"), rows)
    raise typer.Exit(Exit.LEFT if found else Exit.DONE)


@app.command()
def versions(key: KeyArgument, url: UrlOption = None, metadata: MetadataOption = None) -> None:
    """List the versions of a secret, the newest first. Opens none."""
    secret_key = SecretKey.parse(key)
    with open_secrets(url, metadata) as (_, secrets):
        found = secrets.versions(secret_key)
    if not found:
        raise not_found(secret_key)
    rows = [
        (
            "-" if each.number is None else str(each.number),
            each.stage or "-",
            each.key_version or "not sealed",
            moment(each.created_at),
            moment(each.expires_at),
        )
        for each in found
    ]
    write_rows(("number", "stage", "version", "created", "expires"), rows)


@app.command()
def restore(
    key: KeyArgument,
    number: Annotated[int, typer.Argument(metavar="NUMBER", help="As `versions` shows it.")],
    url: UrlOption = None,
    metadata: MetadataOption = None,
) -> None:
    """Make an earlier version of a secret current again. Keeps the value that it replaces."""
    secret_key = SecretKey.parse(key)
    with open_secrets(url, metadata) as (session, secrets):
        restored = secrets.restore(secret_key, number)
        session.commit()
    say(f"restored version {number} of {printable(secret_key)} as version {restored}")


@app.command()
def undelete(key: KeyArgument, url: UrlOption = None, metadata: MetadataOption = None) -> None:
    """Bring back a secret that was deleted with --purge-after."""
    secret_key = SecretKey.parse(key)
    with open_secrets(url, metadata) as (session, secrets):
        secrets.undelete(secret_key)
        session.commit()
    say(f"undeleted {printable(secret_key)}")


@app.command()
def purge(url: UrlOption = None, metadata: MetadataOption = None) -> None:
    """Delete for good what was deleted with --purge-after, once that is over.

    Also the versions of secrets that are deleted. Run it from time to time.
    """
    model = secrets_model(metadata)
    with opened(url, [model]) as (engine, _):
        purged = lucent.purge(engine, model=model)
    say(f"purged {counted(purged, 'secret')}")
