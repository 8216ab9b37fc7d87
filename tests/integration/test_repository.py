"""The repository of scoped secrets on every database."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypedDict

import msgspec
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, LargeBinary, event, insert, select, text, type_coerce, update
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError
from sqlalchemy.orm import DeclarativeBase, Session

from sqlalchemy_lucent import (
    Bound,
    ConflictError,
    InvalidKeyError,
    Keyring,
    LucentBase,
    LucentSecret,
    LucentSecretMixin,
    LucentSecrets,
    NotSealedError,
    SchemaMismatchError,
    SecretInfo,
    SecretKey,
    SecretNotFoundError,
    SerializationError,
    TamperedError,
    UnknownKeyVersionError,
    generate_master_key,
)
from tests.databases import create_unguarded
from tests.secret_tables import KEY, OTHER


@pytest.fixture
def unguarded(engine: Engine) -> Iterator[Session]:
    """A table that lets in what is not sealed."""
    create_unguarded(LucentBase.metadata, engine)
    with Session(engine) as session:
        yield session


@pytest.fixture
def secrets(session: Session) -> LucentSecrets:
    return LucentSecrets(session)


@contextmanager
def counted(engine: Engine) -> Iterator[list[str]]:
    """The statements that an engine executes, an executemany counting once."""
    statements: list[str] = []

    def note(*arguments: Any) -> None:
        statements.append(arguments[2])

    event.listen(engine, "before_cursor_execute", note)
    yield statements
    event.remove(engine, "before_cursor_execute", note)


def token_of(secrets: LucentSecrets, key: SecretKey) -> str:
    info = secrets.info(key)
    assert info is not None
    assert info.token is not None
    return info.token


def raw_payload(session: Session, key: SecretKey) -> bytes:
    payload = LucentSecret.metadata.tables["lucent_secrets"].c.payload
    statement = select(type_coerce(payload, LargeBinary())).where(
        *(getattr(LucentSecret, name) == part for name, part in key._asdict().items())
    )
    return bytes(session.execute(statement).scalar_one())


def overwrite(session: Session, key: SecretKey, payload: bytes) -> None:
    table = LucentSecret.metadata.tables["lucent_secrets"]
    session.execute(
        update(table)
        .where(*(table.c[name] == part for name, part in key._asdict().items()))
        .values(payload=type_coerce(payload, LargeBinary()))
    )


# -- set, get, require, exists, delete -------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [{"clientEmail": "a@b", "privateKey": "…"}, [1, 2.5, None], "text", 0, False, None]
)
def test_value_comes_back(secrets: LucentSecrets, value: Any) -> None:
    secrets.set(KEY, value)
    assert secrets.require(KEY) == value
    assert secrets.get(str(KEY)) == value


def test_missing_secret(secrets: LucentSecrets) -> None:
    assert secrets.get(KEY) is None
    assert not secrets.exists(KEY)
    assert secrets.info(KEY) is None
    assert secrets.delete(KEY) is False
    for call in (secrets.require, secrets.rotate, lambda key: secrets.copy(key, OTHER)):
        with pytest.raises(SecretNotFoundError, match=r"under tenant:t1:stripe:apiKey$"):
            call(KEY)


def test_set_replaces_the_value_and_keeps_the_time_of_creation(
    session: Session, secrets: LucentSecrets
) -> None:
    secrets.set(KEY, 1)
    first = secrets.info(KEY)
    secrets.set(KEY, 2)
    second = secrets.info(KEY)
    assert first is not None
    assert second is not None
    assert secrets.require(KEY) == 2
    assert second.created_at == first.created_at
    assert second.updated_at > first.updated_at
    assert second.token != first.token
    assert secrets.count() == 1


def test_times_are_in_utc(secrets: LucentSecrets) -> None:
    before = datetime.now(UTC)
    secrets.set(KEY, 1)
    info = secrets.info(KEY)
    assert info is not None
    assert before - timedelta(seconds=1) < info.created_at < datetime.now(UTC)
    assert info.created_at.tzinfo is UTC


def test_delete_says_whether_there_was_one(secrets: LucentSecrets) -> None:
    secrets.set(KEY, 1)
    assert secrets.exists(KEY)
    assert secrets.delete(KEY) is True
    assert not secrets.exists(KEY)


def test_no_character_of_a_key_is_a_wildcard_and_case_counts(secrets: LucentSecrets) -> None:
    names = ["apiKey", "apikey", "api%", "api_ey", "a*", "é", "e", "ß", "ss", "ﬀ".upper()]
    for name in names:
        secrets.set(SecretKey("tenant", "t1", "p", name), name)
    for name in names:
        assert secrets.require(SecretKey("tenant", "t1", "p", name)) == name
    assert secrets.delete(SecretKey("tenant", "t1", "p", "api%"))
    assert secrets.count(scope="tenant", owner_id="t1", provider="p") == len(set(names)) - 1
    assert secrets.list(scope="tenan_") == []


KEY_PARTS = st.text(
    st.characters(exclude_categories=["Cc", "Cs"], exclude_characters=":"), min_size=1, max_size=20
).filter(lambda part: is_part(part))


def is_part(part: str) -> bool:
    try:
        SecretKey("s", part, "p", "n")
    except InvalidKeyError:
        return False
    return True


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(parts=st.lists(st.tuples(KEY_PARTS, KEY_PARTS), min_size=1, max_size=4, unique=True))
def test_each_key_has_its_own_secret(secrets: LucentSecrets, parts: list[tuple[str, str]]) -> None:
    keys = [SecretKey("tenant", owner, provider, "n") for owner, provider in parts]
    values = {key: number for number, key in enumerate(keys)}
    secrets.set_many(values)
    assert secrets.get_many(keys) == values
    assert {info.key for info in secrets.list()} == set(keys)
    for key in keys:
        assert secrets.delete(key)
    assert secrets.count() == 0


def test_owner_may_be_a_uuid_or_a_number(secrets: LucentSecrets) -> None:
    owner = uuid.uuid4()
    secrets.set(SecretKey("user", owner, "p", "n"), "u")
    secrets.set(SecretKey("user", 7, "p", "n"), "i")
    assert secrets.require(f"user:{owner}:p:n") == "u"
    assert [info.key.name for info in secrets.list(scope="user", owner_id=owner)] == ["n"]
    assert secrets.count(scope="user", owner_id=7) == 1
    assert secrets.delete_many(scope="user", owner_id=owner) == 1


def test_value_that_is_no_json_writes_nothing(secrets: LucentSecrets) -> None:
    secrets.set(KEY, 1)
    for write in (
        lambda: secrets.set(KEY, {"a": object()}),
        lambda: secrets.set_many({OTHER: 1, KEY: float("nan")}),
    ):
        with pytest.raises(SerializationError):
            write()
    assert secrets.require(KEY) == 1
    assert not secrets.exists(OTHER)


def test_only_sealed_bytes_are_stored(session: Session, secrets: LucentSecrets) -> None:
    secrets.set(KEY, {"token": "hunter2"})
    stored = raw_payload(session, KEY)
    assert stored.startswith(b"v1:\x01")
    assert b"hunter2" not in stored


def test_another_model_and_keyring(engine: Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Own(LucentSecretMixin, Base):
        __tablename__ = "own_secrets"

    Base.metadata.create_all(engine)
    keyring = Keyring({"k9": b"9" * 32})
    with Session(engine) as session:
        own = LucentSecrets(session, keyring=keyring, model=Own)
        own.set(KEY, {"n": 1})
        assert own.require(KEY) == {"n": 1}
        assert [info.key_version for info in own.list()] == ["k9"]
        with pytest.raises(UnknownKeyVersionError, match="'k9'"):
            LucentSecrets(session, model=Own).require(KEY)
        assert own.rotate(KEY) == "k9"


# -- values that do not open -----------------------------------------------------------------------


def test_bytes_of_another_secret_do_not_open(session: Session, secrets: LucentSecrets) -> None:
    secrets.set_many({KEY: 1, OTHER: 2})
    overwrite(session, OTHER, raw_payload(session, KEY))
    with pytest.raises(TamperedError):
        secrets.require(OTHER)
    with pytest.raises(TamperedError):
        secrets.get_many([KEY, OTHER])
    with pytest.raises(TamperedError):
        secrets.rotate_many([KEY, OTHER])
    assert secrets.require(KEY) == 1


def test_plaintext_in_the_table_is_refused_and_listed(unguarded: Session) -> None:
    secrets = LucentSecrets(unguarded)
    secrets.set(KEY, 1)
    overwrite(unguarded, KEY, b'{"token": "hunter2"}')
    with pytest.raises(NotSealedError) as caught:
        secrets.require(KEY)
    assert "hunter2" not in str(caught.value)
    (info,) = secrets.list()
    assert (info.key_version, info.token) == (None, None)
    secrets.set(KEY, 2)
    assert secrets.require(KEY) == 2


def test_key_that_breaks_the_rules_is_listed_as_it_is(
    session: Session, secrets: LucentSecrets
) -> None:
    secrets.set(KEY, 1)
    session.execute(text("UPDATE lucent_secrets SET name = ' spaced'"))
    assert [info.key.name for info in secrets.list()] == [" spaced"]


# -- typed values ----------------------------------------------------------------------------------


@dataclass
class Account:
    email: str
    age: int | None = None


class Typed(TypedDict):
    email: str


class Struct(msgspec.Struct):
    email: str


@pytest.mark.parametrize("type_", [Account, Struct])
def test_require_returns_the_type_that_is_asked_for(
    secrets: LucentSecrets, type_: type[Any]
) -> None:
    secrets.set(KEY, {"email": "a@b"})
    assert secrets.require(KEY, as_=type_) == type_(email="a@b")
    assert secrets.require(KEY, as_=Typed) == {"email": "a@b"}
    assert secrets.require(KEY, as_=dict[str, str]) == {"email": "a@b"}


def test_a_subclass_may_require_a_type_by_default(session: Session, keyring: Keyring) -> None:
    class Credentials(LucentSecrets):
        def require(self, key: Any, *, as_: Any = dict[str, str], **which: Any) -> Any:
            return super().require(key, as_=as_, **which)

    credentials = Credentials(session, keyring=keyring)
    credentials.set(KEY, {"email": "a@b"})
    assert credentials.require(KEY) == {"email": "a@b"}


class Kept(pydantic.BaseModel):
    token: pydantic.SecretStr

    @pydantic.field_serializer("token", when_used="json")
    def _keep(self, secret: pydantic.SecretStr) -> str:
        return secret.get_secret_value()


class Masked(pydantic.BaseModel):
    token: pydantic.SecretStr


@pytest.mark.parametrize("model, token", [(Kept, "t-1"), (Masked, "**********")])
def test_a_dumped_model_comes_back_as_its_serializers_wrote_it(
    secrets: LucentSecrets, model: type[Any], token: str
) -> None:
    secrets.set(KEY, model(token="t-1").model_dump(mode="json"))
    assert secrets.require(KEY, as_=model).token.get_secret_value() == token


def test_document_of_another_shape_is_refused_by_its_path_and_without_its_value(
    secrets: LucentSecrets,
) -> None:
    secrets.set(KEY, {"email": "hunter2", "age": "hunter3"})
    with pytest.raises(SchemaMismatchError, match=r"\$\.age") as caught:
        secrets.require(KEY, as_=Account)
    assert "hunter" not in str(caught.value)
    assert caught.value.__context__ is None


# -- compare-and-swap ------------------------------------------------------------------------------


def test_set_with_the_token_of_what_is_stored(secrets: LucentSecrets) -> None:
    first = secrets.set(KEY, 1)
    assert first == token_of(secrets, KEY)
    second = secrets.set(KEY, 2, expected=first)
    assert second == secrets.list()[0].token
    assert secrets.require(KEY) == 2
    with pytest.raises(ConflictError, match="under tenant:t1:stripe:apiKey is not what"):
        secrets.set(KEY, 3, expected=first)
    assert secrets.require(KEY) == 2


@pytest.mark.parametrize("cut", [0, 1, 2, 10, -2])
def test_part_of_a_token_is_no_token(secrets: LucentSecrets, cut: int) -> None:
    token = secrets.set(KEY, 1)
    for part in (token[:cut], token + "00"):
        with pytest.raises(InvalidKeyError, match="takes the token"):
            secrets.set(KEY, 2, expected=part)
        with pytest.raises(InvalidKeyError, match="takes the token"):
            secrets.delete(KEY, expected=part)
    assert secrets.require(KEY) == 1


def test_bytes_that_are_not_sealed_have_no_token(unguarded: Session) -> None:
    secrets = LucentSecrets(unguarded)
    secrets.set(KEY, 1)
    for foreign in (b"", b"v1:", b'{"a": 1}'):
        overwrite(unguarded, KEY, foreign)
        (info,) = secrets.list()
        assert (info.token, info.key_version) == (None, None)


def test_set_that_expects_nothing(secrets: LucentSecrets) -> None:
    secrets.set(KEY, 1, expected=None)
    with pytest.raises(ConflictError):
        secrets.set(KEY, 2, expected=None)
    assert secrets.require(KEY) == 1
    secrets.delete(KEY)
    secrets.set(KEY, 3, expected=None)
    assert secrets.require(KEY) == 3


def test_set_that_expects_a_deleted_value(secrets: LucentSecrets) -> None:
    token = secrets.set(KEY, 1)
    secrets.delete(KEY)
    with pytest.raises(ConflictError):
        secrets.set(KEY, 2, expected=token)
    assert not secrets.exists(KEY)


def test_the_same_value_has_a_new_token_with_each_write_and_rotation(
    secrets: LucentSecrets,
) -> None:
    tokens = {secrets.set(KEY, 1), secrets.set(KEY, 1)}
    secrets.rotate(KEY)
    tokens.add(token_of(secrets, KEY))
    assert len(tokens) == 3


def test_delete_with_a_token(secrets: LucentSecrets) -> None:
    old = secrets.set(KEY, 1)
    new = secrets.set(KEY, 2)
    with pytest.raises(ConflictError):
        secrets.delete(KEY, expected=old)
    assert secrets.exists(KEY)
    assert secrets.delete(KEY, expected=new) is True
    with pytest.raises(ConflictError):
        secrets.delete(KEY, expected=new)


# -- many secrets ----------------------------------------------------------------------------------

THOUSAND = [SecretKey("tenant", f"t{n % 10}", "p", f"n{n:04}") for n in range(1000)]


def test_a_thousand_secrets_take_a_bounded_number_of_statements(
    engine: Engine, session: Session, secrets: LucentSecrets, promoted: Keyring
) -> None:
    values = {key: {"name": key.name} for key in THOUSAND}
    with counted(engine) as statements:
        secrets.set_many(values)
    assert len(statements) == 1
    with counted(engine) as statements:
        assert secrets.get_many(THOUSAND) == values
    assert len(statements) == (1 if engine.dialect.name == "postgresql" else 8)
    with counted(engine) as statements:
        versions = secrets.rotate_many(THOUSAND, promoted)
    assert len(statements) <= 9
    assert versions == dict.fromkeys(THOUSAND, "v2")
    assert LucentSecrets(session, keyring=promoted).get_many(THOUSAND) == values
    with counted(engine) as statements:
        assert secrets.delete_many(scope="tenant", owner_id="t3") == 100
    assert len(statements) == 1
    assert secrets.count() == 900


def test_set_many_replaces_and_inserts(secrets: LucentSecrets) -> None:
    secrets.set(KEY, 1)
    secrets.set_many({str(KEY): 2, str(OTHER): 3})
    assert secrets.get_many([KEY, OTHER]) == {KEY: 2, OTHER: 3}
    secrets.set_many({})


def test_get_many_keeps_the_order_and_leaves_out_what_is_missing(secrets: LucentSecrets) -> None:
    secrets.set_many({KEY: None, OTHER: 2})
    found = secrets.get_many([OTHER, "tenant:t3:stripe:apiKey", KEY, str(OTHER)])
    assert list(found.items()) == [(OTHER, 2), (KEY, None)]
    assert secrets.get_many([]) == {}


def test_delete_many_takes_one_owner_or_one_of_its_providers(secrets: LucentSecrets) -> None:
    for owner in ("t1", "t11"):
        for provider in ("a", "b"):
            secrets.set(SecretKey("tenant", owner, provider, "n"), 1)
    assert secrets.delete_many(scope="tenant", owner_id="t1", provider="a") == 1
    assert secrets.delete_many(scope="tenant", owner_id="t1") == 1
    assert secrets.delete_many(scope="tenant", owner_id="t1") == 0
    assert secrets.count() == 2


# -- copy, move, rotate ----------------------------------------------------------------------------


def test_copy_is_sealed_for_its_own_key(session: Session, secrets: LucentSecrets) -> None:
    secrets.set(KEY, {"n": 1})
    secrets.copy(KEY, OTHER)
    assert secrets.get_many([KEY, OTHER]) == {KEY: {"n": 1}, OTHER: {"n": 1}}
    with pytest.raises(ConflictError):
        secrets.copy(KEY, OTHER)


def test_move_leaves_nothing_behind(secrets: LucentSecrets) -> None:
    secrets.set(KEY, {"n": 1})
    before = secrets.info(KEY)
    secrets.move(KEY, OTHER)
    after = secrets.info(OTHER)
    assert secrets.get(KEY) is None
    assert secrets.require(OTHER) == {"n": 1}
    assert before is not None
    assert after is not None
    assert after.created_at == before.created_at


def test_move_onto_another_secret_changes_neither(secrets: LucentSecrets) -> None:
    secrets.set_many({KEY: 1, OTHER: 2})
    with pytest.raises(ConflictError, match="tenant:t2"):
        secrets.move(KEY, OTHER)
    assert secrets.get_many([KEY, OTHER]) == {KEY: 1, OTHER: 2}


def test_rotate_seals_anew_under_the_primary_and_is_no_edit(
    session: Session, secrets: LucentSecrets, promoted: Keyring
) -> None:
    secrets.set(KEY, {"n": 1})
    before = secrets.info(KEY)
    assert secrets.rotate(KEY, promoted) == "v2"
    after = secrets.info(KEY)
    assert before is not None
    assert after is not None
    assert (after.key_version, after.updated_at) == ("v2", before.updated_at)
    assert LucentSecrets(session, keyring=promoted.without("v1")).require(KEY) == {"n": 1}
    with pytest.raises(UnknownKeyVersionError):
        secrets.require(KEY)


def test_rotate_moves_a_secret_to_another_key_of_the_same_version(session: Session) -> None:
    wrong, right = (Keyring({"v1": generate_master_key()}) for _ in range(2))
    mistaken = LucentSecrets(session, keyring=wrong)
    mistaken.set(KEY, {"n": 1})
    assert mistaken.rotate(KEY, to=right) == "v1"
    assert LucentSecrets(session, keyring=right).require(KEY) == {"n": 1}


def test_rotate_many_with_one_missing_writes_nothing(
    secrets: LucentSecrets, promoted: Keyring
) -> None:
    secrets.set(KEY, 1)
    with pytest.raises(SecretNotFoundError, match="under tenant:t2"):
        secrets.rotate_many([KEY, OTHER], promoted)
    assert [info.key_version for info in secrets.list()] == ["v1"]


# -- list ------------------------------------------------------------------------------------------


def test_list_opens_nothing(session: Session, promoted: Keyring) -> None:
    LucentSecrets(session, keyring=Keyring({"lost": b"l" * 32})).set(KEY, 1)
    (info,) = LucentSecrets(session).list()
    assert (info.key, info.key_version) == (KEY, "lost")


def test_list_is_ordered_and_filtered_by_leading_parts(secrets: LucentSecrets) -> None:
    keys = [
        SecretKey(scope, owner, provider, name)
        for scope in ("app", "tenant")
        for owner in ("T", "a", "b")
        for provider in ("p", "q")
        for name in ("Z", "a")
    ]
    secrets.set_many(dict.fromkeys(reversed(keys), 1))
    assert [info.key for info in secrets.list()] == sorted(keys)

    def keys_of(infos: list[SecretInfo]) -> list[SecretKey]:
        return [info.key for info in infos]

    assert keys_of(secrets.list(scope="app")) == keys[:12]
    assert keys_of(secrets.list(scope="app", owner_id="T")) == keys[:4]
    assert keys_of(secrets.list(scope="app", owner_id="T", provider="p")) == keys[:2]
    assert keys_of(secrets.list(scope="app", owner_id="T", provider="p", name="Z")) == keys[:1]
    assert secrets.count(scope="app", owner_id="T") == 4


@pytest.mark.parametrize("size", [1, 7, 24, 25])
@pytest.mark.parametrize("filters", [{}, {"scope": "s"}, {"scope": "s", "owner_id": "o1"}])
def test_pages_put_together_are_the_whole_list(
    secrets: LucentSecrets, size: int, filters: dict[str, Any]
) -> None:
    keys = [
        SecretKey(scope, f"o{n % 3}", f"p{n % 2}", f"n{n}")
        for n in range(12)
        for scope in ("s", "t")
    ]
    secrets.set_many(dict.fromkeys(keys, 1))
    paged: list[SecretInfo] = []
    while page := secrets.list(
        **filters,
        limit=size,
        after=paged[-1].key if paged else None,
    ):
        paged.extend(page)
    assert paged == secrets.list(**filters)


@contextmanager
def explained(engine: Engine) -> Iterator[list[str]]:
    """The plans of the queries for secrets that an engine executes."""
    plans: list[str] = []
    command = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "

    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT lucent_secrets"):
            with closing(connection.connection.cursor()) as other:
                other.execute(command + statement, parameters)
                plans.append("\n".join(str(row) for row in other.fetchall()))

    event.listen(engine, "before_cursor_execute", explain)
    yield plans
    event.remove(engine, "before_cursor_execute", explain)


def test_pages_and_looked_up_keys_are_found_in_the_index(
    engine: Engine, session: Session, secrets: LucentSecrets
) -> None:
    secrets.set_many(dict.fromkeys(THOUSAND, 1))
    session.commit()
    analyze = {"sqlite": "ANALYZE", "postgresql": "ANALYZE lucent_secrets"}
    session.execute(text(analyze.get(engine.dialect.name, "ANALYZE TABLE lucent_secrets")))
    found_by_the_whole_key = {
        "sqlite": r"SEARCH lucent_secrets USING INDEX \w+ \(.*(name=\?|name\)>\(\?,\?,\?,\?\))",
        "postgresql": r"Index Cond: .*(ROW\(|name)",
        "mysql": r"'range', 'PRIMARY', 'PRIMARY', '2056'",
    }[engine.dialect.name]
    with explained(engine) as plans:
        secrets.list(limit=10, after=THOUSAND[990])
        secrets.get_many(THOUSAND[500:503])
    assert len(plans) == 2
    for plan in plans:
        assert re.search(found_by_the_whole_key, plan), plan


def test_page_behind_a_key_of_another_listing_is_refused(
    secrets: LucentSecrets,
) -> None:
    secrets.set_many({KEY: 1, OTHER: 1})
    with pytest.raises(InvalidKeyError, match="after= is a key of another listing"):
        secrets.list(scope="tenant", owner_id="t2", after=KEY)


# -- the caller's session and transaction ----------------------------------------------------------


def test_nothing_is_committed(engine: Engine, session: Session, secrets: LucentSecrets) -> None:
    secrets.set(KEY, 1)
    secrets.set_many({OTHER: 2})
    secrets.rotate(KEY)
    secrets.move(OTHER, "tenant:t3:stripe:apiKey")
    session.rollback()
    assert secrets.list() == []


def test_what_a_savepoint_undoes_is_gone_and_the_rest_stays(
    session: Session, secrets: LucentSecrets
) -> None:
    secrets.set(KEY, 1)
    savepoint = session.begin_nested()
    secrets.set(KEY, 2)
    secrets.set(OTHER, 2)
    savepoint.rollback()
    assert secrets.require(KEY) == 1
    assert secrets.get(OTHER) is None
    with session.begin_nested():
        secrets.set(OTHER, 3)
    session.commit()
    assert secrets.get_many([KEY, OTHER]) == {KEY: 1, OTHER: 3}


def test_pending_objects_of_the_session_are_seen(session: Session, secrets: LucentSecrets) -> None:
    session.add(LucentSecret(**KEY._asdict(), payload={"n": 1}))
    assert secrets.require(KEY) == {"n": 1}


def test_loaded_objects_of_the_session_follow(session: Session, secrets: LucentSecrets) -> None:
    secrets.set_many({KEY: 1, OTHER: 1})
    first = session.get_one(LucentSecret, tuple(KEY))
    second = session.get_one(LucentSecret, tuple(OTHER))
    assert (first.payload, second.payload) == (1, 1)
    secrets.set(KEY, 2)
    secrets.set_many({OTHER: 3})
    assert (first.payload, second.payload) == (2, 3)
    secrets.delete_many(scope="tenant", owner_id="t1")
    assert session.get(LucentSecret, tuple(KEY)) is None


def test_changes_that_wait_for_a_flush_are_not_lost(
    session: Session, secrets: LucentSecrets
) -> None:
    secrets.set(KEY, 1)
    loaded = session.get_one(LucentSecret, tuple(KEY))
    with session.no_autoflush:
        loaded.payload = "mine"
        secrets.set(KEY, 2)
    assert loaded.payload == "mine"
    session.flush()
    assert secrets.require(KEY) == "mine"


def test_missing_table_gives_the_databases_own_error(engine: Engine) -> None:
    with Session(engine) as session:
        secrets = LucentSecrets(session)
        for call in (
            lambda: secrets.get(KEY),
            lambda: secrets.set(KEY, {"token": "hunter2"}),
            lambda: secrets.set_many({KEY: "hunter2"}),
        ):
            with pytest.raises(DBAPIError) as caught:
                call()
            assert "hunter2" not in str(caught.value)
            session.rollback()


def test_closed_session_gives_sqlalchemys_own_error(engine: Engine) -> None:
    session = Session(engine, close_resets_only=False)
    session.close()
    with pytest.raises(InvalidRequestError, match="closed"):
        LucentSecrets(session).set(KEY, 1)


def test_read_only_transaction_reads_and_writes_nothing(
    engine: Engine, session: Session, secrets: LucentSecrets
) -> None:
    secrets.set(KEY, 1)
    session.commit()
    read_only = {
        "sqlite": "PRAGMA query_only = ON",
        "postgresql": "SET TRANSACTION READ ONLY",
        "mysql": "SET SESSION TRANSACTION READ ONLY",
    }[engine.dialect.name]
    session.execute(text(read_only))
    if engine.dialect.name == "mysql":
        session.commit()
    assert secrets.require(KEY) == 1
    with pytest.raises(DBAPIError):
        secrets.set_many({KEY: 2, OTHER: 2})
    session.rollback()
    session.connection().invalidate()
    session.rollback()
    assert secrets.get_many([KEY, OTHER]) == {KEY: 1}


def test_integrity_error_of_a_raced_move_is_sqlalchemys_own(
    session: Session, secrets: LucentSecrets
) -> None:
    secrets.set(KEY, 1)
    session.commit()
    engine = session.get_bind()

    def create_target(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("UPDATE"):
            with Session(engine) as another:
                LucentSecrets(another).set(OTHER, 2)
                another.commit()

    # Another writer makes the target right after it was looked for.
    event.listen(engine, "before_cursor_execute", create_target)
    with pytest.raises(IntegrityError):
        secrets.move(KEY, OTHER)
    session.rollback()
    assert secrets.get_many([KEY, OTHER]) == {KEY: 1, OTHER: 2}


def test_rows_written_by_hand_can_be_read(session: Session, secrets: LucentSecrets) -> None:
    now = datetime.now(UTC)
    session.execute(
        insert(LucentSecret.metadata.tables["lucent_secrets"]).values(
            **KEY._asdict(), payload=Bound({"n": 1}, row=KEY), created_at=now, updated_at=now
        )
    )
    assert secrets.require(KEY) == {"n": 1}
