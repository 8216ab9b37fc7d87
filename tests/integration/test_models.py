"""``LucentSecret`` as a model: its table, its row binding, the mixin elsewhere."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    create_engine,
    inspect,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_lucent import (
    Bound,
    InvalidKeyError,
    Keyring,
    LucentBase,
    LucentSecret,
    LucentSecretMixin,
    LucentSecrets,
    SecretKey,
    SerializationError,
    TamperedError,
    UnsupportedOperationError,
    set_default_keyring,
)
from sqlalchemy_lucent.models import UTCDateTime
from tests.databases import create_unguarded
from tests.secret_tables import KEY

TABLE = LucentBase.metadata.tables["lucent_secrets"]


def secret(key: SecretKey = KEY, **values: Any) -> LucentSecret:
    return LucentSecret(**key._asdict(), **{"payload": {"token": "t"}, **values})


def test_secret_is_stored_and_read_through_the_orm(session: Session) -> None:
    session.add(secret())
    session.commit()
    found = session.get_one(LucentSecret, tuple(KEY))
    assert found.payload == {"token": "t"}
    assert (found.key, found.key_version) == (KEY, "v1")
    assert repr(found) == "<LucentSecret tenant:t1:stripe:apiKey>"


def test_printing_an_expired_or_detached_secret_needs_no_database(session: Session) -> None:
    session.add(secret())
    session.commit()
    found = session.get_one(LucentSecret, tuple(KEY))
    session.expire(found)
    session.expunge(found)
    assert repr(found) == "<LucentSecret tenant:t1:stripe:apiKey>"
    assert repr(LucentSecret(scope="app")) == "<LucentSecret app:None:None:None>"


def test_repository_and_model_read_each_other(session: Session) -> None:
    LucentSecrets(session).set(KEY, {"n": 1})
    found = session.get_one(LucentSecret, tuple(KEY))
    assert found.payload == {"n": 1}
    found.payload = {"n": 2}
    assert LucentSecrets(session).require(KEY) == {"n": 2}


def test_key_version_is_the_databases_own_and_follows_the_payload(
    session: Session, promoted: Keyring
) -> None:
    session.add(secret())
    session.commit()
    set_default_keyring(promoted)
    found = session.get_one(LucentSecret, tuple(KEY))
    found.payload = {"n": 2}
    session.commit()
    assert found.key_version == "v2"
    with pytest.raises(DBAPIError):
        session.execute(text("UPDATE lucent_secrets SET key_version = 'v9'"))


@pytest.mark.parametrize(
    "payload, version",
    [
        (b"", None),
        (b"plain text", None),
        (b":", None),
        (b"v1:plain text", None),
        (b"{\xff:\x01", None),
        (b"v" * 33 + b":\x01", None),
        (b"v" * 32 + b":\x01", "v" * 32),
        (b"2024-01.a_B:\x01", "2024-01.a_B"),
    ],
)
def test_key_version_of_foreign_bytes(engine: Engine, payload: bytes, version: str | None) -> None:
    create_unguarded(LucentBase.metadata, engine)
    session = Session(engine)
    session.add(secret())
    session.flush()
    session.execute(update(TABLE).values(payload=type_coerce(payload, LargeBinary())))
    assert session.execute(select(TABLE.c.key_version)).scalar_one() == version
    session.close()


def test_key_version_is_indexed(engine: Engine, session: Session) -> None:
    indexes = inspect(engine).get_indexes("lucent_secrets")
    assert [index["column_names"] for index in indexes] == [["key_version"]]


def test_primary_key_is_the_scoped_key_in_its_order(engine: Engine, session: Session) -> None:
    constraint = inspect(engine).get_pk_constraint("lucent_secrets")
    assert constraint["constrained_columns"] == ["scope", "owner_id", "provider", "name"]


def test_keys_that_differ_in_case_or_accent_are_different_secrets(session: Session) -> None:
    names = ["apiKey", "apikey", "apikéy", "ApiKey"]
    session.add_all([secret(KEY._replace(name=name), payload=name) for name in names])
    session.commit()
    found = session.scalars(select(LucentSecret).order_by(LucentSecret.name)).all()
    assert [each.name for each in found] == sorted(names)
    assert [each.payload for each in found] == sorted(names)


def test_longest_parts_in_four_byte_characters_fit(session: Session) -> None:
    parts = ["\U0001f511" * 128] * 4
    session.add(secret(SecretKey(*parts)))
    session.commit()
    assert session.scalars(select(LucentSecret)).one().payload == {"token": "t"}


@pytest.mark.parametrize("part", ["", " a", "a:b", "x" * 129, "e\u0301", "a\nb", None, 7])
def test_key_part_that_breaks_a_rule_is_refused_on_the_model_too(part: Any) -> None:
    with pytest.raises(InvalidKeyError, match="the owner_id of a secret key"):
        LucentSecret(scope="tenant", owner_id=part)


def test_every_part_of_the_key_is_bound(session: Session) -> None:
    keys = [KEY, *(KEY._replace(**{name: "other"}) for name in KEY._fields)]
    session.add_all([secret(key) for key in keys])
    session.commit()
    sealed = session.execute(
        select(type_coerce(TABLE.c.payload, LargeBinary())).where(
            *(TABLE.c[name] == part for name, part in KEY._asdict().items())
        )
    ).scalar_one()
    session.execute(update(TABLE).values(payload=type_coerce(bytes(sealed), LargeBinary())))
    session.expire_all()
    for key in keys:
        found = session.get_one(LucentSecret, tuple(key))
        if key == KEY:
            assert found.payload == {"token": "t"}
        else:
            with pytest.raises(TamperedError):
                assert found.payload


def test_parts_joined_differently_are_different_rows(session: Session) -> None:
    # Each part is length-prefixed, so that (ab, c) and (a, bc) do not give the same bytes.
    session.add_all(
        [secret(SecretKey("ab", "c", "p", "n")), secret(SecretKey("a", "bc", "p", "n"))]
    )
    session.commit()
    payloads = select(type_coerce(TABLE.c.payload, LargeBinary())).where(TABLE.c.scope == "ab")
    sealed = bytes(session.execute(payloads).scalar_one())
    session.execute(update(TABLE).values(payload=type_coerce(sealed, LargeBinary())))
    session.expire_all()
    with pytest.raises(TamperedError):
        assert session.get_one(LucentSecret, ("a", "bc", "p", "n")).payload


def test_renamed_secret_is_sealed_anew_or_refused(session: Session) -> None:
    session.add_all([secret(), secret(KEY._replace(name="second"))])
    session.commit()
    first = session.get_one(LucentSecret, tuple(KEY))
    second = session.get_one(LucentSecret, tuple(KEY._replace(name="second")))
    assert first.payload == {"token": "t"}
    first.name = "renamed"
    session.commit()
    assert first.payload == {"token": "t"}
    session.refresh(second)
    second.name = "renamed too"
    with pytest.raises(UnsupportedOperationError, match="read the attribute 'payload' before"):
        session.commit()


def test_times_are_kept_to_the_microsecond_and_come_back_in_utc(session: Session) -> None:
    east = timezone(timedelta(hours=5, minutes=30))
    given = datetime(2024, 2, 29, 1, 2, 3, 456789, tzinfo=east)
    session.add(secret(created_at=given))
    session.commit()
    found = session.scalars(select(LucentSecret)).one()
    assert found.created_at == given
    assert found.created_at.tzinfo is UTC
    same = select(LucentSecret).where(LucentSecret.created_at == given)
    assert session.scalars(same).all() == [found]


def test_time_without_a_zone_is_refused(session: Session) -> None:
    session.add(secret(created_at=datetime(2024, 1, 1)))  # noqa: DTZ001
    with pytest.raises(SerializationError, match="time zone"):
        session.flush()


def test_update_sets_updated_at(session: Session) -> None:
    session.add(secret())
    session.commit()
    found = session.scalars(select(LucentSecret)).one()
    before = found.updated_at
    found.payload = {"n": 2}
    session.commit()
    assert found.updated_at > before


def test_mixin_makes_a_table_of_its_own_with_columns_beside(engine: Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Secret(LucentSecretMixin, Base):
        __tablename__ = "app_secrets"
        comment: Mapped[str | None] = mapped_column(String(50))

    Base.metadata.create_all(engine)
    LucentBase.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Secret(**KEY._asdict(), payload=1, comment="c"))
        session.add(secret(payload=2))
        session.commit()
        assert (session.get_one(Secret, tuple(KEY)).payload) == 1
        sealed = session.scalars(select(Secret.payload)).one()
        assert sealed.open(row=KEY) == 1
        # The same key in another table is another row.
        session.execute(update(TABLE).values(payload=type_coerce(bytes(sealed), LargeBinary())))
        session.expire_all()
        with pytest.raises(TamperedError):
            assert session.get_one(LucentSecret, tuple(KEY)).payload


def test_core_update_takes_a_bound_value(session: Session) -> None:
    session.add(secret())
    session.commit()
    session.execute(update(TABLE).values(payload=Bound({"n": 9}, row=KEY)))
    session.commit()
    assert session.scalars(select(LucentSecret)).one().payload == {"n": 9}


def test_a_time_may_be_null() -> None:
    table = Table(
        "t", MetaData(), Column("id", Integer, primary_key=True), Column("at", UTCDateTime)
    )
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        table.create(connection)
        at = datetime(2024, 5, 6, 7, 8, 9, 10, tzinfo=UTC)
        connection.execute(table.insert(), [{"at": at}, {"at": None}])
        assert connection.scalars(table.select().with_only_columns(table.c.at)).all() == [at, None]
    engine.dispose()
