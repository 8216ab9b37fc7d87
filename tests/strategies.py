"""Hypothesis strategies of the whole suite."""

from __future__ import annotations

import string
import unicodedata
from typing import Any

from hypothesis import strategies as st

MASTER_KEYS = st.binary(min_size=32, max_size=32)

KEY_VERSIONS = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=32)

TEXT = st.text(st.characters(codec="utf-8")).filter(
    lambda text: "redacted" not in text and "ealed" not in text
)
"""Unicode text, without the lone surrogates that are none. Nor has it what a redacted value prints,
which Hypothesis finds among the package's constants, and which is refused.
"""

INTEGERS = (
    st.integers()
    | st.sampled_from([0, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64 - 1, 2**64])
    | st.integers(-(10**60), 10**60)
    | st.sampled_from([-(10**4299) + 1, 10**4299 - 1])
)
"""Integers of any size that a document may hold."""

FLOATS = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(
    [-0.0, 5e-324, -5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 1e16, 1e22]
)

JSON_LEAVES = st.none() | st.booleans() | INTEGERS | FLOATS | TEXT


def _containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(children, max_size=6) | st.dictionaries(TEXT, children, max_size=6)


JSON_VALUES: st.SearchStrategy[Any] = st.recursive(JSON_LEAVES, _containers, max_leaves=20)
"""Every kind of value that a document may hold."""


def _is_key_part(text: str) -> bool:
    return 1 <= len(text) <= 128 and text == text.strip()


KEY_PARTS = (
    st.text(
        st.characters(exclude_categories=("Cc", "Cs"), exclude_characters=":"),
        min_size=1,
        max_size=128,
    )
    .map(lambda text: unicodedata.normalize("NFC", text))
    .filter(_is_key_part)
)
"""Valid parts of a secret key."""
