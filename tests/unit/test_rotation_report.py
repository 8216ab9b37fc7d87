"""Reports: plain data, bounded, ready for JSON."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from decimal import Decimal
from typing import Any

import pytest

from sqlalchemy_lucent import FailedRow, RotationReport, VerifyReport
from sqlalchemy_lucent.rotation.report import MAX_FAILED, Failures


def failed(*key: Any) -> FailedRow:
    return FailedRow("t", "c", key, "TamperedError")


@pytest.mark.parametrize(
    "part, text",
    [
        (1, 1),
        ("a", "a"),
        (None, None),
        (2.5, 2.5),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (b"\x00\xff", "00ff"),
        (memoryview(b"\x01"), "01"),
        (Decimal("1.50"), "1.50"),
        (dt.date(2026, 1, 2), "2026-01-02"),
    ],
)
def test_a_primary_key_of_any_type_is_json_ready(part: Any, text: Any) -> None:
    report = VerifyReport(0, (failed(part, "second"),), 1)
    data = json.loads(json.dumps(report.as_dict()))
    assert data["failed"][0]["primary_key"] == [text, "second"]


def test_failures_are_named_up_to_a_bound_and_counted_beyond() -> None:
    failures, more = Failures(), Failures()
    failures.add(failed(n) for n in range(MAX_FAILED - 1))
    more.add(failed(-n) for n in range(1, 4))
    failures.merge(more)
    assert (len(failures.named), failures.count) == (MAX_FAILED, MAX_FAILED + 2)
    assert failures.named[-1] == failed(-1)


@pytest.mark.parametrize("remaining, ok", [(0, True), (1, False)])
def test_a_rotation_is_ok_when_nothing_remains(remaining: int, ok: bool) -> None:
    report = RotationReport("v2", 5, (), 0, remaining)
    assert report.ok is ok
    assert report.as_dict()["ok"] is ok


@pytest.mark.parametrize(
    "report, words",
    [
        (RotationReport("v2", 1, (), 0, 0), ["ok", "1 value", "v2"]),
        (RotationReport("v2", 5, (), 0, 3), ["not ok", "5 values", "3"]),
        (RotationReport("v2", 5, (failed("pk-7"),), 1, 1), ["not ok", "1 failed"]),
        (RotationReport("v2", 5, (), 0, 0, dry_run=True), ["dry run", "5 values"]),
        (VerifyReport(2, (), 0), ["ok", "2 values"]),
        (VerifyReport(2, (failed("pk-7"),), 1), ["not ok", "2 values", "1 did not open"]),
    ],
)
def test_a_report_says_its_result_first_and_no_primary_key(report: Any, words: list[str]) -> None:
    text = str(report)
    assert text.startswith(f"{words[0]}:")
    assert all(word in text for word in words)
    assert "pk-7" not in text
