"""``LucentSecret``, the model of table ``lucent_secrets``, and the mixin for a table of your own.

::

    @with_lifecycle                             # if its secrets expire or keep their versions
    class Secret(LucentSecretMixin, Base):      # in your own metadata, under your own name
        __tablename__ = "app_secrets"

Two tables beside it have what only some stores use, so that a store that does not use it neither
reads nor needs them: the versions that are kept, and the state of each secret (its numbers, when it
expires, who renews it, when it is purged).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeVar, cast

from sqlalchemy import (
    Column,
    Computed,
    DateTime,
    Integer,
    MetaData,
    String,
    Table,
    inspect,
    literal_column,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    declared_attr,
    mapped_column,
    validates,
)
from sqlalchemy.types import TypeDecorator

from ._envelope import MAX_VERSION_LENGTH
from ._sql import is_mysql, key_version
from .binding import is_pydantic, row_bound
from .exceptions import ConfigurationError, SerializationError
from .secret_key import KEY_PART_NAMES, MAX_PART_LENGTH, SecretKey, check_part
from .types import EncryptedJSON

_Model = TypeVar("_Model", bound="type[LucentSecretMixin]")


_VERSIONS_OF: Final = "lucent_versions_of"
"""The key in :attr:`Table.info` that marks a table of versions."""


def byte_wise_string(length: int) -> String:
    """Return a string type that every database compares and sorts byte for byte.

    By default, MySQL takes ``apiKey`` and ``apikey`` for one key, and PostgreSQL sorts by the
    server's locale.
    """
    return (
        String(length)
        .with_variant(String(length, collation="C"), "postgresql")
        .with_variant(String(length, collation="utf8mb4_bin"), "mysql", "mariadb")
    )


class UTCDateTime(TypeDecorator[datetime]):
    """Timezone-aware datetimes in UTC, in and out, to the microsecond, on every database."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        """DATETIME(6) on MySQL and MariaDB, whose DATETIME drops the fraction."""
        if is_mysql(dialect):
            from sqlalchemy.dialects.mysql import DATETIME  # with that database only

            return dialect.type_descriptor(DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to UTC; drop the time zone where the database cannot keep one."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise SerializationError(
                "a datetime without a time zone is ambiguous; use datetime.now(UTC) or "
                "datetime(…, tzinfo=UTC)"
            )
        if value.tzinfo is not UTC:
            value = value.astimezone(UTC)
        return value if dialect.name == "postgresql" else value.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the value in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def key_version_type() -> String:
    """Return the type of a generated ``key_version`` column."""
    return String(MAX_VERSION_LENGTH).with_variant(
        String(MAX_VERSION_LENGTH, collation="ascii_bin"), "mysql", "mariadb"
    )


def computed_key_version(column_name: str) -> Computed:
    """Return the expression that computes a column of key versions from sealed `column_name`.

    The database computes it at each write, so the two columns cannot disagree.
    """
    return Computed(key_version(literal_column(column_name)), persisted=True)


def secrets_table(metadata: MetaData, name: str, *, schema: str | None = None) -> Table:
    """Return the table that :class:`LucentSecretMixin` maps, for migrations."""
    table: Any = LucentSecret.__table__
    return cast("Table", table.to_metadata(metadata, schema=schema, name=name))


def utc_now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


class LucentSecretMixin:
    """The columns of a table of scoped secrets.

    The four parts of the :class:`SecretKey` are the primary key, and the payload is bound to them.
    The database computes ``key_version`` from the payload, so the two cannot disagree.
    """

    scope: Mapped[str] = mapped_column(byte_wise_string(MAX_PART_LENGTH), primary_key=True)
    owner_id: Mapped[str] = mapped_column(byte_wise_string(MAX_PART_LENGTH), primary_key=True)
    provider: Mapped[str] = mapped_column(byte_wise_string(MAX_PART_LENGTH), primary_key=True)
    name: Mapped[str] = mapped_column(byte_wise_string(MAX_PART_LENGTH), primary_key=True)
    payload: Mapped[Any] = row_bound(*KEY_PART_NAMES, nullable=False)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, default=utc_now, sort_order=2)
    updated_at: Mapped[datetime] = mapped_column(
        UTCDateTime, default=utc_now, onupdate=utc_now, sort_order=2
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse bases that would turn these columns into fields."""
        kind = "a dataclass" if issubclass(cls, MappedAsDataclass) else "a pydantic model"
        if kind == "a dataclass" or is_pydantic(cls):
            raise ConfigurationError(
                f"LucentSecretMixin does not mix with {kind}, which would turn its columns into "
                "fields. Give the table a base of its own in the same metadata: "
                "class SecretsBase(DeclarativeBase): metadata = Base.metadata"
            )
        super().__init_subclass__(**kwargs)

    @declared_attr
    def key_version(cls) -> Mapped[str | None]:  # noqa: N805
        """The version of the key that sealed the payload."""
        return mapped_column(
            key_version_type(), computed_key_version("payload"), index=True, sort_order=1
        )

    @validates(*KEY_PART_NAMES)
    def _check_part(self, part_name: str, part: object) -> str:
        # The model must not accept a key that the repository refuses.
        return check_part(part_name, part)

    @property
    def key(self) -> SecretKey:
        """The scoped key of this secret."""
        return SecretKey(self.scope, self.owner_id, self.provider, self.name)

    def __repr__(self) -> str:
        # Printing an expired object must not query the database.
        identity = inspect(self).identity or (None,) * len(KEY_PART_NAMES)
        parts = map(vars(self).get, KEY_PART_NAMES, identity)
        return f"<{type(self).__name__} {':'.join(map(str, parts))}>"


class LifecycleTables(NamedTuple):
    """The tables beside a table of secrets."""

    versions: Table
    states: Table


def with_lifecycle(model: _Model) -> _Model:
    """Add the tables of versions and states to the metadata of a mapped class; return the class.

    A decorator. For the table ``app_secrets`` they are ``app_secret_versions`` and
    ``app_secret_states``. :class:`LucentSecret` has them already.

    :raises ConfigurationError: `model` is no mapped class made with :class:`LucentSecretMixin`.
    """
    given: object = model
    mapper = inspect(model, raiseerr=False)
    if mapper is None or not (isinstance(given, type) and issubclass(given, LucentSecretMixin)):
        name = getattr(model, "__name__", type(model).__name__)
        raise ConfigurationError(
            f"with_lifecycle() takes a mapped class made with LucentSecretMixin, not {name}"
        )
    table: Any = mapper.local_table
    if lifecycle_tables(table) is None:
        _add_lifecycle_tables(table)
    return model


def lifecycle_tables(table: Table) -> LifecycleTables | None:
    """Return the tables beside the table of secrets `table`, if its metadata has them."""
    versions, states = (
        table.metadata.tables.get(f"{table.schema}.{name}" if table.schema else name)
        for name in _lifecycle_names(table.name)
    )
    if versions is None or states is None or not is_versions_table(versions):
        return None  # an application may have tables of such names
    return LifecycleTables(versions, states)


def is_versions_table(table: Table) -> bool:
    """Say whether `table` has the versions of a table of secrets. It may not be there yet."""
    return _VERSIONS_OF in table.info


def upgrade_tables(metadata: MetaData, name: str, *, schema: str | None = None) -> LifecycleTables:
    """Return the tables beside the table of secrets `name`, for migrations."""
    return _add_lifecycle_tables(secrets_table(metadata, name, schema=schema))


def _lifecycle_names(name: str) -> tuple[str, str]:
    one = name.removesuffix("s")
    return f"{one}_versions", f"{one}_states"


def _version_context(context: str) -> str:
    """Return the context of versions for one that the secrets' payload was given."""
    name, dot, column = context.rpartition(".")
    return f"{_lifecycle_names(name)[0]}.{column}" if dot else f"{context}.versions"


def _add_lifecycle_tables(table: Table) -> LifecycleTables:
    versions_name, states_name = _lifecycle_names(table.name)
    payload: Any = table.c.payload.type
    context = payload.explicit_context
    versions = Table(
        versions_name,
        table.metadata,
        *_key_part_columns(),
        # Bound to the number as well, so that an old value put in the place of a newer one does not
        # open.
        Column("number", Integer, primary_key=True, autoincrement=False),
        Column(
            "payload",
            EncryptedJSON(
                context=None if context is None else _version_context(context),
                accept_contexts=map(_version_context, payload.accept_contexts),
                bound_to=(*KEY_PART_NAMES, "number"),
                redact=payload.redact,
                schema=payload.schema,
                create_constraint=payload.create_constraint,
            ),
            nullable=False,
        ),
        Column("key_version", key_version_type(), computed_key_version("payload"), index=True),
        # "staged", "pending" or "deleted"; NULL for a version that was current.
        Column("stage", String(16)),
        Column("expires_at", UTCDateTime),
        Column("created_at", UTCDateTime, nullable=False),  # when the value was stored
        schema=table.schema,
        info={_VERSIONS_OF: table.name},
    )
    states = Table(
        states_name,
        table.metadata,
        *_key_part_columns(),
        Column("number", Integer, nullable=False),  # of the current value
        Column("last_number", Integer, nullable=False),  # the highest that was given to a value
        # The `updated_at` of the secret that this row describes. If the secret has another one,
        # somebody stored a value without the lifecycle, and this row says nothing about it.
        Column("written_at", UTCDateTime),
        Column("expires_at", UTCDateTime, index=True),
        Column("needs_reauthorization_at", UTCDateTime),
        Column("lease_number", Integer, nullable=False),  # of renewals; a claim adds one
        Column("lease_until", UTCDateTime),  # not NULL while a renewal is under way, or broke off
        Column("created_at", UTCDateTime),  # of a deleted secret
        Column("deleted_at", UTCDateTime),
        Column("purge_at", UTCDateTime, index=True),
        schema=table.schema,
    )
    return LifecycleTables(versions, states)


def _key_part_columns() -> list[Column[str]]:
    return [
        Column(name, byte_wise_string(MAX_PART_LENGTH), primary_key=True) for name in KEY_PART_NAMES
    ]


class LucentBase(DeclarativeBase):
    """The declarative base of :class:`LucentSecret`, with a MetaData of its own."""

    metadata = MetaData()


@with_lifecycle
class LucentSecret(LucentSecretMixin, LucentBase):
    """A secret in table ``lucent_secrets``."""

    __tablename__: Final = "lucent_secrets"  # type: ignore[misc]
