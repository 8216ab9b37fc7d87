"""When secrets expire: what is due, in order, found by an index."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine, LargeBinary, event
from sqlalchemy.orm import Session

from sqlalchemy_lucent import (
    InvalidKeyError,
    LucentSecret,
    LucentSecrets,
    SecretInfo,
    SecretKey,
    rotate,
)
from sqlalchemy_lucent.keyring import Keyring
from tests.conftest import LONG
from tests.secret_tables import SECRETS, STATES

NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)


@pytest.fixture
def secrets(session: Session) -> LucentSecrets:
    return LucentSecrets(session)


def key(owner: str, scope: str = "tenant") -> SecretKey:
    return SecretKey(scope, owner, "google", "token")


def owners(found: list[SecretInfo]) -> list[str]:
    return [info.key.owner_id for info in found]


def test_what_expires_is_due_in_its_order(secrets: LucentSecrets) -> None:
    for owner, hours in (("c", 1), ("a", 3), ("b", 2)):
        secrets.set(key(owner), owner, expires_at=NOW + hours * HOUR)
    secrets.set(key("d", "user"), 1, expires_at=NOW + HOUR)
    secrets.set(key("never"), 1)

    assert owners(secrets.due(NOW + 2.5 * HOUR)) == ["c", "d", "b"]
    assert owners(secrets.due(NOW + 9 * HOUR, limit=1)) == ["c"]
    assert owners(secrets.due(NOW + 9 * HOUR, scope="tenant")) == ["c", "b", "a"]
    assert owners(secrets.due(NOW + 9 * HOUR, scope="tenant", owner_id="a")) == ["a"]
    assert secrets.due(NOW) == secrets.due(NOW + HOUR) == []
    (info,) = secrets.due(NOW + 9 * HOUR, scope="user")
    assert info == secrets.info(key("d", "user"))
    assert info.expires_at == NOW + HOUR
    with pytest.raises(InvalidKeyError):
        secrets.due(NOW, owner_id="a")


def test_another_value_does_not_expire_with_the_one_before(
    secrets: LucentSecrets, session: Session
) -> None:
    for owner in "abcd":
        secrets.set(key(owner), 1, expires_at=NOW + HOUR)
    secrets.set(key("a"), 2)
    secrets.set(key("b"), 2, expires_at=NOW + 2 * HOUR)
    secrets.delete(key("c"))
    session.get_one(LucentSecret, tuple(key("d"))).payload = 2
    session.flush()

    due = secrets.due(NOW + 9 * HOUR)

    assert owners(due) == ["b"]
    assert due[0].expires_at == NOW + 2 * HOUR
    assert [info.expires_at for info in secrets.list()] == [None, NOW + 2 * HOUR, None]


def test_a_time_zone_counts_and_microseconds_stay(secrets: LucentSecrets) -> None:
    local = (NOW + HOUR).replace(microsecond=123_457).astimezone(timezone(timedelta(hours=-8)))
    secrets.set(key("a"), 1, expires_at=local)
    assert secrets.list()[0].expires_at == local
    assert secrets.due(local) == []
    assert owners(secrets.due(local + timedelta(microseconds=1))) == ["a"]


def test_a_rotation_does_not_change_when_it_expires(
    engine: Engine, session: Session, secrets: LucentSecrets, promoted: Keyring
) -> None:
    secrets.set(key("a"), 1, expires_at=NOW + HOUR)
    session.commit()
    assert rotate(engine, keyring=promoted).rotated == 1
    assert owners(secrets.due(NOW + 2 * HOUR)) == ["a"]
    LucentSecrets(session, keyring=promoted).rotate(key("a"), promoted.with_primary("v1"))
    assert owners(secrets.due(NOW + 2 * HOUR)) == ["a"]


def test_expected_tokens_go_with_an_expiry(secrets: LucentSecrets) -> None:
    token = secrets.set(key("a"), 1, expected=None, expires_at=NOW + HOUR)
    secrets.set(key("a"), 2, expected=token, expires_at=NOW + 2 * HOUR)
    assert [info.expires_at for info in secrets.list()] == [NOW + 2 * HOUR]
    assert len(secrets.versions(key("a"))) == 1


# -- the index -------------------------------------------------------------------------------------


def fill(engine: Engine, doublings: int) -> None:
    """Store 1,000 secrets that expire one after the other, and double them in the database."""
    keys = [key(f"{number}-") for number in range(1000)]
    state = {"number": 1, "last_number": 1, "lease_number": 0}
    with Session(engine) as session:
        LucentSecrets(session).set_many(dict.fromkeys(keys, 1))
        written_at = session.execute(sa.select(sa.func.min(SECRETS.c.updated_at))).scalar_one()
        session.execute(sa.update(SECRETS).values(updated_at=written_at))
        session.execute(
            sa.insert(STATES),
            [
                {**each._asdict(), **state, "written_at": written_at, "expires_at": NOW + n * HOUR}
                for n, each in enumerate(keys, 1)
            ],
        )
        for letter in "abcdefghij"[:doublings]:
            for table in (SECRETS, STATES):
                columns = [column for column in table.c if column.computed is None]
                values = {column.name: column for column in columns} | {
                    "owner_id": table.c.owner_id + letter
                }
                if table is SECRETS:
                    values["payload"] = sa.type_coerce(table.c.payload, LargeBinary)
                selected = sa.select(*values.values())
                session.execute(sa.insert(table).from_select(list(values), selected))
        session.commit()
        for table in (SECRETS, STATES):
            analyze = "ANALYZE TABLE" if engine.dialect.name in ("mysql", "mariadb") else "ANALYZE"
            session.execute(sa.text(f"{analyze} {table.name}"))
        session.commit()


@contextmanager
def explained(engine: Engine) -> Iterator[list[str]]:
    """The plans of the queries that an engine executes."""
    plans: list[str] = []
    command = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "

    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        with closing(connection.connection.cursor()) as other:
            other.execute(command + statement, parameters)
            plans.append("\n".join(str(row) for row in other.fetchall()))

    event.listen(engine, "before_cursor_execute", explain)
    yield plans
    event.remove(engine, "before_cursor_execute", explain)


@pytest.mark.parametrize("limit", [None, 100])
def test_what_is_due_is_found_by_an_index(
    engine: Engine, session: Session, secrets: LucentSecrets, limit: int | None
) -> None:
    doublings = 10 if LONG else 2
    fill(engine, doublings)
    index = "ix_lucent_secret_states_expires_at"
    by_index = {
        "sqlite": rf"SEARCH lucent_secret_states USING INDEX {index} \(expires_at<\?\)",
        "postgresql": rf"{index}",
        "mysql": rf"'lucent_secret_states'.*'range'.*'{index}'",
    }[engine.dialect.name]
    with explained(engine) as plans:
        due = secrets.due(NOW + 3.5 * HOUR, limit=limit)
    assert len(due) == min(3 * 2**doublings, limit or 10**6)
    (plan,) = plans
    assert re.search(by_index, plan), plan
    assert not re.search(r"SCAN|Seq Scan|'ALL'", plan), plan
