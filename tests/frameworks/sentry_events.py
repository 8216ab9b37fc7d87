"""Opens values, fails, and prints the events that Sentry's SDK would send, as JSON.

A program of its own, because the SDK changes the process that it is started in.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import sentry_sdk
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_lucent import EncryptedJSON, Keyring, generate_master_key, set_default_keyring

EVENTS: dict[str, list[Any]] = {}
CASE = ""


class Local(Transport):
    def capture_envelope(self, envelope: Envelope) -> None:
        EVENTS.setdefault(CASE, []).extend(item.payload.json for item in envelope.items)


class Base(DeclarativeBase):
    pass


class Service(Base):
    __tablename__ = "services"

    kind: Mapped[str] = mapped_column(primary_key=True)
    plain: Mapped[Any] = mapped_column(EncryptedJSON)
    mutable: Mapped[Any] = mapped_column(EncryptedJSON.mutable())


def report() -> None:
    sentry_sdk.capture_exception()


def fail(value: Any, *more: Any, **named: Any) -> None:
    inside, beside = {"value": value}, [(value, more)]
    copies = set(map(repr, (inside, beside, named)))
    raise LookupError(len(copies))


def main() -> None:
    global CASE
    values = json.load(sys.stdin)  # nothing of them is in the lines of source that are sent
    set_default_keyring(Keyring({"v1": generate_master_key()}))
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all(
            Service(kind=kind, plain=value, mutable=value) for kind, value in values.items()
        )
        session.commit()
    del values
    sentry_sdk.init("https://key@localhost/1", transport=Local())
    logger = logging.getLogger("app")
    with Session(engine) as session:
        rows = session.execute(select(Service.plain, Service.mutable)).all()
        for service in session.scalars(select(Service)):
            for value in (service.plain, service.mutable):
                CASE = "locals"
                try:
                    fail(value, service, rows, named=value)
                except LookupError:
                    report()
                CASE = "breadcrumbs"
                sentry_sdk.add_breadcrumb(message="opened", data={"value": value, "all": [value]})
                logger.warning("opened %r", value, extra={"value": value})
                sentry_sdk.set_context("values", {"value": value})
                sentry_sdk.set_extra("value", value)
                sentry_sdk.capture_message("done")
                sentry_sdk.get_isolation_scope().clear()
                CASE = "logged by %s"
                logger.error("opened %s", value)
                sentry_sdk.get_isolation_scope().clear()
    engine.dispose()
    sentry_sdk.flush()
    json.dump(EVENTS, sys.stdout)


if __name__ == "__main__":
    main()
