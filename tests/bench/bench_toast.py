"""What PostgreSQL's ``toast_tuple_target`` does for secrets of 2.3 kB.

python -m tests.bench.bench_toast [--smoke]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

from sqlalchemy import Engine, create_engine, select, text
from sqlalchemy.orm import DeclarativeBase, Session

from sqlalchemy_lucent import (
    LucentSecretMixin,
    LucentSecrets,
    SecretKey,
    rotate,
    set_default_keyring,
)
from tests.bench.documents import medium
from tests.bench.measure import KEYS, Contender, Figure, in_turns, run_alone
from tests.bench.servers import bench_database, tidy_up

TITLE = "PostgreSQL: toast_tuple_target"
ABOUT = """\
PostgreSQL moves a value out of its row when the row is longer than some 2 kB. A sealed
service-account key is just past that, and does not compress.
`ALTER TABLE lucent_secrets SET (toast_tuple_target = 4080)` keeps it in the row. *Ours* is the
table with that setting."""

ROWS = 10_000
TARGET = 4080


class Secrets(LucentSecretMixin, DeclarativeBase):
    __abstract__ = True


class Inline(Secrets):
    __tablename__ = "bench_secrets_inline"


class Toasted(Secrets):
    __tablename__ = "bench_secrets_toasted"


MODELS: dict[str, type[Secrets]] = {"with": Inline, "without": Toasted}


def key(number: int) -> SecretKey:
    return SecretKey("tenant", f"tenant_{number:06}", "googleDrive", "serviceAccount")


def filled(engine: Engine, rows: int) -> None:
    Inline.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            text(f"ALTER TABLE {Inline.__tablename__} SET (toast_tuple_target = {TARGET})")
        )
    for first in range(0, rows, 1000):
        values = {key(n): medium(n % 100) for n in range(first, min(first + 1000, rows))}
        for model in MODELS.values():
            with Session(engine) as session, session.begin():
                LucentSecrets(session, model=model).set_many(values)


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    rows, rounds = (20, 1) if smoke else (ROWS, 5)
    with bench_database("postgresql") as url:
        engine = create_engine(url)
        filled(engine, rows)
        some = [key(n) for n in range(0, rows, max(1, rows // 1000))]

        def get_many(model: type[Secrets]) -> None:
            with Session(engine) as session:
                assert len(LucentSecrets(session, model=model).get_many(some)) == len(some)

        def select_all(model: type[Secrets]) -> None:
            with Session(engine) as session:
                assert len(session.execute(select(model.payload)).all()) == rows

        keyrings = {name: itertools.cycle([KEYS.with_primary("v1"), KEYS]) for name in MODELS}

        def rotate_all(model: type[Secrets]) -> None:
            keyring = next(keyrings["with" if model is Inline else "without"])
            assert rotate(engine, model.metadata.tables[model.__tablename__], keyring=keyring).ok

        work: dict[str, tuple[int, Callable[[type[Secrets]], None]]] = {
            "get_many": (len(some), get_many),
            "select all, unopened": (rows, select_all),
            "rotate": (rows, rotate_all),
        }
        tidy = partial(tidy_up, engine) if rounds > 1 else None
        for name, (count, do) in work.items():
            contenders = {
                name: Contender(partial(do, model), tidy) for name, model in MODELS.items()
            }
            turns = in_turns(contenders, rounds)
            yield turns.rate("2.3 kB secrets", name, "with", "without", rows=count)
        engine.dispose()


if __name__ == "__main__":
    run_alone(measure)
