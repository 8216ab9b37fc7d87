"""Store, open, bind and rotate secrets on SQLite, and check each step.

Run it with ``make demo``. It works in a temporary folder and deletes it at the end.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, cast

import sqlalchemy
from alembic import command
from alembic.config import Config
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from sqlalchemy import Engine, LargeBinary, create_engine, select, type_coerce, update
from sqlalchemy.orm import Session

from sqlalchemy_lucent import (
    Keyring,
    LucentSecret,
    LucentSecrets,
    SecretKey,
    TamperedError,
    UnknownKeyVersionError,
    default_keyring,
    generate_master_key,
    retire_check,
    set_default_keyring,
    status,
    verify,
)

PROJECT = Path(__file__).resolve().parents[2]
SECRETS = cast("sqlalchemy.Table", LucentSecret.__table__)

DRIVE = LucentSecrets.key("tenant", "tenant_123", "googleDrive", "serviceAccount")
STRIPE = LucentSecrets.key("user", "user_456", "stripe", "apiKey")
RESEND = LucentSecrets.key("app", "default", "resend", "apiKey")

console = Console(highlight=False)


def show(line: object) -> None:
    """Print a line, or an object that rich draws, indented under its step."""
    console.print(Padding(line if isinstance(line, (Text, Table)) else str(line), (0, 0, 0, 3)))


class CheckFailedError(Exception):
    """A step did not do what it says."""


def step(number: int, title: str) -> None:
    console.print(f"\n[bold cyan]{number}[/]  [bold]{title}[/]")


def check(holds: bool, what: str) -> None:
    if not holds:
        raise CheckFailedError(what)
    show(f"[green]✓[/] {what}")


def service_account() -> dict[str, Any]:
    """Return a service-account key as Google makes them, with a new RSA key."""
    private_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = private_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    email = "drive-sync@example-project.iam.gserviceaccount.com"
    return {
        "type": "service_account",
        "project_id": "example-project",
        "private_key_id": "0123456789abcdef0123456789abcdef01234567",
        "private_key": pem.decode("ascii"),
        "client_email": email,
        "client_id": "123456789012345678901",
        "auth_uri": "https://accounts.google.com/o/oauth2/auth",
        "token_uri": "https://oauth2.googleapis.com/token",
        "universe_domain": "googleapis.com",
    }


def migrate(engine: Engine, target: str) -> None:
    """Run the migrations of the project's ``alembic/`` folder."""
    config = Config(toml_file=PROJECT / "pyproject.toml")
    config.attributes["url"] = engine.url.render_as_string(hide_password=False)
    command.upgrade(config, target)
    show(f"[dim]alembic upgrade {target}[/]")


def stored_bytes(session: Session, key: SecretKey) -> bytes:
    """Return the bytes that the database holds for `key`."""
    statement = select(type_coerce(SECRETS.c.payload, LargeBinary)).where(
        SECRETS.c.scope == key.scope, SECRETS.c.owner_id == key.owner_id
    )
    return bytes(session.execute(statement).scalar_one())


def rows_per_version(engine: Engine) -> Counter[str]:
    counts: Counter[str] = Counter()
    for row in status(engine).rows:
        counts[row.key_version or "not sealed"] += row.count
    return counts


def print_rows_per_version(title: str, counts: Counter[str]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("key version")
    table.add_column(f"rows {title}", justify="right")
    for version, count in sorted(counts.items()):
        table.add_row(version, str(count))
    show(table)


def printable(data: bytes) -> Text:
    """Show the readable prefix of a sealed value, then its first bytes in hex."""
    version, _, body = data.partition(b":")
    return Text.assemble(
        (version.decode("ascii") + ":", "bold yellow"),
        (body[:16].hex(" "), "dim"),
        f" … {len(data)} bytes",
    )


def main(directory: Path) -> None:
    engine = create_engine(f"sqlite:///{directory}/demo.db")
    key_1, key_2 = generate_master_key(), generate_master_key()

    step(1, "Create the table, by migration")
    migrate(engine, "0001")
    check(not rows_per_version(engine), "lucent_secrets is there, and empty")

    step(2, "Store three secrets under scoped keys")
    set_default_keyring(Keyring({"v1": key_1}))
    show(repr(default_keyring()))
    values: dict[SecretKey, Any] = {
        DRIVE: service_account(),
        STRIPE: {"apiKey": "sk_example_" + generate_master_key()},
        RESEND: {"apiKey": "re_example_" + generate_master_key()},
    }
    with Session(engine) as session:
        secrets = LucentSecrets(session)
        for key, value in values.items():
            secrets.set(key, value)
        session.commit()
        stored = session.scalars(select(LucentSecret)).all()
        for each in stored:
            show(f"{each.key}  [dim]{each.key_version}[/]")
        check(len(stored) == len(values), "three secrets, listed without opening any")

    step(3, "One row, as the database holds it and as the application reads it")
    with Session(engine) as session:
        data = stored_bytes(session, DRIVE)
        show(Text("database     ") + printable(data))
        secret = LucentSecrets(session).require(DRIVE)
        show(f"application  {secret!r}")
        check(secret == values[DRIVE], "what comes out equals what went in, RSA key and all")
        private_key = values[DRIVE]["private_key"]
        check(private_key.encode() not in data, "the database holds nothing of it in the clear")
        check(
            private_key not in f"{secret!r} {secret!s}",
            "printing the value shows nothing; its fields are ordinary strings",
        )
        serialization.load_pem_private_key(secret["private_key"].encode(), password=None)
        check(True, "and the private key loads")

    step(4, "Copy the tenant's bytes into another row")
    with Session(engine) as session:
        session.execute(
            update(SECRETS)
            .where(SECRETS.c.scope == RESEND.scope)
            .values({"payload": type_coerce(stored_bytes(session, DRIVE), LargeBinary)})
        )
        try:
            LucentSecrets(session).require(RESEND)
        except TamperedError as error:
            show(f"[yellow]{type(error).__name__}[/]: {error}")
        else:
            raise CheckFailedError("the copied bytes opened in a row that is not theirs")
        session.rollback()
        check(
            LucentSecrets(session).require(RESEND) == values[RESEND],
            "refused; rolled back, the row opens again",
        )

    step(5, "Promote key v2: new writes use it, everything still opens")
    both = Keyring({"v2": key_2, "v1": key_1}, primary="v2")
    set_default_keyring(both)
    show(repr(both))
    with Session(engine) as session:
        secrets = LucentSecrets(session)
        secrets.set(STRIPE, values[STRIPE])
        session.commit()
        for key, value in values.items():
            if secrets.require(key) != value:
                raise CheckFailedError(f"{key} does not read as it was stored")
        check(True, "three secrets open; the one just written is under v2")
    before = rows_per_version(engine)
    print_rows_per_version("before", before)
    check(before == {"v1": 2, "v2": 1}, "two rows still need v1")

    step(6, "Re-encrypt the rest, as a migration")
    migrate(engine, "head")
    after = rows_per_version(engine)
    print_rows_per_version("after", after)
    check(after == {"v2": 3}, "every row is under v2")
    report = verify(engine)
    check(report.ok and report.opened == len(values), "and every row opens")
    retire_check(engine, "v1")
    check(True, "no row needs v1 any more")

    step(7, "Drop v1 and read everything again")
    set_default_keyring(both.without("v1"))
    show(repr(default_keyring()))
    with Session(engine) as session:
        secrets = LucentSecrets(session)
        for key, value in values.items():
            if secrets.require(key) != value:
                raise CheckFailedError(f"{key} does not read as it was stored")
        check(True, "three secrets, unchanged")
        try:
            LucentSecrets(session, keyring=Keyring({"v1": key_1})).require(DRIVE)
        except UnknownKeyVersionError as error:
            show(f"[yellow]{type(error).__name__}[/]: {error}")
            check(True, "the old key alone opens nothing")
        else:
            raise CheckFailedError("the old key opened a rotated row")
    engine.dispose()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    console.print("[bold]sqlalchemy-lucent[/]: the main job, start to finish")
    try:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
    except CheckFailedError as failure:
        console.print(f"   [red]✗ {failure}[/]")
        sys.exit(1)
    console.print("\n[bold green]Every step held.[/]")
