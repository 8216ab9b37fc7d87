"""The repository without a database: what it refuses, and that both classes offer the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import create_engine, create_mock_engine
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_lucent import (
    AsyncLucentSecrets,
    ConfigurationError,
    InvalidKeyError,
    LucentSecretMixin,
    LucentSecrets,
    SecretAccess,
    SecretInfo,
    SecretKey,
    UnsupportedOperationError,
    generate_master_key,
)
from sqlalchemy_lucent.repository import _token

KEY = "tenant:t1:stripe:apiKey"


def public(class_: type[Any]) -> dict[str, Any]:
    return {name: getattr(class_, name) for name in vars(class_) if not name.startswith("_")}


def test_both_repositories_have_the_same_methods_and_parameters() -> None:
    sync, asynchronous = public(LucentSecrets), public(AsyncLucentSecrets)
    assert sync.keys() == asynchronous.keys()
    # One takes an Engine, the other an AsyncEngine.
    assert [*inspect.signature(sync["purge"]).parameters] == [
        *inspect.signature(asynchronous["purge"]).parameters
    ]
    assert inspect.iscoroutinefunction(asynchronous["purge"])
    for name in sync.keys() - {"key", "purge"}:
        assert inspect.signature(sync[name]) == inspect.signature(asynchronous[name]), name
        assert name == "generate_master_key" or inspect.iscoroutinefunction(asynchronous[name])


def test_keys_and_master_keys_are_made_from_the_class() -> None:
    assert LucentSecrets.key("tenant", 7, "stripe", "apiKey") == SecretKey.parse(
        "tenant:7:stripe:apiKey"
    )
    assert LucentSecrets.generate_master_key is generate_master_key
    assert AsyncLucentSecrets.key is SecretKey


def test_repr_tells_nothing_but_the_table() -> None:
    assert repr(LucentSecrets(Session())) == "<LucentSecrets of lucent_secrets>"
    assert repr(AsyncLucentSecrets(AsyncSession())) == "<AsyncLucentSecrets of lucent_secrets>"


@pytest.mark.parametrize("given", ["key", b"k" * 32, {"v1": b"k" * 32}])
def test_keyring_of_another_kind_is_refused_without_repeating_it(given: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"not {type(given).__name__}$"):
        LucentSecrets(Session(), keyring=given)


def test_coroutine_function_as_handler_is_refused() -> None:
    async def handler(access: SecretAccess, session: Session) -> None: ...

    for make in (
        lambda: LucentSecrets(Session(), on_access=handler),  # type: ignore[arg-type]
        lambda: AsyncLucentSecrets(AsyncSession(), on_access=handler),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigurationError, match="plain function"):
            make()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s.get(7), "not int"),
        (lambda s: s.get(("tenant", "t1", "stripe", "apiKey")), "not tuple"),
        (lambda s: s.set("tenant:t1:stripe", 1), "has 3 parts"),
        (lambda s: s.set_many({KEY: 1, SecretKey.parse(KEY): 2}), "duplicate key"),
        (lambda s: s.get_many(KEY), "several keys are expected"),
        (lambda s: s.rotate_many(SecretKey.parse(KEY)), "several keys are expected"),
        (lambda s: s.copy(KEY, KEY), "the same key"),
        (lambda s: s.move(KEY, KEY), "the same key"),
        (lambda s: s.list(name="apiKey"), "every part before it: scope, owner_id, provider"),
        (lambda s: s.list(scope="tenant", provider="stripe"), "before it: scope, owner_id"),
        (lambda s: s.list(owner_id="t1"), "every part before it: scope"),
        (lambda s: s.list(scope=""), "scope of a secret key is empty"),
        (lambda s: s.list(scope="tenant", owner_id=True), "owner_id of a secret key is of type"),
        (lambda s: s.list(after="tenant"), "has 1 part"),
        (lambda s: s.count(provider="stripe"), "every part before it: scope, owner_id"),
        (lambda s: s.delete_many(scope="tenant", owner_id=""), "owner_id of a secret key is empty"),
        (lambda s: s.delete_many(scope="tenant", owner_id=None), "owner_id"),
        (lambda s: s.delete(KEY, expected="no token"), "the token of a SecretInfo"),
        (lambda s: s.delete(KEY, expected=None), "the token of a SecretInfo"),
    ],
)
def test_bad_arguments_are_refused_before_any_statement(
    call: Callable[[LucentSecrets], Any], message: str
) -> None:
    # The session has no engine, so a statement would raise another error.
    with pytest.raises(InvalidKeyError, match=message):
        call(LucentSecrets(Session()))


def test_dialect_without_an_upsert_is_named() -> None:
    engine: Any = create_mock_engine("mssql+pyodbc://", lambda *_: None)
    with pytest.raises(UnsupportedOperationError, match="dialect 'mssql'"):
        LucentSecrets(Session(bind=engine)).set(KEY, 1)


@pytest.mark.parametrize("stored", [b"", b"v1", b'{"token": "plain text"}', b"v1:\x01" + b"x" * 15])
def test_unsealed_or_cut_bytes_have_no_token(stored: bytes) -> None:
    assert _token(stored) is None


def test_metadata_says_nothing_about_the_value() -> None:
    engine = create_engine("sqlite://")
    with engine.connect() as connection, Session(connection) as session:
        from sqlalchemy_lucent import LucentBase

        LucentBase.metadata.create_all(connection)
        secrets = LucentSecrets(session)
        secrets.set(KEY, {"token": "hunter2"})
        (info,) = secrets.list()
        assert isinstance(info, SecretInfo)
        assert "hunter2" not in repr(info)
    engine.dispose()


@pytest.mark.parametrize("session", [None, object(), "sqlite://"])
def test_what_is_no_session_is_refused_at_once(session: Any) -> None:
    with pytest.raises(ConfigurationError, match="takes a Session"):
        LucentSecrets(session)
    with pytest.raises(ConfigurationError, match="takes an AsyncSession"):
        AsyncLucentSecrets(session)


def test_the_repositories_name_each_other_for_the_wrong_session() -> None:
    with Session() as session, pytest.raises(ConfigurationError, match="not Session"):
        AsyncLucentSecrets(session)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="AsyncLucentSecrets takes it"):
        LucentSecrets(AsyncSession())  # type: ignore[arg-type]


class Base(DeclarativeBase): ...


class Own(LucentSecretMixin, Base):
    __tablename__ = "own_secrets"


class NotMapped(Own):
    __abstract__ = True


class Other(Base):
    __tablename__ = "others"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.mark.parametrize(
    "model", [LucentSecretMixin, NotMapped, Own(), Other, dict, None, "own_secrets"]
)
def test_what_is_no_mapped_class_is_refused_at_once(model: Any) -> None:
    with Session() as session, pytest.raises(ConfigurationError, match="model= takes a mapped"):
        LucentSecrets(session, model=model)
