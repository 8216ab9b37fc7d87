"""The table of actions in the docstring of ``events``, which auditors read."""

from __future__ import annotations

import re
from typing import get_args

from sqlalchemy_lucent import events


def test_the_table_has_a_row_for_each_action_and_nothing_else() -> None:
    assert events.__doc__ is not None
    _, _, body, _ = re.split(r"^=[= ]+$", events.__doc__, flags=re.MULTILINE)
    first_columns = [line[:14].strip() for line in body.splitlines()]
    assert [each.strip("`") for each in first_columns if each] == list(get_args(events.Action))
