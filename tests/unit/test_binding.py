"""Row-bound attributes: what is refused when a model is declared, mapped or filled."""

from __future__ import annotations

import enum
import pickle
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from sqlalchemy import (
    CHAR,
    Boolean,
    DateTime,
    Float,
    ForeignKey,
    Identity,
    Integer,
    Numeric,
    String,
    create_engine,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    configure_mappers,
    declared_attr,
    mapped_column,
)
from sqlalchemy.schema import FetchedValue

from sqlalchemy_lucent import (
    Bound,
    ConfigurationError,
    LucentError,
    PicklingRefusedError,
    bound_rows,
    row_bound,
)
from sqlalchemy_lucent._redacted import RedactedStr
from sqlalchemy_lucent._row import encode_row
from tests.frames import frames_of_ours, texts_in_frames


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant: Mapped[str] = mapped_column(String(20))
    credentials: Mapped[dict[str, Any]] = row_bound("id", "tenant")
    note: Mapped[str | None] = row_bound("id", nullable=True, name="sealed_note")


def test_attribute_reads_what_was_set_before_any_flush() -> None:
    account = Account(credentials={"k": 1}, tenant="a")
    assert account.credentials == {"k": 1}
    assert account.note is None


def test_column_is_not_null_unless_told() -> None:
    table = Account.__table__
    assert not table.c.credentials.nullable
    assert table.c.sealed_note.nullable


def test_class_attribute_is_the_column_under_its_own_name() -> None:
    statement = select(Account.credentials)
    assert str(statement) == "SELECT accounts.credentials \nFROM accounts"
    assert str(update(Account).values({Account.credentials: Bound({}, row=("a", "b"))})) == (
        "UPDATE accounts SET credentials=:credentials"
    )


def test_a_column_must_be_named() -> None:
    with pytest.raises(ConfigurationError, match="at least one column"):
        row_bound()


@pytest.mark.parametrize("how", ["declared_attr", "assigned"])
def test_declaration_outside_a_class_body_is_refused_when_it_is_used(how: str) -> None:
    class Own(DeclarativeBase):
        pass

    class Model(Own):
        __tablename__ = "models"
        id: Mapped[str] = mapped_column(primary_key=True)
        if how == "declared_attr":

            @declared_attr
            def secret(cls) -> Mapped[Any]:
                return row_bound("id")

    if how == "assigned":
        Model.secret = row_bound("id")  # type: ignore[method-assign, assignment]
    with pytest.raises(ConfigurationError, match="body of a class"):
        Model(id="a", secret={})


class Colour(enum.Enum):
    RED = "red"


def _mapping_of(column: Callable[[], Any]) -> None:
    class Own(DeclarativeBase):
        pass

    class Parent(Own):
        __tablename__ = "parents"
        id: Mapped[str] = mapped_column(primary_key=True)

    class Model(Own):
        __tablename__ = "models"
        key: Mapped[str] = mapped_column(primary_key=True)
        bound: Mapped[Any] = column()
        secret: Mapped[Any] = row_bound("bound")

    try:
        configure_mappers()
    finally:
        Own.registry.dispose()


@pytest.mark.parametrize(
    "column",
    [
        lambda: mapped_column(Integer, primary_key=True, autoincrement=True),
        lambda: mapped_column(Integer, Identity()),
        lambda: mapped_column(Integer, server_default=text("1")),
        lambda: mapped_column(Integer, FetchedValue()),
        lambda: mapped_column(String, default=func.now()),
    ],
)
def test_column_that_the_database_fills_is_refused_when_mapped(column: Callable[[], Any]) -> None:
    with pytest.raises(ConfigurationError, match="comes from the database"):
        _mapping_of(column)


@pytest.mark.parametrize(
    "column",
    [
        lambda: mapped_column(String, onupdate=lambda: "later"),
        lambda: mapped_column(String, server_onupdate=FetchedValue()),
    ],
)
def test_column_that_changes_with_each_update_is_refused_when_mapped(
    column: Callable[[], Any],
) -> None:
    with pytest.raises(ConfigurationError, match="changes with every UPDATE"):
        _mapping_of(column)


@pytest.mark.parametrize("action", [{"onupdate": "CASCADE"}, {"ondelete": "SET NULL"}])
def test_foreign_key_that_the_database_changes_is_refused_when_mapped(
    action: dict[str, Any],
) -> None:
    with pytest.raises(ConfigurationError, match="may change"):
        _mapping_of(lambda: mapped_column(ForeignKey("parents.id", **action)))


@pytest.mark.parametrize(
    "type_, name",
    [(Float(), "float"), (Numeric(), "Decimal"), (DateTime(), "datetime"), (Boolean(), "bool")],
)
def test_column_without_one_text_form_is_refused_when_mapped(type_: Any, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"of type {name}; bind to str, int or UUID"):
        _mapping_of(lambda: mapped_column(type_))


def test_column_that_does_not_exist_is_refused_when_mapped() -> None:
    class Own(DeclarativeBase):
        pass

    class Model(Own):
        __tablename__ = "models"
        id: Mapped[str] = mapped_column(primary_key=True)
        secret: Mapped[Any] = row_bound("nowhere")

    with pytest.raises(ConfigurationError, match="'nowhere', which its table does not have"):
        configure_mappers()
    Own.registry.dispose()


def test_version_counter_is_refused_when_mapped() -> None:
    class Own(DeclarativeBase):
        pass

    class Model(Own):
        __tablename__ = "models"
        id: Mapped[str] = mapped_column(primary_key=True)
        version: Mapped[int] = mapped_column()
        secret: Mapped[Any] = row_bound("version")
        __mapper_args__ = {"version_id_col": version}  # noqa: RUF012

    with pytest.raises(ConfigurationError, match="counts the versions"):
        configure_mappers()
    Own.registry.dispose()


@pytest.mark.parametrize(
    "part", [1.0, Decimal(1), datetime(2024, 1, 1, tzinfo=UTC), b"x", True, None, Colour.RED]
)
def test_row_context_refuses_what_has_no_exact_text(part: Any) -> None:
    with pytest.raises(ConfigurationError, match="binding column id"):
        encode_row([part], ["id"])


def test_row_context_is_made_of_the_text_itself_and_not_of_how_it_prints() -> None:
    class Name(str, enum.Enum):  # noqa: UP042  (a StrEnum prints its value)
        A = "a"

    class Number(int, enum.Enum):
        ONE = 1

    assert encode_row([Name.A]) == encode_row(["a"])
    assert encode_row([Number.ONE]) == encode_row([1])
    assert encode_row([RedactedStr("a")]) != encode_row([RedactedStr("b")])


def test_value_that_was_not_flushed_is_not_pickled() -> None:
    with pytest.raises(PicklingRefusedError):
        pickle.dumps(Account(credentials={"k": 1}))


def test_bound_rows_need_every_binding_column() -> None:
    with pytest.raises(ConfigurationError, match="binding column id has no value yet"):
        bound_rows(Account, [{"tenant": "a", "credentials": {}}])


def test_dataclass_takes_the_attribute_and_does_not_print_it() -> None:
    class Own(MappedAsDataclass, DeclarativeBase):
        pass

    class Model(Own):
        __tablename__ = "models"
        id: Mapped[str] = mapped_column(primary_key=True)
        secret: Mapped[dict[str, Any]] = row_bound("id")
        extra: Mapped[Any] = row_bound("id", nullable=True, default=None, kw_only=True)

    made = Model("a", {"token": "hunter2"})
    assert made.secret == {"token": "hunter2"}
    assert made.extra is None
    assert "hunter2" not in repr(made)
    with pytest.raises(TypeError, match="secret"):
        Model("a")


def test_plain_model_refuses_dataclass_options() -> None:
    class Own(DeclarativeBase):
        pass

    with pytest.raises(Exception, match="dataclass"):

        class Model(Own):
            __tablename__ = "models"
            id: Mapped[str] = mapped_column(primary_key=True)
            secret: Mapped[Any] = row_bound("id", init=False)


def test_fixed_width_text_counts_as_text() -> None:
    _mapping_of(lambda: mapped_column(CHAR(32)))


# -- frames ----------------------------------------------------------------------------------------

MARKER = "sk_live_51H8"


class Kept(Base):
    __tablename__ = "kept"

    id: Mapped[str] = mapped_column(String(9), primary_key=True)
    number: Mapped[int] = mapped_column()
    secret: Mapped[Any] = row_bound("id", "number")
    other: Mapped[Any] = row_bound("id", nullable=True)


KEPT: Any = Kept.__table__


def _flush(**values: Any) -> Callable[[Session], object]:
    def work(session: Session) -> None:
        session.add(Kept(**{"id": "a", "number": 1, "secret": MARKER, **values}))
        session.flush()

    return work


def _change(session: Session, **values: Any) -> None:
    session.add(Kept(id="a", number=1, secret={"n": 1}, other=MARKER))
    session.commit()
    kept = session.get_one(Kept, "a")
    assert kept.other == MARKER
    for name, value in values.items():
        setattr(kept, name, value)
    session.flush()


def _read(session: Session) -> None:
    session.add(Kept(id="a", number=1, secret={"n": 1}, other=MARKER))
    session.commit()
    session.execute(update(KEPT).values(number=2))
    kept = session.get_one(Kept, "a")
    assert kept.other == MARKER
    assert kept.secret


def _core(**values: Any) -> Callable[[Session], object]:
    given = {"id": "a", "number": 1, **values}
    return lambda session: session.execute(insert(KEPT), [given])


@pytest.mark.parametrize(
    "work",
    [
        _flush(number="1"),
        _flush(number=None),
        _flush(other=object()),
        _flush(other=[MARKER, object()]),
        partial(_change, id="b"),
        partial(_change, secret=object()),
        _read,
        _core(secret=MARKER),
        _core(secret=Bound(MARKER, row=("a",))),
        _core(secret=Bound(MARKER, row=("a", "1"))),
        _core(secret=Bound([MARKER, object()], row=("a", 1))),
        lambda _: bound_rows(Kept, [{"id": "a", "secret": MARKER}]),
    ],
)
def test_no_frame_of_ours_holds_a_value_that_is_refused(
    work: Callable[[Session], object],
) -> None:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session, pytest.raises(LucentError) as caught:
        work(session)
    assert list(frames_of_ours(caught.value))
    held = [name for name, text in texts_in_frames(caught.value) if MARKER.encode() in text]
    assert held == []
    assert MARKER not in str(caught.value)
    engine.dispose()


def test_row_bound_put_on_a_class_that_is_not_mapped_is_refused() -> None:
    class Plain:
        pass

    Plain.secret = row_bound("id")  # type: ignore[attr-defined]
    for use in (lambda: Plain().secret, lambda: setattr(Plain(), "secret", 1)):  # type: ignore[attr-defined]
        with pytest.raises(ConfigurationError, match="written in the body of a class"):
            use()
