"""What the workers of an executor import: engines and keyrings, from their own environment.

The URL is in a file, so that workers may be started before it is known.
"""

from __future__ import annotations

import importlib
import os
import threading
from pathlib import Path

from sqlalchemy import Engine, NullPool, create_engine, event

from sqlalchemy_lucent import Keyring
from tests.integration.workers import keys

URL_FILE = "LUCENT_TEST_URL_FILE"
NAME = "lucent range"


def connect() -> Engine:
    return create_engine(Path(os.environ[URL_FILE]).read_text(), poolclass=NullPool)


def connect_by_name() -> Engine:
    """Connect to PostgreSQL under a name that the server shows."""
    url = Path(os.environ[URL_FILE]).read_text()
    return create_engine(url, poolclass=NullPool, connect_args={"application_name": NAME})


def connect_as_tenant() -> Engine:
    """Connect to PostgreSQL so that tables are looked for in the schema ``tenant``."""
    url = Path(os.environ[URL_FILE]).read_text()
    arguments = {"options": "-csearch_path=tenant"}
    return create_engine(url, poolclass=NullPool, connect_args=arguments)


def connect_to_nothing() -> Engine:
    return create_engine("postgresql+psycopg://postgres@127.0.0.1:1/nothing")


def connect_to_another_kind() -> Engine:
    return create_engine("sqlite://")


def connect_without_driver() -> Engine:
    def create() -> object:
        return importlib.import_module("no_driver")

    return create_engine("postgresql+psycopg://", creator=create)


def connect_for_reading() -> Engine:
    """Connect to PostgreSQL or MySQL so that nothing may be written."""
    engine = connect()

    @event.listens_for(engine, "connect")
    def forbid(connection: object, _record: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute(
            "SET default_transaction_read_only = on"
            if engine.dialect.name == "postgresql"
            else "SET SESSION TRANSACTION READ ONLY"
        )
        cursor.close()
        connection.commit()  # type: ignore[attr-defined]

    return engine


def fail() -> Engine:
    raise OSError("secret words")


def promoted() -> Keyring:
    return Keyring.from_env({"LUCENT_SECRETS_KEYS": keys("v2")})


def promoted_for_the_caller_only() -> Keyring:
    if threading.current_thread() is threading.main_thread():
        return promoted()
    return Keyring.from_env({})
