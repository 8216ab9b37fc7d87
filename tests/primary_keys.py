"""Primary keys of every type, for what goes through a table in the order of its primary key."""

from __future__ import annotations

import datetime as dt
import enum
import ipaddress
import uuid
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import sqlalchemy
from sqlalchemy import (
    BigInteger,
    Column,
    Date,
    DateTime,
    Enum,
    Integer,
    Interval,
    LargeBinary,
    Numeric,
    String,
    Text,
    Time,
    Uuid,
)
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.types import TypeEngine

ALL = ("sqlite", "postgresql", "mysql")


class Colour(enum.Enum):
    RED = "r"
    GREEN = "g"
    BLUE = "b"


class Keys(NamedTuple):
    """The types of a primary key's columns, some keys, and the databases that have these types."""

    types: Sequence[TypeEngine[Any]]
    values: Sequence[tuple[Any, ...]]
    kinds: Sequence[str] = ALL
    extension: str | None = None
    """What PostgreSQL needs for it."""

    def columns(self) -> list[Column[Any]]:
        """Return columns ``k0``, ``k1`` …, the primary key."""
        return [
            Column(f"k{n}", type_, primary_key=True, autoincrement=False)
            for n, type_ in enumerate(self.types)
        ]

    def row(self, key: tuple[Any, ...]) -> dict[str, Any]:
        """Return the parameters of a key."""
        return {f"k{n}": part for n, part in enumerate(key)}


def single(type_: TypeEngine[Any], *values: Any, kinds: Sequence[str] = ALL, **kw: Any) -> Keys:
    return Keys([type_], [(value,) for value in values], kinds, **kw)


MOMENT = dt.datetime(2026, 1, 1, tzinfo=dt.UTC).replace(tzinfo=None)
FRACTIONS = [MOMENT + dt.timedelta(microseconds=n) for n in (0, 1, 250_000, 999_999)]
BYTES = LargeBinary(20).with_variant(mysql.VARBINARY(20), "mysql", "mariadb")
ODD_TEXT = ("", "A", "a b", "ß'\"\\%s:x", "\U0001f511", "z" * 50)

KEYS: dict[str, Keys] = {
    "integer": single(Integer(), -3, 0, 5, 2**31 - 1),
    "text": single(String(50), *ODD_TEXT),
    "uuid": single(Uuid(), *(uuid.UUID(int=n) for n in (0, 7, 2**127))),
    "bytes": single(BYTES, b"\x00", b"a'\\", b"\xff" * 9),
    "decimal": single(Numeric(10, 3), Decimal("-1.500"), Decimal("2.250"), Decimal("1234.125")),
    "moment": single(DateTime(), *(MOMENT + dt.timedelta(days=n) for n in range(3))),
    "enum": single(Enum(Colour, name="colour"), *Colour),
    "composite": Keys(
        [String(20), Integer(), Uuid()],
        [(s, n, uuid.UUID(int=u)) for s in ("a", "b") for n in (1, 2) for u in (1, 2)],
    ),
}
"""Of types that every database has."""

SPECIAL_KEYS: dict[str, Keys] = {
    "bigint": single(BigInteger(), -(2**63), -1, 0, 2**63 - 1),
    "date": single(Date(), *(dt.date(2026, 1, n) for n in (1, 2, 3))),
    "time": single(Time(), dt.time(0), dt.time(12, 30), dt.time(23, 59, 59)),
    # Declared in another order than that of its texts.
    "enum-and-integer": Keys(
        [Enum("z", "m", "a", name="kind"), Integer()],
        [(k, n) for k in ("z", "m", "a") for n in (1, 2, 3)],
    ),
    "text-with-nul": single(String(50), "a\0", "a\0b", "a", kinds=("sqlite", "mysql")),
    # SQLite
    "exact-decimal": single(
        Text(), "0.1", "123456789012345678901234567890.5", "1e3", kinds=("sqlite",)
    ),
    # PostgreSQL
    "pg-char": single(postgresql.CHAR(5), "a    ", "ab   ", "abcde", kinds=("postgresql",)),
    "pg-citext": single(
        postgresql.CITEXT(), "a", "B", "c", "D", kinds=("postgresql",), extension="citext"
    ),
    "pg-array": single(
        postgresql.ARRAY(Integer, as_tuple=True), (), (1,), (1, 2), (3, None), kinds=("postgresql",)
    ),
    "pg-inet": single(
        postgresql.INET(),
        *(ipaddress.ip_address(a) for a in ("::1", "10.0.0.1", "9.0.0.1")),
        kinds=("postgresql",),
    ),
    "pg-range": single(
        postgresql.INT4RANGE(),
        *(postgresql.Range(n, n + 5) for n in (-3, 1, 10)),
        kinds=("postgresql",),
    ),
    "pg-timestamptz": single(
        DateTime(timezone=True),
        *(m.replace(tzinfo=dt.UTC) for m in FRACTIONS),
        kinds=("postgresql",),
    ),
    "pg-interval": single(
        Interval(),
        *(dt.timedelta(days=n, microseconds=1) for n in (-1, 0, 40)),
        kinds=("postgresql",),
    ),
    "pg-numeric": single(
        Numeric(),
        *(Decimal(n) for n in ("-1e30", "1.10", "1.1000001", "1e30")),
        kinds=("postgresql",),
    ),
    # SQLAlchemy 2.0 passes a bit string as text, which PostgreSQL does not compare with bits.
    "pg-bit": single(
        postgresql.BIT(4),
        *("0001", "1000", "1111"),
        kinds=() if sqlalchemy.__version__.startswith("2.0.") else ("postgresql",),
    ),
    "pg-macaddr": single(
        postgresql.MACADDR(), "08:00:2b:01:02:03", "08:00:2b:01:02:04", kinds=("postgresql",)
    ),
    "pg-double": single(postgresql.DOUBLE_PRECISION(), -0.1, 0.1, 1e300, kinds=("postgresql",)),
    # MySQL and MariaDB
    "my-set": single(
        mysql.SET("z", "m", "a"), {"z"}, {"m"}, {"z", "m"}, {"z", "a"}, {"a"}, kinds=("mysql",)
    ),
    "my-bit": single(mysql.BIT(10), 0, 1, 2, 1023, kinds=("mysql",)),
    "my-year": single(mysql.YEAR(), 1970, 2026, 2155, kinds=("mysql",)),
    "my-unsigned": single(mysql.BIGINT(unsigned=True), 0, 2**63, 2**64 - 1, kinds=("mysql",)),
    "my-binary": single(
        mysql.BINARY(4), *(b.ljust(4, b"\0") for b in (b"", b"a'\\", b"\xff")), kinds=("mysql",)
    ),
    "my-fractions": single(mysql.DATETIME(fsp=6), *FRACTIONS, kinds=("mysql",)),
    "my-timestamp": single(mysql.TIMESTAMP(fsp=3), *FRACTIONS[2:3], MOMENT, kinds=("mysql",)),
    "my-time": single(mysql.TIME(fsp=6), *(m.time() for m in FRACTIONS), kinds=("mysql",)),
    "my-char": single(mysql.CHAR(5), "a", "ab", "abcde", kinds=("mysql",)),
    "my-case-insensitive": single(
        mysql.VARCHAR(20, collation="utf8mb4_general_ci"), "a", "B", "c", "D", "é", kinds=("mysql",)
    ),
    "my-latin1": single(
        mysql.VARCHAR(20, charset="latin1", collation="latin1_swedish_ci"),
        "a",
        "é",
        "Z",
        kinds=("mysql",),
    ),
    "my-enum-latin1": Keys(
        [mysql.ENUM("z", "é", "a", charset="latin1"), mysql.SMALLINT()],
        [(k, n) for k in ("z", "é", "a") for n in (-1, 0, 1)],
        ("mysql",),
    ),
    "my-double": single(mysql.DOUBLE(asdecimal=False), -0.1, 0.1, 1e300, kinds=("mysql",)),
    "my-decimal": single(
        mysql.DECIMAL(30, 10), *map(Decimal, ("-1.1", "1.1", "1e19")), kinds=("mysql",)
    ),
}
"""Of types that some databases have, or that are less usual."""

CASES = [(kind, name) for name, keys in {**KEYS, **SPECIAL_KEYS}.items() for kind in keys.kinds]
"""Each database with each key that it has, by name."""


def keys_of(name: str) -> Keys:
    return {**KEYS, **SPECIAL_KEYS}[name]
