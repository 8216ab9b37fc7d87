"""What `require` costs beside hand-written selects of the same row as plain JSON.

    python -m tests.bench.bench_repository [URL]

One select is built for each call, as application code does; the other is built once and kept. All
run over one session and connection, in turns, and each turn is timed by itself; printed are the
medians in microseconds, and of `require` its ratio to each. The default URL is SQLite in memory,
where the database costs least and the ratio is therefore the worst.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    MetaData,
    String,
    Table,
    bindparam,
    create_engine,
    insert,
    select,
)
from sqlalchemy.orm import Session

from sqlalchemy_lucent import (
    Keyring,
    LucentBase,
    LucentSecrets,
    SecretKey,
    generate_master_key,
    set_default_keyring,
)

TURNS = 300
CALLS_PER_TURN = 20

KEY = SecretKey("tenant", "tenant_123", "googleDrive", "serviceAccount")
SMALL = {"apiKey": "sk_live_" + "a" * 24}
LARGE = {  # the shape and size of a Google service-account key
    "type": "service_account",
    "project_id": "project",
    "private_key": "-----BEGIN PRIVATE KEY-----\n" + "A" * 1650 + "\n-----END PRIVATE KEY-----\n",
    "client_email": "service@project.iam.gserviceaccount.com",
    "token_uri": "https://oauth2.googleapis.com/token",
}

plain = Table(
    "bench_plain_secrets",
    MetaData(),
    *(
        Column(name, String(128), primary_key=True)
        for name in ("scope", "owner_id", "provider", "name")
    ),
    Column("payload", JSON),
)


def timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    for _ in range(CALLS_PER_TURN):
        call()
    return (time.perf_counter() - begin) / CALLS_PER_TURN * 1e6


def main(url: str) -> None:
    set_default_keyring(Keyring({"v1": generate_master_key()}))
    engine = create_engine(url)
    tables = (plain.metadata, LucentBase.metadata)
    for metadata in tables:
        metadata.drop_all(engine)
        metadata.create_all(engine)
    try:
        for label, value in (("small", SMALL), ("service account", LARGE)):
            with Session(engine) as session:
                measure(session, label, value)
    finally:
        for metadata in tables:
            metadata.drop_all(engine)
        engine.dispose()


def measure(session: Session, label: str, value: Any) -> None:
    session.execute(insert(plain).values(**KEY._asdict(), payload=value))
    LucentSecrets(session).set(KEY, value)

    def built() -> Any:
        statement = select(plain.c.payload).where(
            plain.c.scope == KEY.scope,
            plain.c.owner_id == KEY.owner_id,
            plain.c.provider == KEY.provider,
            plain.c.name == KEY.name,
        )
        return session.execute(statement).scalar_one()

    statement = select(plain.c.payload).where(
        *(plain.c[name] == bindparam(name) for name in KEY._fields)
    )

    def kept() -> Any:
        return session.execute(statement, KEY._asdict()).scalar_one()

    def require() -> Any:
        # A repository of its own for each call, as a request handler has.
        return LucentSecrets(session).require(KEY)

    assert built() == kept() == require() == value
    turns = [(timed(built), timed(kept), timed(require)) for _ in range(TURNS)]
    for_built, for_kept, ours = (statistics.median(times) for times in zip(*turns, strict=True))
    print(
        f"{label:16} built {for_built:6.1f} µs  kept {for_kept:6.1f} µs  require {ours:6.1f} µs  "
        f"ratio to built {statistics.median(turn[2] / turn[0] for turn in turns):.2f}, "
        f"to kept {statistics.median(turn[2] / turn[1] for turn in turns):.2f}"
    )
    session.rollback()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "sqlite://")
