"""How type checkers see sealed columns. `make lint` checks it, and nothing runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, MetaData, Table, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_lucent import EncryptedJSON, Sealed


@dataclass
class Account:
    email: str


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: EncryptedJSON()}  # noqa: RUF012


class Model(Base):
    __tablename__ = "models"
    id: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)
    tracked: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON.mutable(none_as_null=True))
    annotated: Mapped[dict[str, Any]]
    account: Mapped[Account] = mapped_column(EncryptedJSON(schema=Account))
    optional: Mapped[Account | None] = mapped_column(EncryptedJSON(True, schema=Account))
    lazy: Mapped[Sealed] = mapped_column(EncryptedJSON(lazy=True))


table = Table("t", MetaData(), Column("c", EncryptedJSON), Column("d", EncryptedJSON()))


def use(session: Session, model: Model) -> str:
    model.account = Account("a")
    found: Account = session.scalars(select(Model.account)).one()
    version: str | None = model.lazy.key_version
    if model.optional is not None:
        return model.optional.email
    return found.email + str(version) + model.account.email


def misuse(model: Model) -> None:
    model.account = {"email": "x"}  # type: ignore[assignment]
    print(model.account.missing)  # type: ignore[attr-defined]
