"""What Sentry's SDK sends of opened values, with its default options."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

VALUES = {
    "dict": {"token": "sk_live_dict", "deep": [{"token": "sk_live_dict"}], "sk_live_dict": 1},
    "list": ["sk_live_list", {"token": "sk_live_list"}],
    "str": "sk_live_str" + " and more" * 40,
}


@pytest.fixture(scope="module")
def events() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.frameworks.sentry_events"],
        check=True,
        capture_output=True,
        text=True,
        input=json.dumps(VALUES),
    )
    sent: dict[str, Any] = json.loads(done.stdout)
    return sent


@pytest.mark.parametrize("kind", list(VALUES))
@pytest.mark.parametrize("case", ["locals", "breadcrumbs"])
def test_no_event_shows_an_opened_value(events: dict[str, Any], case: str, kind: str) -> None:
    text = json.dumps(events[case])
    assert len(events[case]) == 6
    assert f"<redacted {kind}>" in text
    assert f"sk_live_{kind}" not in text


def test_the_events_have_local_variables(events: dict[str, Any]) -> None:
    frames = events["locals"][0]["exception"]["values"][0]["stacktrace"]["frames"]
    assert frames[-1]["vars"]["value"] == "<redacted dict>"
    assert frames[-1]["vars"]["inside"] == {"value": "<redacted dict>"}


def test_a_message_that_was_formatted_shows_a_text_and_no_dict_or_list(
    events: dict[str, Any],
) -> None:
    text = json.dumps(events["logged by %s"])
    assert [f"sk_live_{kind}" in text for kind in VALUES] == [False, False, True]
