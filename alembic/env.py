"""The migration environment of table ``lucent_secrets``.

The database comes from DATABASE_URL, or from ``-x url=…``; a program that runs migrations may pass
a connection or a URL in ``config.attributes`` instead.
"""

from __future__ import annotations

import os

from alembic import context
from sqlalchemy import Connection, create_engine, pool

import sqlalchemy_lucent.migrations as lucent_migrations
from sqlalchemy_lucent import ConfigurationError, LucentBase


def database_url() -> str:
    url = context.get_x_argument(as_dictionary=True).get("url") or context.config.attributes.get(
        "url", os.environ.get("DATABASE_URL")
    )
    if not url:
        raise ConfigurationError("set DATABASE_URL (or pass -x url=…) to the database to migrate")
    return str(url)


def is_ours(name: str | None, type_: str, parent_names: object) -> bool:
    """Leave the other tables of the database alone."""
    return type_ != "table" or name in LucentBase.metadata.tables


def run(connection: Connection | None = None, url: str | None = None) -> None:
    context.configure(
        connection=connection,
        url=url,
        target_metadata=LucentBase.metadata,
        render_item=lucent_migrations.render_item,
        autogenerate_plugins=["alembic.autogenerate.*", "sqlalchemy_lucent.*"],
        include_name=is_ours,
        # A rotation commits as it goes; each revision on its own keeps that apart from the others.
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    run(url=database_url())
elif isinstance(context.config.attributes.get("connection"), Connection):
    run(context.config.attributes["connection"])
else:
    engine = create_engine(database_url(), poolclass=pool.NullPool)
    with engine.connect() as connection:
        run(connection)
