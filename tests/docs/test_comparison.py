"""What ``docs/comparison.md`` says of other libraries for SQLAlchemy, tried on them."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import cryptography.fernet
import pytest
import sqlalchemy as sa
import sqlalchemy_encrypted_field as encrypted_field
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.migration import MigrationContext
from sqlalchemy import Column, Connection, Engine, MetaData, Table, Text, create_engine
from sqlalchemy.types import TypeEngine
from sqlalchemy_encrypted_field.exceptions import SecretDecryptError
from sqlalchemy_utils.types.encrypted.encrypted_type import (
    AesEngine,
    AesGcmEngine,
    FernetEngine,
    InvalidCiphertextError,
    StringEncryptedType,
)

from sqlalchemy_lucent import (
    EncryptedJSON,
    Keyring,
    TamperedError,
    UnknownKeyVersionError,
    UnsupportedOperationError,
    generate_master_key,
    set_default_keyring,
)
from tests.conftest import Databases

from .pages import ROOT

with warnings.catch_warnings():
    # Said by advanced-alchemy, when it is imported on SQLAlchemy 2.1.
    warnings.filterwarnings("ignore", "The declarative_mixin decorator")
    from advanced_alchemy.types.encrypted_string import (
        EncryptedString,
        FernetBackend,
        PGCryptoBackend,
    )

pytestmark = pytest.mark.release

SECRET = "the secret of the tests, which is long enough for two blocks"
KEY = "key of the tests"


def utils_aes(key: Any = KEY) -> TypeEngine[Any]:
    type_: TypeEngine[Any] = StringEncryptedType(Text, key, AesEngine, "pkcs5", length=500)
    return type_


def utils_gcm(key: Any = KEY) -> TypeEngine[Any]:
    type_: TypeEngine[Any] = StringEncryptedType(Text, key, AesGcmEngine, length=500)
    return type_


def utils_fernet(key: Any = KEY) -> TypeEngine[Any]:
    type_: TypeEngine[Any] = StringEncryptedType(Text, key, FernetEngine, length=500)
    return type_


def advanced(key: Any = KEY) -> TypeEngine[Any]:
    return EncryptedString(key=key, backend=FernetBackend)


def field() -> TypeEngine[Any]:
    return encrypted_field.EncryptedText()


def lucent() -> TypeEngine[Any]:
    return EncryptedJSON()


NameOfType = Callable[[], TypeEngine[Any]]
of_this_advanced_alchemy = pytest.mark.skipif(
    tuple(map(int, metadata.version("advanced-alchemy").split(".")[:2])) < (1, 11),
    reason="the page is about advanced-alchemy 1.11 and later, which needs a later SQLAlchemy",
)
ALL = pytest.mark.parametrize(
    "type_", [utils_aes, utils_gcm, utils_fernet, advanced, field, lucent]
)


@pytest.fixture(autouse=True)
def field_keys() -> Iterator[str]:
    keys = base64.b64encode(os.urandom(32)).decode()
    encrypted_field.configure(keys)
    yield keys
    encrypted_field.configure(keys)


@pytest.fixture
def connection() -> Iterator[Connection]:
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def made(connection: Connection, type_: TypeEngine[Any], *values: Any, name: str = "t") -> Table:
    table = Table(name, MetaData(), Column("id", sa.Integer, primary_key=True), Column("v", type_))
    table.create(connection)
    for value in values:
        connection.execute(table.insert().values(v=value))
    return table


def stored(connection: Connection, name: str = "t") -> list[Any]:
    return list(connection.scalars(sa.text(f"SELECT v FROM {name} ORDER BY id")))


def opened(connection: Connection, table: Table) -> list[Any]:
    values = connection.scalars(sa.select(table.c.v).order_by(table.c.id)).all()
    return [v.decrypt() if isinstance(v, encrypted_field.Secret) else v for v in values]


def store(connection: Connection, value: Any, name: str = "t") -> None:
    connection.execute(sa.text(f"UPDATE {name} SET v = :value"), {"value": value})


@ALL
def test_the_value_comes_back(type_: NameOfType, connection: Connection) -> None:
    table = made(connection, type_(), SECRET)
    assert opened(connection, table) == [SECRET]


@ALL
def test_equal_values_look_equal(type_: NameOfType, connection: Connection) -> None:
    made(connection, type_(), SECRET, SECRET)
    assert (len(set(stored(connection))) == 1) is (type_ is utils_aes)


@ALL
def test_a_value_is_found_by_comparing(type_: NameOfType, connection: Connection) -> None:
    table = made(connection, type_(), SECRET)
    if type_ is lucent:
        with pytest.raises(UnsupportedOperationError):
            _ = table.c.v == SECRET
        return
    found = connection.execute(sa.select(table.c.id).where(table.c.v == SECRET)).all()
    assert (len(found) == 1) is (type_ is utils_aes)


@pytest.mark.parametrize(
    ("type_", "error"),
    [
        (utils_gcm, InvalidCiphertextError),
        (utils_fernet, cryptography.fernet.InvalidToken),
        (advanced, cryptography.fernet.InvalidToken),
        (field, SecretDecryptError),
        (lucent, TamperedError),
    ],
)
def test_changed_bytes_are_noticed(
    type_: NameOfType, error: type[Exception], connection: Connection
) -> None:
    table = made(connection, type_(), SECRET)
    (value,) = stored(connection)
    store(connection, changed(value))
    with pytest.raises(error):
        opened(connection, table)


def changed(value: Any) -> Any:
    """Return `value` with a bit of its last byte changed."""
    if isinstance(value, bytes):
        return value[:-1] + bytes([value[-1] ^ 1])
    alphabet = b"-_" if value.startswith("gAAAA") else b"+/"  # of Fernet, and of the others
    return base64.b64encode(changed(base64.b64decode(value, alphabet)), alphabet).decode()


def test_changed_bytes_open_under_aes_engine(connection: Connection) -> None:
    # It does not authenticate: a value may be cut wherever a block happens to end like padding.
    table = made(connection, utils_aes(), "cut after this \x01and nobody knows")
    (value,) = stored(connection)
    store(connection, base64.b64encode(base64.b64decode(value)[:16]).decode())
    assert opened(connection, table) == ["cut after this "]


@ALL
def test_bytes_of_another_row_open(type_: NameOfType, connection: Connection) -> None:
    table = made(connection, type_(), "of row 1", "of row 2")
    store(connection, stored(connection)[1])
    assert opened(connection, table) == ["of row 2", "of row 2"]


@ALL
def test_bytes_of_another_table_open(type_: NameOfType, connection: Connection) -> None:
    made(connection, type_(), "of t")
    table = made(connection, type_(), "of u", name="u")
    store(connection, stored(connection)[0], "u")
    try:
        values = opened(connection, table)
    except (TamperedError, SecretDecryptError):
        values = []
    assert values == ([] if type_ in (field, lucent) else ["of t"])


@pytest.mark.parametrize("type_", [utils_gcm, utils_fernet, advanced])
def test_a_second_key_opens_nothing_of_the_first(
    type_: Callable[[Any], TypeEngine[Any]], connection: Connection
) -> None:
    key = "first"
    table = made(connection, type_(lambda: key), SECRET)
    key = "second"
    with pytest.raises((InvalidCiphertextError, cryptography.fernet.InvalidToken)) as caught:
        opened(connection, table)
    assert str(caught.value) == ""


def test_encrypted_field_opens_what_an_older_key_sealed(
    connection: Connection, field_keys: str
) -> None:
    table = made(connection, field(), SECRET)
    new = base64.b64encode(os.urandom(32)).decode()
    encrypted_field.configure(f"{new},{field_keys}")
    assert opened(connection, table) == [SECRET]
    encrypted_field.configure(new)
    with pytest.raises(SecretDecryptError, match="any configured key"):
        opened(connection, table)


def test_encrypted_field_stores_nothing_that_names_a_key(
    connection: Connection, field_keys: str
) -> None:
    made(connection, field(), SECRET)
    encrypted_field.configure(base64.b64encode(os.urandom(32)).decode())
    table = Table("t", MetaData(), Column("v", field()))
    connection.execute(table.insert().values(v=SECRET))
    first, second = stored(connection)
    # The version of the format is all that they have in common.
    assert first[:1] == second[:1] == b"\x01"
    assert first[1:5] != second[1:5]


def test_encrypted_field_decrypts_only_when_asked(connection: Connection) -> None:
    table = made(connection, field(), SECRET)
    encrypted_field.configure(base64.b64encode(os.urandom(32)).decode())
    assert connection.scalar(sa.select(table.c.v)) is not None


def test_lucent_names_the_key_that_is_missing(connection: Connection) -> None:
    table = made(connection, lucent(), SECRET)
    set_default_keyring(Keyring({"v2": generate_master_key()}))
    with pytest.raises(UnknownKeyVersionError, match="'v1'"):
        opened(connection, table)


@of_this_advanced_alchemy
def test_advanced_alchemy_invents_a_key_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match="random default key"):
        EncryptedString()


def test_utils_fails_where_no_key_is_given(connection: Connection) -> None:
    with pytest.raises(sa.exc.StatementError, match="TypeError"):
        made(connection, utils_fernet(None), SECRET)


def test_encrypted_field_fails_where_no_key_is_configured() -> None:
    program = """if True:
        from sqlalchemy_encrypted_field import EncryptedText, NotConfiguredError
        try:
            EncryptedText().process_bind_param("a secret", None)
        except NotConfiguredError:
            print("refused")
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "refused\n"


def rendered(table: Table, engine: Engine) -> str:
    with engine.connect() as connection:
        operations = produce_migrations(MigrationContext.configure(connection), table.metadata)
        assert operations.upgrade_ops is not None
        return render_python_code(operations.upgrade_ops)


@pytest.mark.parametrize("type_", [utils_aes, advanced, field, lucent])
def test_the_key_is_written_into_generated_migrations(type_: NameOfType) -> None:
    engine = create_engine("sqlite://")
    table = Table("t", MetaData(), Column("id", sa.Integer, primary_key=True), Column("v", type_()))
    assert (KEY in rendered(table, engine)) is (type_ is advanced)
    engine.dispose()


def test_a_key_that_is_a_callable_is_not_written_into_migrations() -> None:
    engine = create_engine("sqlite://")
    assert KEY not in rendered(Table("t", MetaData(), Column("v", advanced(lambda: KEY))), engine)
    engine.dispose()


def test_utils_encrypts_numbers_and_dates_too(connection: Connection) -> None:
    table = made(connection, StringEncryptedType(sa.Integer, KEY, FernetEngine, length=500), 7)
    assert opened(connection, table) == [7]


@pytest.mark.parametrize("backend", [FernetBackend, PGCryptoBackend])
def test_advanced_alchemy_has_the_backends_that_are_named(backend: Any) -> None:
    assert EncryptedString(key=KEY, backend=backend).backend is not None


def test_texts_of_encrypted_field_come_over_with_the_reader_of_the_page() -> None:
    assert "`reader=encrypted_field.Secret.decrypt" in (ROOT / "docs/onboarding.md").read_text()
    column = Table("t", MetaData(), Column("v", field())).c.v
    sealed = column.type.process_bind_param(SECRET, None)  # type: ignore[attr-defined]
    handle = column.type.process_result_value(sealed, None)  # type: ignore[attr-defined]
    assert encrypted_field.Secret.decrypt(handle) == SECRET


# -- pgcrypto --------------------------------------------------------------------------------------


@of_this_advanced_alchemy
def test_pgcrypto_gives_key_and_plaintext_to_the_servers_log(databases: Databases) -> None:
    engine = create_engine(databases.url("postgresql"))
    with engine.connect() as connection:
        available = connection.scalar(
            sa.text("SELECT count(*) FROM pg_available_extensions WHERE name = 'pgcrypto'")
        )
        if not available:
            pytest.skip("this server comes without the extension pgcrypto")
        connection.execute(sa.text("CREATE EXTENSION IF NOT EXISTS pgcrypto"))
        table = made(connection, EncryptedString(key=KEY, backend=PGCryptoBackend), "before")
        sealed = made(connection, lucent(), "before", name="sealed")

        logged: list[str] = []
        driver: Any = connection.connection.driver_connection
        driver.add_notice_handler(
            lambda notice: logged.append(f"{notice.message_primary} {notice.message_detail}")
        )
        connection.execute(sa.text("SET client_min_messages = 'log'"))
        connection.execute(sa.text("SET log_statement = 'all'"))
        connection.execute(table.insert().values(v=SECRET))
        connection.execute(sealed.insert().values(v=SECRET))
        connection.rollback()
    engine.dispose()

    passphrase = base64.urlsafe_b64encode(KEY.encode()).decode()
    (of_pgcrypto,) = (line for line in logged if "pgp_sym_encrypt" in line)
    assert passphrase in of_pgcrypto
    assert SECRET in of_pgcrypto
    (of_lucent,) = (line for line in logged if "INSERT INTO sealed" in line)
    assert SECRET not in of_lucent


# -- the page --------------------------------------------------------------------------------------

ROWS: dict[str, list[Callable[..., None]]] = {
    "values": [test_the_value_comes_back, test_utils_encrypts_numbers_and_dates_too],
    "cipher": [test_advanced_alchemy_has_the_backends_that_are_named],  # the rest is their source's
    "equal values look equal": [test_equal_values_look_equal],
    "found by comparing": [test_a_value_is_found_by_comparing],
    "changed bytes are noticed": [
        test_changed_bytes_are_noticed,
        test_changed_bytes_open_under_aes_engine,
    ],
    "bound to its column": [test_bytes_of_another_table_open],
    "bound to its row": [test_bytes_of_another_row_open],
    "several keys at once": [
        test_a_second_key_opens_nothing_of_the_first,
        test_encrypted_field_opens_what_an_older_key_sealed,
    ],
    "a missing key is": [
        test_a_second_key_opens_nothing_of_the_first,
        test_lucent_names_the_key_that_is_missing,
    ],
    "rows under each key": [test_encrypted_field_stores_nothing_that_names_a_key],
    "re-encryption of rows": [],  # that there is none cannot be tried
    "no key configured": [
        test_utils_fails_where_no_key_is_given,
        test_advanced_alchemy_invents_a_key_and_warns,
        test_encrypted_field_fails_where_no_key_is_configured,
    ],
    "key in generated migrations": [
        test_the_key_is_written_into_generated_migrations,
        test_a_key_that_is_a_callable_is_not_written_into_migrations,
    ],
    "decrypts when a row is loaded": [test_encrypted_field_decrypts_only_when_asked],
}


def test_the_table_of_the_page_has_these_rows() -> None:
    page = (ROOT / "docs/comparison.md").read_text("utf-8")
    table = page.partition("## Libraries for SQLAlchemy")[2].partition("Take another one")[0]
    labels = re.findall(r"^\| (\w.*?) \|", table, re.MULTILINE)
    assert labels == list(ROWS)
