"""Receipts prove what was done to keys: whatever is done to them is found, line by line."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from sqlalchemy_lucent import ConfigurationError, KeyReceipt, KeyRegistry, Keyring, ReceiptsReport
from tests.conftest import KEY_1, KEY_2
from tests.databases import everywhere
from tests.registries import BOTH, V1, V2, create, registry, rotated

LINES = KeyRegistry.metadata.tables["lucent_key_receipts"]


@pytest.fixture
def own(engine: Engine) -> KeyRegistry:
    """A registry with six receipts: register, register, ready, promote, fence, retire."""
    create(engine)
    own = rotated(engine)
    own.fence("v1")
    own.retire("v1")
    return own


def faults(report: ReceiptsReport) -> list[tuple[int, str]]:
    assert report.ok is not bool(report.faults)
    return [(fault.seq, fault.fault) for fault in report.faults]


def test_untouched_receipts_are_proven_and_end_in_the_head(own: KeyRegistry) -> None:
    report = own.verify_receipts()
    lines = own.receipts()
    assert report.ok
    assert report.lines == 6
    assert report.head == lines[-1].head
    assert own.verify_receipts(report.head).ok
    for line in lines:
        assert own.verify_receipts(line.head).ok


def test_a_receipt_says_what_was_done_when_and_by_whom(own: KeyRegistry) -> None:
    last = own.receipts()[-1]
    details = last.details
    assert (last.seq, last.action, last.version) == (6, "retire", "v1")
    assert details["at"] == last.at.isoformat(timespec="microseconds")
    assert details["key"] == "v2"
    assert details["counts"] == {"documents.body": {"v2": 3}}
    assert set(details["who"]) >= {"user", "host"}
    assert last.body == json.dumps(details, sort_keys=True, separators=(",", ":"))
    assert json.loads(json.dumps(last.as_dict()))["body"] == details


def change(**values: Any) -> Callable[[Connection, list[KeyReceipt]], None]:
    """Change the third line."""

    def tamper(connection: Connection, lines: list[KeyReceipt]) -> None:
        connection.execute(sa.update(LINES).where(LINES.c.seq == 3).values(values))

    return tamper


def change_body(**values: Any) -> Callable[[Connection, list[KeyReceipt]], None]:
    def tamper(connection: Connection, lines: list[KeyReceipt]) -> None:
        body = json.dumps({**lines[2].details, **values}, sort_keys=True, separators=(",", ":"))
        change(body=body)(connection, lines)

    return tamper


def remove(*numbers: int) -> Callable[[Connection, list[KeyReceipt]], None]:
    def tamper(connection: Connection, lines: list[KeyReceipt]) -> None:
        connection.execute(sa.delete(LINES).where(LINES.c.seq.in_(numbers)))

    return tamper


def exchange(connection: Connection, lines: list[KeyReceipt]) -> None:
    """Exchange the numbers of the second and third line."""
    for before, after in ((2, 99), (3, 2), (99, 3)):
        connection.execute(sa.update(LINES).where(LINES.c.seq == before).values(seq=after))


def remove_and_close_the_gap(connection: Connection, lines: list[KeyReceipt]) -> None:
    remove(3)(connection, lines)
    for before in (4, 5, 6):
        moved = sa.update(LINES).where(LINES.c.seq == before).values(seq=before - 1)
        connection.execute(moved)


def forge(connection: Connection, lines: list[KeyReceipt]) -> None:
    """Append a line by somebody who has no key."""
    body = json.dumps(
        {**lines[-1].details, "seq": 7, "previous": lines[-1].hash, "action": "unretire"},
        sort_keys=True,
        separators=(",", ":"),
    )
    connection.execute(
        sa.insert(LINES).values(
            seq=7, at=lines[-1].at, action="unretire", version="v1", body=body, mac=bytes(32)
        )
    )


def forge_under_an_unknown_key(connection: Connection, lines: list[KeyReceipt]) -> None:
    body = json.dumps({**lines[-1].details, "seq": 7, "previous": lines[-1].hash, "key": "v0"})
    connection.execute(
        sa.insert(LINES).values(
            seq=7, at=lines[-1].at, action="retire", version="v1", body=body, mac=bytes(32)
        )
    )


def repeat(connection: Connection, lines: list[KeyReceipt]) -> None:
    """Append a copy of the third line."""
    line = lines[2]
    connection.execute(
        sa.insert(LINES).values(
            seq=7,
            at=line.at,
            action=line.action,
            version=line.version,
            body=line.body,
            mac=bytes.fromhex(line.mac),
        )
    )


TAMPERED = [
    (change(action="fence"), [(3, "changed")]),
    (change(version="v1"), [(3, "changed")]),
    (change_body(held_by=["nobody"]), [(3, "changed")]),
    (change_body(key="v0"), [(3, "replaced")]),
    (change(body="no receipt"), [(3, "changed")]),
    (change(body="[]"), [(3, "changed")]),
    (change(mac=bytes(32)), [(3, "changed")]),
    (remove(3), [(3, "removed")]),
    (remove(1, 2), [(1, "removed"), (2, "removed")]),
    (exchange, [(2, "reordered"), (3, "reordered")]),
    (
        remove_and_close_the_gap,
        [(3, "reordered"), (3, "removed"), (4, "reordered"), (5, "reordered")],
    ),
    (forge, [(7, "changed")]),
    (forge_under_an_unknown_key, [(7, "unproven")]),
    (repeat, [(7, "reordered")]),
]
"""What is done to the six lines, and what is told of it."""


@everywhere("tamper, expected", TAMPERED, on_servers=[TAMPERED[3], TAMPERED[9], TAMPERED[-1]])
def test_each_line_that_was_tampered_with_is_named(
    engine: Engine,
    own: KeyRegistry,
    tamper: Callable[[Connection, list[KeyReceipt]], None],
    expected: list[tuple[int, str]],
) -> None:
    lines = list(own.receipts())
    with engine.begin() as connection:
        tamper(connection, lines)
    report = own.verify_receipts()
    assert faults(report) == expected
    for fault in report.faults:
        assert f"line {fault.seq}" in fault.reason
    assert json.loads(json.dumps(report.as_dict()))["ok"] is False


def test_the_time_of_a_line_is_signed(engine: Engine, own: KeyRegistry) -> None:
    with engine.begin() as connection:
        later = connection.scalar(sa.select(LINES.c.at).where(LINES.c.seq == 6))
        connection.execute(sa.update(LINES).where(LINES.c.seq == 3).values(at=later))
    assert faults(own.verify_receipts()) == [(3, "changed")]


def test_only_a_head_that_was_kept_shows_that_the_end_was_cut_off(
    engine: Engine, own: KeyRegistry
) -> None:
    head = own.verify_receipts().head
    with engine.begin() as connection:
        connection.execute(sa.delete(LINES).where(LINES.c.seq > 4))
    assert own.verify_receipts().ok
    assert faults(own.verify_receipts(head)) == [(5, "cut"), (6, "cut")]
    own.register()


def test_lines_written_after_a_cut_do_not_hide_it(engine: Engine, own: KeyRegistry) -> None:
    head = own.verify_receipts().head
    with engine.begin() as connection:
        connection.execute(sa.delete(LINES).where(LINES.c.seq > 5))
    own.unretire("v1")
    assert own.verify_receipts().ok
    assert faults(own.verify_receipts(head)) == [(6, "replaced")]


def test_lines_of_a_key_that_is_gone_are_proven_by_later_ones(
    engine: Engine, own: KeyRegistry
) -> None:
    alone = registry(engine, Keyring({"v2": KEY_2}))  # lines 1 to 4 were signed by v1
    assert alone.verify_receipts().ok
    with engine.begin() as connection:
        connection.execute(sa.update(LINES).where(LINES.c.seq == 2).values(mac=bytes(32)))
    assert faults(alone.verify_receipts()) == [(1, "unproven"), (2, "replaced")]
    with engine.begin() as connection:
        connection.execute(sa.delete(LINES).where(LINES.c.seq > 2))
    assert faults(alone.verify_receipts()) == [(1, "unproven"), (2, "unproven")]


def test_another_key_of_the_name_proves_nothing(engine: Engine, own: KeyRegistry) -> None:
    wrong = registry(engine, Keyring({"v1": KEY_2, "v2": KEY_1}, primary="v1"))
    assert [fault for _, fault in faults(wrong.verify_receipts())] == ["changed"] * 6


@everywhere("head", ["", "6", "six:" + "0" * 64, "6:00", "-1:" + "0" * 64], on_servers=["6:00"])
def test_a_head_that_is_none_is_refused(engine: Engine, head: str) -> None:
    create(engine, rows=0)
    own = registry(engine, V1)
    own.register()
    with pytest.raises(ConfigurationError, match="the head of a receipt"):
        own.verify_receipts(head)


def test_without_receipts_there_is_no_head(engine: Engine) -> None:
    create(engine, rows=0)
    report = registry(engine, V1).verify_receipts()
    assert report == ReceiptsReport(0, None, ())


def test_processes_that_take_steps_at_once_leave_one_chain(engine: Engine) -> None:
    create(engine)
    registry(engine, V1).register()
    keyrings = [V1.adding(f"k{n}", bytes([n + 1]) * 32) for n in range(6)]
    failed: list[BaseException] = []

    def register(keyring: Keyring) -> None:
        try:
            registry(engine, keyring).register()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=register, args=[keyring]) for keyring in keyrings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    own = registry(engine, BOTH)
    assert own.verify_receipts().ok
    assert sorted(receipt.seq for receipt in own.receipts()) == list(range(1, 8))
    assert len({receipt.version for receipt in own.receipts()}) == 7


def test_no_receipt_shows_a_key_or_value(own: KeyRegistry) -> None:
    assert V2.primary == "v2"
    for receipt in own.receipts():
        text = receipt.body + repr(receipt) + json.dumps(receipt.as_dict())
        assert "MARKER-plaintext" not in text
        for key in (KEY_1, KEY_2):
            assert key.hex() not in text
            assert not re.search(re.escape(repr(key)[2:-1]), text)
