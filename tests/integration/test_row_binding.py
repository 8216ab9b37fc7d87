"""Row-bound attributes of users' models, through the ORM, on every database."""

from __future__ import annotations

import itertools
import pickle
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import sqlalchemy
from sqlalchemy import Engine, ForeignKey, LargeBinary, String, event, insert, select, text, update
from sqlalchemy import type_coerce as coerce
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    aliased,
    column_property,
    defer,
    load_only,
    make_transient,
    mapped_column,
    relationship,
    synonym,
    undefer,
    validates,
)
from sqlalchemy.orm.attributes import flag_modified, get_attribute

from sqlalchemy_lucent import (
    Bound,
    ConfigurationError,
    EncryptedJSON,
    Keyring,
    Sealed,
    SerializationError,
    TamperedError,
    UnsupportedOperationError,
    bound_rows,
    row_bound,
    set_default_keyring,
)

AT_LEAST_2_1 = tuple(map(int, sqlalchemy.__version__.split(".")[:2])) >= (2, 1)


class Base(DeclarativeBase):
    type_annotation_map: ClassVar = {str: String(50)}


class Tenant(Base):
    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(primary_key=True)
    integrations: Mapped[list[Integration]] = relationship(back_populates="tenant")


class Integration(Base):
    __tablename__ = "integrations"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    region: Mapped[str] = mapped_column(default="eu")
    credentials: Mapped[dict[str, Any]] = row_bound("id", "tenant_id", "region")
    backup: Mapped[dict[str, Any] | None] = row_bound(
        "id", "tenant_id", "region", nullable=True, none_as_null=True
    )
    tenant: Mapped[Tenant] = relationship(back_populates="integrations")


class HasSecret:
    """A mixin, over a natural key of two parts."""

    owner: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    secret: Mapped[Any] = row_bound("owner", "number", deferred=True)


class Left(HasSecret, Base):
    __tablename__ = "lefts"


class Right(HasSecret, Base):
    __tablename__ = "rights"


class AbstractVault(Base):
    __abstract__ = True

    id: Mapped[str] = mapped_column(primary_key=True)
    note: Mapped[str | None]
    secret: Mapped[Any] = row_bound("id")


class Vault(AbstractVault):
    __tablename__ = "vaults"


class Account(Base):
    __tablename__ = "accounts"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    kind: Mapped[str] = mapped_column()
    secret: Mapped[Any] = row_bound("id", "kind")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "plain"}  # noqa: RUF012


class SingleAccount(Account):
    __mapper_args__ = {"polymorphic_identity": "single"}  # noqa: RUF012

    extra: Mapped[Any] = row_bound("id", nullable=True)


class JoinedAccount(Account):
    __tablename__ = "joined_accounts"
    __mapper_args__ = {"polymorphic_identity": "joined"}  # noqa: RUF012

    id: Mapped[uuid.UUID] = mapped_column(ForeignKey("accounts.id"), primary_key=True)
    own: Mapped[Any] = row_bound("id")


class DataclassBase(MappedAsDataclass, DeclarativeBase):
    type_annotation_map: ClassVar = {str: String(50)}


class Device(DataclassBase):
    __tablename__ = "devices"

    name: Mapped[str] = mapped_column(primary_key=True)
    secret: Mapped[dict[str, Any]] = row_bound("name")
    spare: Mapped[Any] = row_bound("name", nullable=True, default=None, kw_only=True)
    colour: Mapped[str] = mapped_column(default="grey", kw_only=True)


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    Base.metadata.create_all(engine)
    DataclassBase.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([Tenant(id="a"), Tenant(id="b")])
        session.commit()
        yield session


def stored(session: Session, attribute: Any) -> list[bytes]:
    """The bytes of a column as the database holds them, in no order."""
    return [bytes(value) for value in session.scalars(select(coerce(attribute, LargeBinary())))]


# -- writing and reading ---------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(["id", "tenant_id", "credentials"])))
def test_constructor_arguments_come_in_any_order(session: Session, order: tuple[str, ...]) -> None:
    values = {"id": uuid.uuid4(), "tenant_id": "a", "credentials": {"token": "t"}}
    session.add(Integration(**{name: values[name] for name in order}))
    session.commit()
    assert session.scalars(select(Integration)).one().credentials == {"token": "t"}


def test_value_is_sealed_for_what_the_flush_puts_into_the_binding_columns(
    session: Session,
) -> None:
    # id by a default in Python, region by a scalar default, tenant_id by the relationship.
    tenant = Tenant(id="c", integrations=[Integration(credentials={"n": n}) for n in range(3)])
    session.add(tenant)
    session.commit()
    found = session.scalars(select(Integration)).all()
    assert sorted(each.credentials["n"] for each in found) == [0, 1, 2]
    assert {each.tenant_id for each in found} == {"c"}


def test_nothing_readable_is_stored(session: Session) -> None:
    session.add_all([Vault(id="x", secret={"token": "hunter2"}), Vault(id="y", secret="hunter2")])
    session.commit()
    for value in stored(session, Vault.secret):
        assert value.startswith(b"v1:")
        assert b"hunter2" not in value


@pytest.mark.parametrize("value", [{"a": [1, None, "é"]}, [], "text", 0, False, 1.5, None])
def test_any_json_value_comes_back(session: Session, value: Any) -> None:
    session.add(Vault(id="x", secret=value))
    session.commit()
    found = session.scalars(select(Vault)).one()
    assert found.secret == value
    assert type(found.secret) is type(value) or isinstance(value, (dict, list, str))


def test_value_that_is_no_json_leaves_nothing(session: Session) -> None:
    session.add_all([Vault(id="x", secret=1), Vault(id="y", secret=object())])
    with pytest.raises(SerializationError):
        session.flush()
    session.rollback()
    assert session.scalars(select(Vault)).all() == []


def test_null_is_a_value_or_sql_null_as_declared(session: Session) -> None:
    session.add(Integration(tenant_id="a", credentials={}, backup=None))
    session.add(Integration(tenant_id="b", credentials={}))
    session.commit()
    assert session.scalars(select(Integration.backup)).all() == [None, None]
    assert len(session.scalars(select(Integration).where(Integration.backup.is_(None))).all()) == 2
    session.add(Vault(id="x", secret=None))
    session.commit()
    assert session.scalars(select(Vault).where(Vault.secret.is_not(None))).one().secret is None


def test_value_is_required_unless_nullable(session: Session) -> None:
    session.add(Vault(id="x"))
    with pytest.raises(DBAPIError):
        session.flush()


@pytest.mark.parametrize("expire_on_commit", [True, False])
def test_a_row_moves_freely_where_nothing_is_sealed(engine: Engine, expire_on_commit: bool) -> None:
    Base.metadata.create_all(engine)
    with Session(engine, expire_on_commit=expire_on_commit) as session:
        session.add_all([Tenant(id=name) for name in "abc"])
        integration = Integration(tenant_id="a", credentials={"n": 1})
        session.add(integration)
        session.flush()
        integration.tenant_id = "b"
        integration.credentials = {"n": 2}
        session.commit()
        assert integration.credentials == {"n": 2}
        integration.tenant_id = "c"
        session.commit()
        assert integration.backup is None
        assert session.scalars(select(Integration.backup)).all() == [None]


def test_a_listener_of_the_model_cannot_move_a_row_beneath_its_value(session: Session) -> None:
    vault = Vault(id="x", secret={"n": 1})
    session.add(vault)
    session.commit()

    def move(mapper: Any, connection: Any, target: Vault) -> None:
        target.id = "y"

    event.listen(Vault, "before_update", move)
    try:
        vault.note = "changed"
        with pytest.raises(UnsupportedOperationError, match="the flush changed id of that row"):
            session.commit()
    finally:
        event.remove(Vault, "before_update", move)
    session.rollback()
    assert session.scalars(select(Vault)).one().secret == {"n": 1}


def test_value_survives_refresh_and_expire(session: Session) -> None:
    vault = Vault(id="x", secret={"n": 1})
    session.add(vault)
    session.flush()
    session.refresh(vault)
    assert vault.secret == {"n": 1}
    vault.secret = {"n": 2}
    session.refresh(vault)
    assert vault.secret == {"n": 1}
    vault.secret = {"n": 3}
    session.refresh(vault, ["secret"])
    assert vault.secret == {"n": 1}
    vault.secret = {"n": 3}
    session.expire(vault)
    assert vault.secret == {"n": 1}


def test_object_gives_its_value_after_commit_without_expiry(engine: Engine) -> None:
    Base.metadata.create_all(engine)
    with Session(engine, expire_on_commit=False) as session:
        vault = Vault(id="x", secret={"n": 1})
        session.add(vault)
        session.commit()
        vault.id = "y"
        session.commit()
    assert vault.secret == {"n": 1}
    with Session(engine) as session:
        assert session.get_one(Vault, "y").secret == {"n": 1}


def test_deferred_value_is_loaded_when_read(session: Session) -> None:
    session.add(Left(owner="a", number=1, secret="s"))
    session.commit()
    assert session.scalars(select(Left)).one().secret == "s"


def test_update_seals_the_new_value_only(session: Session) -> None:
    session.add(Integration(tenant_id="a", credentials={"n": 1}, backup={"n": 1}))
    session.commit()
    found = session.scalars(select(Integration)).one()
    kept = stored(session, Integration.backup)
    found.credentials = {"n": 2}
    session.commit()
    assert stored(session, Integration.backup) == kept
    assert (found.credentials, found.backup) == ({"n": 2}, {"n": 1})


def test_flush_of_another_attribute_does_not_touch_the_value(session: Session) -> None:
    session.add(SingleAccount(secret="s", extra="e"))
    session.commit()
    before = stored(session, Account.secret)
    session.scalars(select(SingleAccount)).one().extra = "f"
    session.commit()
    assert stored(session, Account.secret) == before


# -- all that takes a mapped attribute -------------------------------------------------------------


@pytest.fixture
def vault(session: Session) -> Vault:
    """A loaded object whose value somebody else has changed in the database."""
    vault = Vault(id="x", note="of x", secret={"n": 1})
    session.add(vault)
    session.commit()
    assert (vault.note, vault.secret) == ("of x", {"n": 1})
    session.execute(
        update(Vault)
        .values(secret=Bound({"n": 2}, row=("x",)))
        .execution_options(synchronize_session=False)
    )
    assert vault.secret == {"n": 1}
    return vault


@pytest.mark.parametrize(
    "renew",
    [
        lambda s, v: s.refresh(v, ["secret"]),
        lambda s, v: s.refresh(v, ["secret"], with_for_update=True),
        lambda s, v: s.refresh(v, attribute_names=["id", "secret"]),
        lambda s, v: s.expire(v, ["secret"]),
        lambda s, v: s.scalars(
            select(Vault).options(load_only(Vault.secret)),
            execution_options={"populate_existing": True},
        ).one(),
        lambda s, v: s.get_one(Vault, "x", options=[undefer(Vault.secret)], populate_existing=True),
    ],
)
def test_value_is_loaded_again_by_its_name(
    session: Session, vault: Vault, renew: Callable[[Session, Vault], Any]
) -> None:
    renew(session, vault)
    assert vault.secret == {"n": 2}


@pytest.mark.parametrize("option", [lambda: defer(Vault.secret), lambda: load_only(Vault.note)])
def test_loader_options_defer_the_value(
    session: Session, vault: Vault, option: Callable[[], Any]
) -> None:
    session.expunge_all()
    loaded = session.scalars(select(Vault).options(option())).one()
    assert "secret" in sqlalchemy.inspect(loaded).unloaded
    assert loaded.secret == {"n": 2}


def test_value_that_must_not_be_loaded_is_not(session: Session, vault: Vault) -> None:
    session.expunge_all()
    loaded = session.scalars(select(Vault).options(defer(Vault.secret, raiseload=True))).one()
    with pytest.raises(sqlalchemy.exc.InvalidRequestError, match="raiseload"):
        assert loaded.secret


def test_a_lost_value_is_set_through_an_object_that_never_loaded_it(
    session: Session, vault: Vault
) -> None:
    vault.note = "kept"
    session.flush()
    lost = stored(session, Vault.secret)[0][:-1]
    session.execute(update(Vault).values(secret=coerce(lost, LargeBinary())))
    session.commit()
    session.expunge_all()
    with pytest.raises(TamperedError, match=r"primary key \('x',\)"):
        assert session.get_one(Vault, "x").secret
    session.expunge_all()
    found = session.get_one(Vault, "x", options=[defer(Vault.secret)])
    found.secret = {"n": 3}
    session.commit()
    assert (found.note, found.secret) == ("kept", {"n": 3})


def test_attribute_is_inspected_and_flagged_by_its_name(session: Session, vault: Vault) -> None:
    session.refresh(vault)
    before = stored(session, Vault.secret)
    attribute = sqlalchemy.inspect(vault).attrs["secret"]
    assert attribute.value == {"n": 2}
    assert not attribute.history.has_changes()
    flag_modified(vault, "secret")
    assert sqlalchemy.inspect(vault).modified
    session.commit()
    assert vault.secret == {"n": 2}
    assert stored(session, Vault.secret) != before
    session.refresh(vault)
    flag_modified(vault, "secret")
    session.commit()  # was not opened, and is written as it is
    assert vault.secret == {"n": 2}


def test_attribute_is_filtered_by_and_selected_with_others(session: Session, vault: Vault) -> None:
    query = session.query(Vault)
    assert query.filter_by(secret=None).all() == []
    with pytest.raises(UnsupportedOperationError):
        query.filter_by(secret={"n": 2})
    row = session.execute(select(Vault.id, Vault.secret, Vault.secret.key_version)).one()
    assert row.secret.open(row=[row.id]) == {"n": 2}
    assert row[2] == "v1"


def test_deleted_attribute_is_sql_null(session: Session) -> None:
    found = Integration(tenant_id="a", credentials={}, backup={"n": 1})
    session.add(found)
    session.commit()
    del found.backup
    session.commit()
    assert session.scalars(select(Integration.backup)).all() == [None]
    del found.credentials
    with pytest.raises(DBAPIError):
        session.flush()


def test_validators_synonyms_and_column_properties_see_plain_values(engine: Engine) -> None:
    class Own(DeclarativeBase):
        pass

    class Model(Own):
        __tablename__ = "models"

        id: Mapped[str] = mapped_column(String(9), primary_key=True)
        secret: Mapped[Any] = row_bound("id")
        other_name: Mapped[Any] = synonym("secret")

        @validates("secret")
        def check(self, name: str, value: Any) -> Any:
            seen.append(value)
            return {**value, "checked": True}

    seen: list[Any] = []
    Model.version = column_property(Model.secret.key_version)
    Own.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Model(id="x", other_name={"n": 1}))
        session.commit()
        found = session.scalars(select(Model)).one()
        assert seen == [{"n": 1}]
        assert found.secret == found.other_name == {"n": 1, "checked": True}
        assert found.version == "v1"  # type: ignore[attr-defined]
    Own.registry.dispose()


def test_columns_that_are_bound_without_row_bound_behave_alike(engine: Engine) -> None:
    class Own(DeclarativeBase):
        pass

    class Declared(Own):
        __tablename__ = "declared"

        id: Mapped[str] = mapped_column(String(9), primary_key=True)
        secret: Mapped[Any] = mapped_column(EncryptedJSON(bound_to=["id"]))

    class Imperative:
        def __init__(self, **values: Any) -> None:
            vars(self)  # before any value is set
            for name, value in values.items():
                setattr(self, name, value)

    table = sqlalchemy.Table(
        "imperative",
        Own.metadata,
        sqlalchemy.Column("id", String(9), primary_key=True),
        sqlalchemy.Column("secret", EncryptedJSON(bound_to=["id"])),
    )
    Own.registry.map_imperatively(Imperative, table)
    Own.metadata.create_all(engine)
    with Session(engine) as session:
        for model in (Declared, Imperative):
            session.add(model(id="x", secret={"n": 1}))
            session.commit()
            found: Any = session.scalars(select(model)).one()
            assert found.secret == {"n": 1}
            found.id = "y"
            session.commit()
            assert found.secret == {"n": 1}
    Own.registry.dispose()


def test_class_mapped_to_a_subquery_gives_sealed_values(session: Session, vault: Vault) -> None:
    class Own(DeclarativeBase):
        pass

    class View(Own):
        __table__ = select(Vault.id, Vault.secret).subquery()
        __mapper_args__ = {"primary_key": [__table__.c.id]}  # noqa: RUF012

    view: Any = session.scalars(select(View)).one()
    assert view.secret.open(row=("x",)) == {"n": 2}
    Own.registry.dispose()


# -- sealed values that are set --------------------------------------------------------------------


def test_sealed_value_of_the_same_row_is_stored_as_it_is(session: Session, vault: Vault) -> None:
    sealed = session.scalars(select(Vault.secret)).one()
    before = stored(session, Vault.secret)
    vault.secret = sealed
    session.commit()
    assert vault.secret == {"n": 2}
    statement = update(Vault).values(secret=Bound(sealed, row=("x",)))
    session.execute(statement)
    session.commit()
    assert vault.secret == {"n": 2}
    assert stored(session, Vault.secret) == before


def test_sealed_value_of_another_row_is_refused(session: Session, vault: Vault) -> None:
    sealed = session.scalars(select(Vault.secret)).one()
    other = Vault(id="y", secret=sealed)
    session.add(other)
    with pytest.raises(UnsupportedOperationError, match="sealed for its row"):
        session.flush()
    session.rollback()
    session.add(Vault(id="y", secret={"n": 3}))
    session.commit()
    session.get_one(Vault, "y").secret = session.scalars(
        select(Vault.secret).where(Vault.id == "x")
    ).one()
    with pytest.raises(UnsupportedOperationError, match="another row"):
        session.flush()
    session.rollback()
    table = Vault.metadata.tables["vaults"]
    for value in (sealed, Bound(sealed, row=("y",))):
        with pytest.raises((SerializationError, ConfigurationError)):
            session.execute(table.update().values(secret=value))
        with pytest.raises((SerializationError, ConfigurationError)):
            session.execute(insert(Vault), [{"id": "z", "secret": value}])
    assert session.get_one(Vault, "y").secret == {"n": 3}


# -- merge, detached objects, pickles --------------------------------------------------------------


def test_merge_of_a_new_object_stores_it(session: Session) -> None:
    session.merge(Vault(id="x", secret={"n": 1}))
    session.commit()
    assert session.get_one(Vault, "x").secret == {"n": 1}


def test_merge_over_a_stored_object_replaces_its_value(session: Session) -> None:
    session.add(Vault(id="x", secret={"n": 1}))
    session.commit()
    merged = session.merge(Vault(id="x", secret={"n": 2}))
    assert merged.secret == {"n": 2}
    session.commit()
    assert session.get_one(Vault, "x").secret == {"n": 2}


@pytest.mark.parametrize("load", [True, False])
def test_merge_of_a_detached_object_changes_nothing(engine: Engine, load: bool) -> None:
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Vault(id="x", secret={"n": 1}))
        session.commit()
        detached = session.get_one(Vault, "x")
    with Session(engine) as session:
        before = stored(session, Vault.secret)
        merged = session.merge(detached, load=load)
        session.commit()
        assert merged.secret == {"n": 1}
        assert stored(session, Vault.secret) == before


@pytest.mark.parametrize("opened", [True, False])
def test_loaded_object_inserted_as_another_row_is_sealed_anew_or_refused(
    session: Session, opened: bool
) -> None:
    session.add(Vault(id="x", secret={"n": 1}))
    session.commit()
    vault = session.get_one(Vault, "x")
    if opened:
        assert vault.secret == {"n": 1}
    else:
        session.refresh(vault)
    make_transient(vault)
    vault.id = "y"
    session.add(vault)
    if opened:
        session.commit()
        assert session.get_one(Vault, "y").secret == {"n": 1}
    else:
        with pytest.raises(UnsupportedOperationError, match="read the attribute 'secret' before"):
            session.flush()
        session.rollback()
    assert session.get_one(Vault, "x").secret == {"n": 1}


def test_loaded_object_inserted_again_as_the_same_row_opens(session: Session) -> None:
    session.add(Vault(id="x", secret={"n": 1}))
    session.commit()
    vault = session.get_one(Vault, "x")
    session.refresh(vault)
    session.delete(vault)
    session.flush()
    make_transient(vault)
    session.add(vault)
    session.commit()
    assert session.get_one(Vault, "x").secret == {"n": 1}


def test_pickle_of_an_opened_object_holds_no_plaintext_and_opens_again(session: Session) -> None:
    session.add(Vault(id="x", secret={"token": "hunter2"}))
    session.commit()
    vault = session.get_one(Vault, "x")
    assert vault.secret == {"token": "hunter2"}
    pickled = pickle.dumps(vault)
    assert b"hunter2" not in pickled
    assert pickle.loads(pickled).secret == {"token": "hunter2"}


# -- copied bytes ----------------------------------------------------------------------------------


def test_bytes_copied_to_another_row_column_or_table_do_not_open(session: Session) -> None:
    for model in (Left, Right):
        session.add_all(
            [
                model(owner="a", number=1, secret=f"{model.__name__} a1"),
                model(owner="a", number=11, secret=f"{model.__name__} a11"),
                model(owner="a1", number=1, secret=f"{model.__name__} a11 too"),
            ]
        )
    session.add_all(
        [
            Integration(tenant_id="a", credentials={"n": 1}, backup={"n": 2}),
            Integration(tenant_id="b", credentials={"n": 3}, backup={"n": 4}),
        ]
    )
    session.commit()
    places: list[tuple[Any, Any, str]] = [
        (model, inspected, name)
        for model, names in (
            (Left, ["secret"]),
            (Right, ["secret"]),
            (Integration, ["credentials", "backup"]),
        )
        for inspected in session.scalars(select(model))
        for name in names
    ]
    assert len(places) == 10
    sealed = [bytes(get_attribute(row, name)) for _, row, name in places]
    for (index, source), (other, place) in itertools.product(enumerate(sealed), enumerate(places)):
        model, row, name = place
        table = model.__table__
        condition = [c == getattr(row, c.key) for c in table.primary_key]
        raw = update(table).where(*condition)
        session.execute(raw.values({name: coerce(source, LargeBinary())}))
        session.refresh(row)
        if index == other:
            assert getattr(row, name) is not None
        else:
            with pytest.raises(TamperedError):
                getattr(row, name)
        session.execute(raw.values({name: coerce(sealed[other], LargeBinary())}))
    session.rollback()


INTEGRATIONS: Any = Integration.__table__


@pytest.mark.parametrize(
    "change",
    [
        lambda session, row: session.execute(text("UPDATE integrations SET tenant_id = 'b'")),
        lambda session, row: session.execute(update(Integration).values(tenant_id="b")),
        lambda session, row: session.execute(update(INTEGRATIONS).values(tenant_id="b")),
        lambda session, row: session.bulk_update_mappings(
            Integration, [{"id": row, "tenant_id": "b"}]
        ),
    ],
    ids=["text", "orm-update", "core-update", "bulk-mappings"],
)
def test_column_changed_by_a_statement_makes_the_value_unreadable(
    session: Session, change: Callable[[Session, uuid.UUID], object]
) -> None:
    integration = Integration(tenant_id="a", credentials={"n": 1})
    session.add(integration)
    session.commit()
    change(session, integration.id)
    session.commit()
    with pytest.raises(TamperedError):
        assert session.scalars(select(Integration)).one().credentials


# -- changing a binding column ---------------------------------------------------------------------


@pytest.mark.parametrize("column", ["id", "tenant_id"])
@pytest.mark.parametrize("how", ["opened", "set", "opened after the change"])
def test_moved_row_is_sealed_anew_in_the_same_flush(
    session: Session, column: str, how: str
) -> None:
    session.add(Integration(tenant_id="a", credentials={"n": 1}, backup=None))
    session.commit()
    found = session.scalars(select(Integration)).one()
    session.refresh(found)
    if how == "opened":
        assert found.credentials == {"n": 1}
    setattr(found, column, uuid.uuid4() if column == "id" else "b")
    if how == "set":
        found.credentials = {"n": 2}
    elif how == "opened after the change":
        assert found.credentials == {"n": 1}
    session.commit()
    session.expunge_all()
    found = session.scalars(select(Integration)).one()
    assert found.credentials == {"n": 2 if how == "set" else 1}
    assert found.backup is None


@pytest.mark.parametrize("state", ["loaded", "expired"])
def test_moved_row_with_a_sealed_value_is_refused(session: Session, state: str) -> None:
    session.add(Integration(tenant_id="a", credentials={"n": 1}))
    session.commit()
    found = session.scalars(select(Integration)).one()
    if state == "expired":
        session.expire(found)
    found.tenant_id = "b"
    with pytest.raises(UnsupportedOperationError, match="the flush would change tenant_id"):
        session.flush()
    session.rollback()
    assert (found.tenant_id, found.credentials) == ("a", {"n": 1})


def test_expired_value_opens_with_the_old_row_after_a_binding_column_was_set(
    session: Session,
) -> None:
    session.add(Integration(tenant_id="a", credentials={"n": 1}))
    session.commit()
    found = session.scalars(select(Integration)).one()
    session.expire(found)
    found.tenant_id = "b"
    assert found.credentials == {"n": 1}
    session.commit()
    assert (found.tenant_id, found.credentials) == ("b", {"n": 1})


def test_moved_row_keeps_its_sql_null(session: Session) -> None:
    session.add(SingleAccount(secret="s"))
    session.commit()
    found = session.scalars(select(SingleAccount)).one()
    assert (found.secret, found.extra) == ("s", None)
    found.id = uuid.uuid4()
    session.commit()
    assert (found.secret, found.extra) == ("s", None)


def test_moving_through_the_relationship_seals_anew(session: Session) -> None:
    session.add(Integration(tenant_id="a", credentials={"n": 1}, backup=None))
    session.commit()
    found = session.scalars(select(Integration)).one()
    assert (found.credentials, found.backup) == ({"n": 1}, None)
    found.tenant = session.get_one(Tenant, "b")
    session.commit()
    session.expunge_all()
    found = session.scalars(select(Integration)).one()
    assert (found.tenant_id, found.credentials) == ("b", {"n": 1})


@pytest.mark.parametrize("nested", [True, False])
def test_rollback_leaves_each_value_in_its_row(session: Session, nested: bool) -> None:
    session.add_all([Vault(id="x", secret="of x"), Vault(id="y", secret="of y")])
    session.commit()
    x, y = session.get_one(Vault, "x"), session.get_one(Vault, "y")
    session.connection()
    transaction = session.begin_nested() if nested else session
    assert (x.secret, y.secret) == ("of x", "of y")
    x.id, x.secret = "z", "of z"
    y.secret = "changed"
    session.flush()
    transaction.rollback()
    assert (x.id, x.secret, y.secret) == ("x", "of x", "of y")
    x.id = "z"
    session.commit()
    session.expunge_all()
    assert session.get_one(Vault, "z").secret == "of x"
    assert session.get_one(Vault, "y").secret == "of y"


def test_object_of_a_rolled_back_insert_can_be_added_again(session: Session) -> None:
    vault = Vault(id="x", secret="s")
    session.add(vault)
    session.flush()
    session.rollback()
    vault.id = "y"
    session.add(vault)
    session.commit()
    assert vault.secret == "s"


# -- values that would not come back as they were given --------------------------------------------


@pytest.mark.parametrize(
    "given", [lambda: Left(owner="a", number="07", secret="s"), lambda: Vault(id=7, secret="s")]
)
def test_key_that_would_come_back_in_another_form_is_refused(
    session: Session, given: Callable[[], Any]
) -> None:
    session.add(given())
    with pytest.raises(ConfigurationError, match=r"was given one of type (str|int)"):
        session.flush()


def test_uuid_given_as_text_is_refused(session: Session) -> None:
    given: Any = str(uuid.uuid4()).upper()
    session.add(Account(id=given, secret="s"))
    # Some databases' own UUID type is asked first, and refuses it too.
    with pytest.raises((ConfigurationError, StatementError)):
        session.flush()


def test_binding_column_without_a_value_is_refused_at_flush(session: Session) -> None:
    session.add(Integration(credentials={}))
    with pytest.raises(ConfigurationError, match="tenant_id has no value yet"):
        session.flush()


# -- selecting and Core ----------------------------------------------------------------------------


def test_selected_attribute_is_sealed_and_opens_with_its_row(session: Session) -> None:
    session.add(Left(owner="a", number=7, secret={"n": 1}))
    session.commit()
    row = session.execute(select(Left.owner, Left.number, Left.secret)).one()
    assert isinstance(row.secret, Sealed)
    assert row.secret.key_version == "v1"
    assert row.secret.open(row=(row.owner, row.number)) == {"n": 1}
    with pytest.raises(TamperedError):
        row.secret.open(row=("a", 8))
    with pytest.raises(ConfigurationError, match=r"opens with row=\(owner, number\)"):
        row.secret.open()


def test_update_statement_takes_a_bound_value_and_nothing_else(session: Session) -> None:
    session.add_all([Vault(id="x", secret=1), Vault(id="y", secret=2)])
    session.commit()
    statement = update(Vault).where(Vault.id == "x")
    session.execute(statement.values({Vault.secret: Bound({"n": 3}, row=("x",))}))
    session.commit()
    assert session.get_one(Vault, "x").secret == {"n": 3}
    session.execute(statement.values(secret=Bound({"n": 4}, row=("x",))))
    session.commit()
    assert session.get_one(Vault, "x").secret == {"n": 4}
    with pytest.raises(ConfigurationError, match="bound to its row"):
        session.execute(statement.values(secret={"n": 5}))


def test_attribute_works_in_aliases_and_its_column_in_loader_options(
    session: Session,
) -> None:
    session.add_all([Left(owner="a", number=1, secret=1), Vault(id="x", secret=None)])
    session.commit()
    other = aliased(Left)
    sealed = session.scalars(select(other.secret).where(other.secret.key_version == "v1")).one()
    assert sealed.open(row=("a", 1)) == 1
    session.expunge_all()
    found = session.scalars(select(Left).options(undefer(Left.secret))).one()
    session.expunge(found)
    assert found.secret == 1
    with pytest.raises(UnsupportedOperationError):
        select(Vault).where(Vault.secret == {"n": 1})


@dataclass
class Credentials:
    token: str


class Typed(Base):
    __tablename__ = "typed"

    id: Mapped[str] = mapped_column(primary_key=True)
    secret: Mapped[Credentials] = row_bound("id", schema=Credentials)


def test_typed_values(session: Session) -> None:
    session.add(Typed(id="x", secret=Credentials("t")))
    session.commit()
    session.expunge_all()
    typed = session.get_one(Typed, "x")
    assert typed.secret == Credentials("t")
    typed.id = "y"
    session.commit()
    assert typed.secret == Credentials("t")
    session.add(Typed(id="z", secret={"token": 1}))
    with pytest.raises(SerializationError):
        session.flush()


def test_core_insert_takes_a_bound_value(session: Session) -> None:
    session.execute(
        insert(Vault.metadata.tables["vaults"]),
        [{"id": i, "secret": Bound(i, row=(i,))} for i in ("x", "y")],
    )
    assert [vault.secret for vault in session.scalars(select(Vault).order_by(Vault.id))] == [
        "x",
        "y",
    ]


# -- bulk ------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [{"owner": "a", "number": n, "secret": {"n": n}} for n in range(5)]


def secrets_of(session: Session, model: Any) -> list[Any]:
    return [each.secret for each in session.scalars(select(model).order_by(model.number))]


def test_bulk_insert_of_prepared_rows(session: Session) -> None:
    session.execute(insert(Left), bound_rows(Left, ROWS))
    assert secrets_of(session, Left) == [{"n": n} for n in range(5)]


def test_bulk_insert_takes_values_that_are_bound_already(session: Session) -> None:
    rows = [{**row, "secret": Bound(row["secret"], row=("a", row["number"]))} for row in ROWS]
    session.execute(insert(Left), bound_rows(Left, rows))
    assert secrets_of(session, Left) == [{"n": n} for n in range(5)]


def test_bulk_update_of_prepared_rows(session: Session) -> None:
    session.execute(insert(Left), bound_rows(Left, ROWS))
    session.execute(update(Left), bound_rows(Left, [{**row, "secret": 1} for row in ROWS]))
    session.expire_all()
    assert secrets_of(session, Left) == [1] * 5


@pytest.mark.skipif(not AT_LEAST_2_1, reason="SQLAlchemy 2.0 has no hook for hybrids in bulk")
def test_bulk_insert_and_update_of_plain_rows(session: Session) -> None:
    session.execute(insert(Left), ROWS)
    assert secrets_of(session, Left) == [{"n": n} for n in range(5)]
    session.execute(update(Left), [{**row, "secret": 1} for row in ROWS])
    session.expire_all()
    assert secrets_of(session, Left) == [1] * 5
    with pytest.raises(ConfigurationError, match="number has no value yet"):
        session.execute(insert(Left), [{"owner": "a", "secret": 1}])


@pytest.mark.skipif(AT_LEAST_2_1, reason="SQLAlchemy 2.1 seals these rows")
def test_bulk_insert_of_plain_rows_never_stores_them_on_sqlalchemy_2_0(session: Session) -> None:
    with pytest.raises(ConfigurationError, match="bound to its row"):
        session.execute(insert(Left), ROWS)


def test_bulk_save_objects(session: Session) -> None:
    session.bulk_save_objects([Left(**row) for row in ROWS])
    assert secrets_of(session, Left) == [{"n": n} for n in range(5)]
    with pytest.raises(ConfigurationError, match="id has no value yet"):
        # Its defaults are made after the values are taken, so they cannot be waited for.
        session.bulk_save_objects([Account(secret="s", kind="plain")])


def test_add_all_of_many_rows(session: Session) -> None:
    session.add_all([Right(**row) for row in ROWS])
    session.commit()
    assert secrets_of(session, Right) == [{"n": n} for n in range(5)]


# -- inheritance and dataclasses -------------------------------------------------------------------


def test_inherited_attributes_open_in_each_kind_of_row(session: Session) -> None:
    session.add_all(
        [
            Account(secret="plain"),
            SingleAccount(secret="single", extra="more"),
            JoinedAccount(secret="joined", own="mine"),
            Vault(id="x", secret="abstract"),
        ]
    )
    session.commit()
    session.expunge_all()
    found = {type(each): each for each in session.scalars(select(Account))}
    single, joined = found[SingleAccount], found[JoinedAccount]
    assert isinstance(single, SingleAccount)
    assert isinstance(joined, JoinedAccount)
    assert found[Account].secret == "plain"
    assert (single.secret, single.extra) == ("single", "more")
    assert (joined.secret, joined.own) == ("joined", "mine")
    assert session.scalars(select(Vault)).one().secret == "abstract"


def test_dataclass_models_store_and_load(session: Session) -> None:
    session.add(Device("d", {"n": 1}, colour="red"))
    session.commit()
    session.expunge_all()
    device = session.scalars(select(Device)).one()
    assert (device.secret, device.spare, device.colour) == ({"n": 1}, None, "red")
    assert "secret" not in repr(device)


# -- keys ------------------------------------------------------------------------------------------


def test_value_sealed_under_a_promoted_key_moves_with_the_next_write(
    session: Session, promoted: Keyring
) -> None:
    session.add(Vault(id="x", secret={"n": 1}))
    session.commit()
    set_default_keyring(promoted)
    vault = session.get_one(Vault, "x")
    assert vault.secret == {"n": 1}
    vault.secret = {"n": 2}
    session.commit()
    assert stored(session, Vault.secret)[0].startswith(b"v2:")


# -- asyncio ---------------------------------------------------------------------------------------


def test_async_session(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[None]]], None],
) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session:
            session.add(Tenant(id="a", integrations=[Integration(credentials={"n": 1})]))
            session.add(Tenant(id="b"))
            session.add_all([Vault(id=name, secret=name) for name in "xyz"])
            await session.commit()
        async with AsyncSession(engine) as session:
            found = (await session.scalars(select(Integration))).one()
            assert found.credentials == {"n": 1}
            found.tenant_id = "b"
            assert found.backup is None
            await session.commit()
            await session.refresh(found)
            assert found.credentials == {"n": 1}
            await session.refresh(found, attribute_names=["credentials"])
            assert found.credentials == {"n": 1}
            await session.execute(insert(Left), bound_rows(Left, ROWS))
            sealed = (await session.scalars(select(Left.secret).where(Left.number == 3))).one()
            assert sealed.open(row=("a", 3)) == {"n": 3}

    run_async(work)
