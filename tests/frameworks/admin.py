"""What the tests of the admin frameworks share: models of every kind, and a browser's forms."""

from __future__ import annotations

from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import pytest
from sqlalchemy import Engine, String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_lucent import (
    EncryptedJSON,
    LucentSecretMixin,
    Sealed,
    row_bound,
)

MARKER = "sk_live_51H8"


@dataclass
class Account:
    """A typed value."""

    token: str


class Base(DeclarativeBase):
    """The base of all models here."""


class Plain(Base):
    """A column without options."""

    __tablename__ = "plain"

    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str | None] = mapped_column(String(50))
    credentials: Mapped[Any] = mapped_column(EncryptedJSON)


class Unredacted(Base):
    """A column whose values print themselves."""

    __tablename__ = "unredacted"

    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str | None] = mapped_column(String(50))
    credentials: Mapped[Any] = mapped_column(EncryptedJSON(redact=False))


class Lazy(Base):
    """A column that opens nothing by itself."""

    __tablename__ = "lazy"

    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str | None] = mapped_column(String(50))
    credentials: Mapped[Any] = mapped_column(EncryptedJSON(lazy=True))


class Mutable(Base):
    """A column that tracks edits."""

    __tablename__ = "mutable"

    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str | None] = mapped_column(String(50))
    credentials: Mapped[Any] = mapped_column(EncryptedJSON.mutable())


class Typed(Base):
    """A column of typed values."""

    __tablename__ = "typed"

    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str | None] = mapped_column(String(50))
    credentials: Mapped[Any] = mapped_column(EncryptedJSON(schema=Account))


class RowBound(Base):
    """A row-bound attribute."""

    __tablename__ = "row_bound"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    note: Mapped[str | None] = mapped_column(String(50))
    credentials: Mapped[Any] = row_bound("id")


class Secret(LucentSecretMixin, Base):
    """The table of scoped secrets."""

    __tablename__ = "secrets"

    note: Mapped[str | None] = mapped_column(String(50))


MODELS: list[type[Any]] = [Plain, Lazy, Mutable, Typed, RowBound, Secret]

OPENED = (Plain, Mutable, RowBound, Secret)
"""Models whose attribute gives a value that is opened, and no type of its own."""

VALUES: dict[str, Any] = {
    "dict": {"token": MARKER, "scopes": ["read"]},
    "list": [MARKER, {"token": MARKER}],
    "str": MARKER,
}

CASES = [
    (model, kind) for model in MODELS for kind in (["typed"] if model is Typed else list(VALUES))
]
"""Each model with each kind of value that it may hold."""

each_case = pytest.mark.parametrize(
    "model, kind", CASES, ids=[f"{model.__name__}-{kind}" for model, kind in CASES]
)

REPLACED = [(Plain, "str"), (Mutable, "dict"), (Lazy, "list"), (RowBound, "str")]
"""What the forms of docs/admin-and-logs.md are tried with."""


PRINTED = [(Unredacted, {"token": MARKER}), (Plain, 51), (Plain, True)]
"""Values that print themselves, and that forms turn into text."""


def value_of(kind: str) -> Any:
    return Account(MARKER) if kind == "typed" else VALUES[kind]


def fill(engine: Engine, model: type[Any], kind: str) -> None:
    """Make the tables, and one row of `model`."""
    Base.metadata.create_all(engine)
    if model is Secret:
        key = {"scope": "tenant", "owner_id": "t1", "provider": "stripe", "name": "apiKey"}
        row = Secret(**key, payload=value_of(kind), note="before")
    else:
        row = model(id=1, credentials=value_of(kind), note="before")
    with Session(engine) as session:
        session.add(row)
        session.commit()


def stored(engine: Engine, model: type[Any]) -> tuple[Any, str | None]:
    """The credential and the note of the row."""
    with Session(engine) as session:
        row = session.query(model).one()
        value = row.payload if model is Secret else row.credentials
        return value.open() if isinstance(value, Sealed) else value, row.note


class Form(HTMLParser):
    """Reads the fields of a page's forms as a browser would send them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fields: dict[str, str] = {}
        self._area: str | None = None
        self._select: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        name = named.get("name")
        if tag == "input" and name and named.get("type") not in ("submit", "checkbox", "file"):
            self.fields[name] = (named.get("value") or "").replace("\n", "")
        elif tag == "textarea" and name:
            self._area = name
            self.fields[name] = ""
        elif tag == "select" and name:
            self._select = name
        elif tag == "option" and self._select and "selected" in named:
            self.fields[self._select] = named.get("value") or ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "textarea" and self._area:
            # A browser drops the line end behind the tag, and sends the others as CR LF.
            text = self.fields[self._area].replace("\r\n", "\n").removeprefix("\n")
            self.fields[self._area] = text.replace("\n", "\r\n")
            self._area = None
        elif tag == "select":
            self._select = None

    def handle_data(self, data: str) -> None:
        if self._area:
            self.fields[self._area] += data
