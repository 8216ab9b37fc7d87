"""What pandas makes of opened values."""

from __future__ import annotations

import io
import json
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, Table, insert, select

from sqlalchemy_lucent import EncryptedJSON, SerializationError

MARKER = "sk_live_51H8"
VALUES: dict[str, Any] = {"dict": {"token": MARKER}, "list": [MARKER], "str": MARKER}

table = Table(
    "services", MetaData(), Column("id", Integer, primary_key=True), Column("d", EncryptedJSON)
)
lazy = Table("services", MetaData(), Column("id", Integer), Column("d", EncryptedJSON(lazy=True)))

pytestmark = pytest.mark.parametrize("url", ["sqlite"], indirect=True)
each_kind = pytest.mark.parametrize("kind", list(VALUES))


def frame(engine: Engine, kind: str, of: Table = table) -> pd.DataFrame:
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(table), {"id": 1, "d": VALUES[kind]})
        return pd.DataFrame([dict(row) for row in connection.execute(select(of)).mappings()])


@each_kind
def test_a_frame_prints_and_exports_what_it_holds(engine: Engine, kind: str) -> None:
    data = frame(engine, kind)
    assert data["d"][0] == VALUES[kind]
    for text in (repr(data), str(data["d"]), data.to_html(), data.to_json()):
        assert MARKER in text
    assert json.loads(data.to_json(orient="records")) == [{"id": 1, "d": VALUES[kind]}]


@each_kind
def test_csv_has_a_text_and_the_print_of_a_dict_or_list(engine: Engine, kind: str) -> None:
    text = frame(engine, kind).to_csv(index=False)
    assert (MARKER in text) is (kind == "str")
    assert (f"<redacted {kind}>" in text) is (kind != "str")


@each_kind
def test_a_lazy_column_shows_nothing(engine: Engine, kind: str) -> None:
    data = frame(engine, kind, lazy)
    for text in (repr(data), data.to_csv(), data.to_html()):
        assert MARKER not in text
        assert "key_version=v1" in text


@pytest.mark.parametrize("kind", ["dict", "list"])
def test_a_csv_that_is_read_back_is_not_stored(engine: Engine, kind: str) -> None:
    text = frame(engine, kind).to_csv(index=False)
    rows = pd.read_csv(io.StringIO(text)).to_dict("records")
    with engine.connect() as connection:
        with pytest.raises(SerializationError, match="printed in place"):
            connection.execute(table.update(), rows)
        assert connection.scalar(select(table.c.d)) == VALUES[kind]


@each_kind
def test_a_frame_is_read_and_stored_through_the_type(engine: Engine, kind: str) -> None:
    pytest.importorskip("sqlalchemy", "2.0.42", "the oldest that pandas takes")
    frame(engine, kind)
    with engine.connect() as connection:
        data = pd.read_sql(select(table), connection)
    with engine.begin() as connection:
        connection.execute(table.delete())
    data.to_sql("services", engine, if_exists="append", index=False, dtype={"d": table.c.d.type})
    with engine.connect() as connection:
        assert connection.scalar(select(table.c.d)) == VALUES[kind]
