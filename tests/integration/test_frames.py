"""No frame of the package holds a key, or a value that it refuses, when it raises an error.

An error reporter sends the local variables of every frame. ``CASES`` raises each class of error.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_lucent import (
    Bound,
    EncryptedJSON,
    KeyRegistry,
    Keyring,
    KeySource,
    LucentBase,
    LucentError,
    LucentSecret,
    LucentSecrets,
    NeedsReauthorizationError,
    RenewalAttempt,
    Renewals,
    exceptions,
    retire_check,
    rotate,
    row_bound,
    set_default_keyring,
    verify,
)
from sqlalchemy_lucent.migrations import encrypt_column
from sqlalchemy_lucent.migrations.fence import Fence
from sqlalchemy_lucent.models import lifecycle_tables
from sqlalchemy_lucent.rotation.targets import resolve_targets
from tests.conftest import KEY_1
from tests.frames import frames_of_ours, texts_in_frames

MARKER = "PLAINTEXT-MARKER-51c7"
KEY = "a" * 15 + "KEY-MARKER-77" + "b" * 15
BAD: dict[str, Any] = {"token": MARKER, "more": [{MARKER: float("nan")}]}
SECRET = "user:u1:stripe:apiKey"


@dataclass
class Typed:
    number: int


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(50))
    data: Mapped[Any] = mapped_column(EncryptedJSON(create_constraint=False), nullable=True)
    typed: Mapped[Any] = mapped_column(EncryptedJSON(schema=Typed), nullable=True)
    bound: Mapped[Any] = row_bound("name", nullable=True)


accounts: Any = Account.__table__


@pytest.fixture
def session() -> Iterator[Session]:
    engine = create_engine("sqlite://", poolclass=sa.StaticPool)
    for metadata in (Base.metadata, LucentBase.metadata):
        metadata.create_all(engine)
    with Session(engine) as session:
        LucentSecrets(session).set(SECRET, {"token": MARKER})
        session.add(Account(id=1, name="a", data={"token": MARKER}, bound={"token": MARKER}))
        session.commit()
        yield session
    engine.dispose()


def add(**values: Any) -> Callable[[Session], object]:
    def case(session: Session) -> object:
        session.add(Account(id=2, name="b", **values))
        session.flush()
        return None

    return case


def stored(content: bytes) -> Callable[[Session], object]:
    def case(session: Session) -> object:
        session.execute(sa.text("UPDATE accounts SET data = :data"), {"data": content})
        return session.get_one(Account, 1, populate_existing=True).data

    return case


def other_key(session: Session) -> object:
    set_default_keyring(Keyring({"v1": KEY}))
    return session.get_one(Account, 1, populate_existing=True).data


def other_version(session: Session) -> object:
    set_default_keyring(Keyring({"v9": KEY}))
    return session.get_one(Account, 1, populate_existing=True).data


def retired(session: Session) -> object:
    set_default_keyring(Keyring({"v1": KEY_1, "v2": KEY}, primary="v2", oldest="v2"))
    return session.get_one(Account, 1, populate_existing=True).data


def key_manager_away(session: Session) -> object:
    def load() -> Keyring:
        raise OSError(f"{MARKER} {KEY}")

    set_default_keyring(KeySource(load, refresh=None))
    return add(data={"token": 1})(session)


def tampered(session: Session) -> object:
    session.execute(sa.text("UPDATE accounts SET data = substr(data, 1, 30)"))
    return session.get_one(Account, 1, populate_existing=True).data


def misfit(session: Session) -> object:
    session.execute(accounts.update().values(typed=sa.null()))
    return LucentSecrets(session).require(SECRET, as_=Typed)


def not_bound(session: Session) -> object:
    return session.execute(accounts.insert(), [{"id": 3, "name": "c", "bound": {"t": MARKER}}])


def around_the_type(session: Session) -> object:
    return session.execute(accounts.update().values(data=sa.literal(MARKER, sa.JSON)))


def pickled(_: Session) -> object:
    return pickle.dumps(Bound({"token": MARKER}, row=("a",)))


def conflict(session: Session) -> object:
    return LucentSecrets(session).set(SECRET, {"token": MARKER}, expected=None)


def renewed(
    answer: Callable[[Any, RenewalAttempt], Any], *, is_leased: bool = False
) -> Callable[[Session], object]:
    """Ask for an expired secret, which another process may be renewing."""

    def case(session: Session) -> object:
        now = datetime.now(UTC)
        secrets = LucentSecrets(session)
        secrets.set(SECRET, {"token": MARKER}, expires_at=now + timedelta(hours=1))
        tables = lifecycle_tables(LucentSecret.__table__)  # type: ignore[arg-type]
        assert tables is not None
        until = now + timedelta(hours=1) if is_leased else None
        changed = {"expires_at": now - timedelta(hours=1), "lease_until": until}
        session.execute(tables.states.update().values(changed))
        session.commit()
        session.close()
        engine: Engine = session.get_bind()  # type: ignore[assignment]
        return Renewals(engine).fresh(SECRET, answer, wait=0)

    return case


def grant_is_gone(value: Any, attempt: RenewalAttempt) -> Any:
    raise NeedsReauthorizationError(f"the grant behind {attempt.key} is gone")


def conversion(session: Session) -> object:
    engine: Engine = session.get_bind()  # type: ignore[assignment]
    table = Table("users", MetaData(), Column("id", Integer, primary_key=True))
    table.append_column(Column("data", sa.Text))
    table.create(session.connection())
    session.execute(table.insert(), {"data": f'{{"token": "{MARKER}", "n": NaN}}'})
    session.commit()
    session.close()
    with engine.connect() as connection:
        operations = Operations(MigrationContext.configure(connection))
        encrypt_column("users", "data", existing_type=sa.Text(), operations=operations)
    return None


def alone(call: Callable[[Engine], object]) -> Callable[[Session], object]:
    def case(session: Session) -> object:
        session.close()
        return call(session.get_bind())  # type: ignore[arg-type]

    return case


def key_as_a_registered_version(engine: Engine) -> object:
    KeyRegistry.metadata.create_all(engine)
    registry = KeyRegistry(engine, targets=Base)
    registry.register()
    return registry.retire(KEY)


CASES: dict[str, tuple[str, Callable[[Session], object]]] = {
    "orm": ("SerializationError", add(data=BAD)),
    "typed": ("SerializationError", add(typed=MARKER)),
    "row-bound": ("SerializationError", add(bound=BAD)),
    "core": ("SerializationError", lambda s: s.execute(accounts.update().values(data=BAD))),
    "bulk": (
        "SerializationError",
        lambda s: s.execute(
            accounts.insert(), [{"id": n, "name": "n", "data": BAD} for n in (4, 5)]
        ),
    ),
    "set": ("SerializationError", lambda s: LucentSecrets(s).set(SECRET, BAD)),
    "set_many": ("SerializationError", lambda s: LucentSecrets(s).set_many({SECRET: BAD})),
    "a secret key": ("InvalidKeyError", lambda s: LucentSecrets(s).set(f"{KEY}::", {"t": MARKER})),
    "conflict": ("ConflictError", conflict),
    "not found": ("SecretNotFoundError", lambda s: LucentSecrets(s).require("user:u2:a:b")),
    "not sealed": ("NotSealedError", stored(f'{{"token": "{MARKER}"}}'.encode())),
    "tampered": ("TamperedError", tampered),
    "other key": ("WrongKeyError", other_key),
    "retired": ("RetiredKeyError", retired),
    "a key as the oldest version": (
        "ConfigurationError",
        lambda _: Keyring({"v1": KEY_1}, oldest=KEY),
    ),
    "a key as the version of a fence": (
        "InvalidKeyError",
        alone(lambda e: Fence(resolve_targets(accounts, e)[0], f"{KEY}:")),
    ),
    "a key manager that fails": ("ConfigurationError", key_manager_away),
    "other version": ("UnknownKeyVersionError", other_version),
    "misfit": ("SchemaMismatchError", misfit),
    "not bound": ("ConfigurationError", not_bound),
    "around the type": ("UnsupportedOperationError", around_the_type),
    "pickled": ("PicklingRefusedError", pickled),
    "a key as the repository's": (
        "ConfigurationError",
        lambda s: LucentSecrets(s, keyring=KEY),  # type: ignore[arg-type]
    ),
    "a key as a rotation's": (
        "RotationError",
        alone(lambda e: rotate(e, Base, keyring=KEY)),  # type: ignore[arg-type]
    ),
    "a key as a verification's": (
        "RotationError",
        alone(lambda e: verify(e, Base, keyring=KEY)),  # type: ignore[arg-type]
    ),
    "a key as a version": ("RotationError", alone(lambda e: retire_check(e, KEY, Base))),
    "a version in use": ("KeyInUseError", alone(lambda e: retire_check(e, "v1", Base))),
    "a key as a registered version": ("KeyStateError", alone(key_as_a_registered_version)),
    "a key as the registry's": (
        "RotationError",
        alone(lambda e: KeyRegistry(e, keyring=KEY)),  # type: ignore[arg-type]
    ),
    "conversion": ("RotationError", conversion),
    "an answer of no use": ("RenewalError", renewed(lambda value, _: [value])),
    "an answer that cannot be sealed": ("SerializationError", renewed(lambda *_: (BAD, None))),
    "a grant that is gone": ("NeedsReauthorizationError", renewed(grant_is_gone)),
    "a renewal by another": ("RenewalTimeoutError", renewed(lambda *_: None, is_leased=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_no_frame_holds_a_key_or_a_value(case: str, session: Session) -> None:
    name, raising = CASES[case]
    with pytest.raises(LucentError) as caught:
        raising(session)
    assert type(caught.value).__name__ == name
    assert list(frames_of_ours(caught.value)) or case == "pickled"
    markers = (MARKER.encode(), b"KEY-MARKER", KEY_1, KEY_1.hex().encode())
    held = {
        function
        for function, data in texts_in_frames(caught.value)
        if any(marker in data for marker in markers)
    }
    assert held == set()


def test_each_class_of_error_is_raised() -> None:
    concrete = {
        name
        for name, class_ in vars(exceptions).items()
        if isinstance(class_, type) and issubclass(class_, LucentError)
    } - {"LucentError", "DecryptionError"}
    assert {name for name, _ in CASES.values()} == concrete
