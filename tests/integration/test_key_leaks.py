"""What a leaked key sealed: a list whose lines close when their values are replaced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from sqlalchemy_lucent import (
    ConfigurationError,
    KeyRegistry,
    Keyring,
    LeakedValue,
    LeakReport,
    LucentBase,
    LucentSecrets,
    rotate,
)
from sqlalchemy_lucent.keys import _leaks
from tests.conftest import KEY_1, KEY_2, KEY_3
from tests.registries import (
    BOTH,
    V1,
    V2,
    create,
    documents,
    metadata,
    promoted,
    put,
    registry,
    rotated,
    under,
    using,
)


def store(engine: Engine, keyring: Keyring, id_: int, value: Any) -> None:
    with using(keyring), engine.begin() as connection:
        connection.execute(sa.update(documents).where(documents.c.id == id_).values(body=value))


def outcomes(report: LeakReport) -> dict[str, str | None]:
    return {value.primary_key[0]: value.outcome for value in report.values}


def test_the_values_under_the_key_are_listed(engine: Engine) -> None:
    create(engine)
    own = promoted(engine)
    put(engine, V2, 10)
    report = own.leaked("v1")
    assert outcomes(report) == {"1": None, "2": None, "3": None}
    value = report.open[0]
    assert (value.table, value.column, value.owner) == ("documents", "body", None)
    assert json.loads(json.dumps(report.as_dict()))["open"] == 3


def test_re_encryption_closes_no_line(engine: Engine) -> None:
    create(engine)
    own = promoted(engine)
    own.leaked("v1")
    assert rotate(engine, metadata, keyring=V2).ok
    assert len(own.leaked("v1").open) == 3
    store(engine, V2, 1, {"token": "MARKER-plaintext"})  # the same value again
    assert len(own.leaked("v1").open) == 3


def test_another_value_closes_its_line_for_good(engine: Engine) -> None:
    create(engine)
    own = promoted(engine)
    own.leaked("v1")
    store(engine, V2, 1, {"token": "another"})
    assert outcomes(own.leaked("v1")) == {"1": "replaced", "2": None, "3": None}
    store(engine, V2, 1, {"token": "MARKER-plaintext"})
    assert outcomes(own.leaked("v1"))["1"] == "replaced"


def test_another_value_under_the_leaked_key_is_as_exposed(engine: Engine) -> None:
    create(engine)
    own = promoted(engine)
    own.leaked("v1")
    store(engine, V1, 1, {"token": "another"})  # by a process that still has the old primary
    assert outcomes(own.leaked("v1"))["1"] is None
    rotate(engine, metadata, keyring=V2)
    assert outcomes(own.leaked("v1"))["1"] is None
    store(engine, V2, 1, {"token": "a third"})
    assert outcomes(own.leaked("v1"))["1"] == "replaced"
    store(engine, V1, 1, {"token": "a fourth"})
    assert outcomes(own.leaked("v1"))["1"] is None  # it is listed again


@pytest.mark.parametrize("by", ["deletion", "NULL"])
def test_a_value_that_is_gone_is_told_apart(engine: Engine, by: str) -> None:
    create(engine)
    own = promoted(engine)
    own.leaked("v1")
    with engine.begin() as connection:
        statement = sa.delete(documents) if by == "deletion" else sa.update(documents)
        if by == "NULL":
            statement = sa.update(documents).values(body=sa.null())
        connection.execute(statement.where(documents.c.id == 2))
    assert outcomes(own.leaked("v1")) == {"1": None, "2": "deleted", "3": None}


def test_the_order_of_members_makes_no_other_value(engine: Engine) -> None:
    create(engine, rows=0)
    put(engine, V1, 1, a=1, b=[2])
    own = promoted(engine)
    own.leaked("v1")
    store(engine, V2, 1, {"b": [2], "a": 1})
    assert outcomes(own.leaked("v1")) == {"1": None}


def test_a_value_in_the_place_of_another_is_another(engine: Engine) -> None:
    """HMACs are of a value in its place, so equal values cannot be told from the list."""
    create(engine)
    own = promoted(engine)
    own.leaked("v1")
    with engine.connect() as connection:
        leaks = KeyRegistry.metadata.tables["lucent_key_leaks"]
        macs = connection.execute(sa.select(leaks.c.mac)).scalars().all()
    assert len(set(macs)) == 3  # of three equal values


def test_values_that_left_the_key_before_are_counted_from_the_receipts(engine: Engine) -> None:
    create(engine)
    own = rotated(engine)
    report = own.leaked("v1")
    assert report.values == ()
    assert report.rotated_away == {"documents.body": 3}


def test_since_is_written_down_and_may_be_corrected(engine: Engine) -> None:
    create(engine)
    own = promoted(engine)
    began = own.leaked("v1").since
    assert own.leaked("v1").since == began
    earlier = datetime(2026, 1, 2, 3, 4, tzinfo=timezone(timedelta(hours=2)))
    assert own.leaked("v1", since=earlier).since == earlier
    key = next(key for key in own.registered() if key.version == "v1")
    assert key.leaked_since == earlier.astimezone(UTC)
    assert [r.details["since"] for r in own.receipts() if r.action == "leak"] == [
        began.isoformat(),
        earlier.astimezone(UTC).isoformat(),
    ]
    with pytest.raises(ConfigurationError, match="a datetime with a time zone"):
        own.leaked("v1", since=datetime(2026, 1, 2))  # noqa: DTZ001


def test_lines_outlive_the_key_that_made_their_hmacs(engine: Engine) -> None:
    create(engine)
    own = promoted(engine)  # v2 makes the first ones
    own.leaked("v1")
    three = registry(engine, V2.adding("v3", KEY_3))
    three.register()
    with three.announce("web"):
        three.promote("v3")
    assert rotate(engine, metadata, keyring=V2.adding("v3", KEY_3).with_primary("v3")).ok
    assert len(three.leaked("v1").open) == 3  # and makes them again by v3
    alone = registry(engine, Keyring({"v3": KEY_3}))
    store(engine, Keyring({"v3": KEY_3}), 1, {"token": "another"})
    assert outcomes(alone.leaked("v1")) == {"1": "replaced", "2": None, "3": None}


def test_without_the_key_of_a_line_it_stays_open(engine: Engine) -> None:
    create(engine)
    own = promoted(engine)
    own.leaked("v1")
    three = registry(engine, V2.adding("v3", KEY_3))
    three.register()
    with three.announce("web"):
        three.promote("v3")
    rotate(engine, metadata, keyring=V2.adding("v3", KEY_3).with_primary("v3"))
    store(engine, Keyring({"v3": KEY_3}), 1, {"token": "another"})
    alone = registry(engine, Keyring({"v3": KEY_3}))
    assert outcomes(alone.leaked("v1")) == {"1": None, "2": None, "3": None}
    assert outcomes(three.leaked("v1"))["1"] == "replaced"


def test_values_that_do_not_open_are_counted(engine: Engine) -> None:
    create(engine)
    own = promoted(engine)
    with engine.begin() as connection:
        # Copied from another row of another context: it is under v1, and does not open here.
        sealed = V1.for_context("others.body").seal(b"{}")
        raw = sa.table("documents", sa.column("id"), sa.column("body"))
        connection.execute(sa.update(raw).where(raw.c.id == 2).values(body=sealed))
    report = own.leaked("v1")
    assert report.unopened == 1
    assert outcomes(report) == {"1": None, "3": None}


def test_the_owner_of_a_scoped_secret_is_named(engine: Engine) -> None:
    KeyRegistry.metadata.create_all(engine)
    LucentBase.metadata.create_all(engine)
    own = KeyRegistry(engine, keyring=BOTH)
    with using(V1), Session(engine) as session:
        LucentSecrets(session).set("tenant:t1:google:key", {"token": "MARKER"})
        session.commit()
    own.register()
    assert own.leaked("v1").values[0] == LeakedValue(
        "lucent_secrets",
        "payload",
        ("tenant", "t1", "google", "key"),
        "t1",
        None,
        own.leaked("v1").values[0].noted_at,
    )


def test_many_values_are_noted_in_batches(engine: Engine) -> None:
    create(engine, rows=1203)
    own = promoted(engine)
    assert len(own.leaked("v1").open) == 1203
    assert len(own.leaked("v1").open) == 1203


def test_two_lists_at_once_note_each_value_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(engine)
    own = promoted(engine)
    read = _leaks._values

    def read_while_another_notes(*arguments: Any) -> Iterator[Any]:
        monkeypatch.setattr(_leaks, "_values", read)
        own.leaked("v1")
        return read(*arguments)

    monkeypatch.setattr(_leaks, "_values", read_while_another_notes)
    assert len(own.leaked("v1").open) == 3


def test_the_tables_and_reports_hold_no_value_and_no_key(engine: Engine) -> None:
    create(engine)
    own = promoted(engine)
    report = own.leaked("v1")
    assert under(engine, "v1") == 3
    with own.announce("web"):
        shown = [repr(report), json.dumps(report.as_dict()), repr(own), repr(own.registered())]
        with engine.connect() as connection:
            for table in KeyRegistry.metadata.sorted_tables:
                rows = connection.execute(sa.select(table)).all()
                assert rows
                for row in rows:
                    shown += [v.hex() if isinstance(v, bytes) else str(v) for v in row]
    for text in shown:
        assert "MARKER" not in text
        assert b"MARKER".hex() not in text
        for key in (KEY_1, KEY_2):
            assert key.hex() not in text
            assert repr(key)[2:-1] not in text
