"""The comparisons of Core and the ORM on PostgreSQL and MariaDB, sync and async.

python -m tests.bench.bench_databases [--smoke]
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy_lucent import set_default_keyring
from tests.bench.compare import Goals, compare_core, compare_orm
from tests.bench.measure import KEYS, Figure, at_most, run_alone
from tests.bench.servers import bench_database
from tests.bench.tables import opened

TITLE = "PostgreSQL and MariaDB"
ABOUT = """\
The same work as on SQLite, through each driver, over a connection to a server on the same
machine. On PostgreSQL it is compared with a `JSON` and with a `JSONB` column. With an async
driver the work runs in `AsyncConnection.run_sync` and `AsyncSession.run_sync`. Two things weigh
there, on the floor as on ours. Sealed bytes do not compress: where PostgreSQL keeps JSON of 2.2 kB
in its row, by compressing it, it moves the sealed value out of the row
([toast_tuple_target](#postgresql-toast_tuple_target) keeps it there). And drivers take bytes
another way than text: psycopg reads them as hexadecimal digits, those of MariaDB write them
escaped into the statement."""

DRIVERS = {
    "PostgreSQL, psycopg": ("postgresql", "postgresql+psycopg"),
    "PostgreSQL, psycopg async": ("postgresql", "postgresql+psycopg_async"),
    "PostgreSQL, asyncpg": ("postgresql", "postgresql+asyncpg"),
    "MariaDB, PyMySQL": ("mysql", "mysql+pymysql"),
    "MariaDB, asyncmy": ("mysql", "mysql+asyncmy"),
}
ASYNC = {"postgresql+psycopg_async", "postgresql+asyncpg", "mysql+asyncmy"}
ROWS = {"small": 5000, "medium": 2500}
GOALS: Goals = {
    (size, what): at_most(1.05)
    for size in ROWS
    for what in ("insert", "select", "add", "select entities", "lazy")
}


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    for kind in ("postgresql", "mysql"):
        with bench_database(kind) as url:
            for label, (its_kind, driver) in DRIVERS.items():
                if its_kind != kind:
                    continue
                beside = ["JSON", "JSONB"] if kind == "postgresql" else ["JSON"]
                url = url.set(drivername=driver)
                with opened(url, is_async=driver in ASYNC) as database:
                    for size, rows in ROWS.items():
                        for compare in (compare_core, compare_orm):
                            yield from compare(
                                database,
                                size,
                                group=f"{label}, {rows:,} {size} documents",
                                rows=10 if smoke else rows,
                                rounds=1 if smoke else 5,
                                beside=beside,
                                goals=GOALS,
                            )


if __name__ == "__main__":
    run_alone(measure)
