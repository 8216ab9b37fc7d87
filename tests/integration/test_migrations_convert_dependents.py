"""What reads a converted column: it is named, and the conversion refused before the first write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, MetaData, Table, create_engine

from sqlalchemy_lucent import EncryptedJSON, RotationError
from sqlalchemy_lucent.migrations import decrypt_column, encrypt_column

TYPES = {"sqlite": "JSON", "postgresql": "jsonb", "mysql": "JSON"}

# Each database: what is made, and how it is named.
SQLITE = {
    "generated": ("ALTER TABLE users ADD email TEXT AS (data ->> '$.email')", "column email"),
    "generated, quoted": ('ALTER TABLE users ADD email TEXT AS ([data] || "x")', "column email"),
    "index": ("CREATE INDEX ix ON users (json_extract(\"data\", '$.email'))", "index ix"),
    "partial index": ("CREATE INDEX ix ON users (id) WHERE `DATA` IS NOT NULL", "index ix"),
    "view": ("CREATE VIEW v AS SELECT u.data FROM users AS u", "view v"),
    "view of all": ("CREATE VIEW v AS SELECT * FROM users", "view v"),
    "own trigger": (
        "CREATE TRIGGER t AFTER UPDATE OF data ON users BEGIN SELECT 1; END",
        "trigger t",
    ),
    "other trigger": (
        (
            "CREATE TRIGGER t AFTER INSERT ON others BEGIN"
            " UPDATE others SET n = (SELECT length(data) FROM users); END"
        ),
        "trigger t",
    ),
}
POSTGRESQL = {
    "generated": (
        "ALTER TABLE users ADD email text GENERATED ALWAYS AS (data->>'email') STORED",
        "column email",
    ),
    "index": ("CREATE INDEX ix ON users ((data->>'email'))", "index ix"),
    "partial index": ("CREATE UNIQUE INDEX ix ON users (id) WHERE data IS NOT NULL", "index ix"),
    "covering index": ("CREATE INDEX ix ON users (id) INCLUDE (data)", "index ix"),
    "check": (
        "ALTER TABLE users ADD CONSTRAINT ck CHECK (data IS NOT NULL OR note IS NOT NULL)",
        "constraint ck",
    ),
    "view": ("CREATE VIEW v AS SELECT * FROM users", "view v"),
    "materialized view": (
        "CREATE MATERIALIZED VIEW m AS SELECT data->>'email' AS email FROM users",
        "materialized view m",
    ),
    "trigger": (
        "CREATE TRIGGER t BEFORE UPDATE OF data ON users EXECUTE FUNCTION nothing()",
        "trigger t",
    ),
    "trigger with condition": (
        (
            "CREATE TRIGGER t BEFORE UPDATE ON users FOR EACH ROW"
            " WHEN (OLD.data IS DISTINCT FROM NEW.data) EXECUTE FUNCTION nothing()"
        ),
        "trigger t",
    ),
    "trigger's function": (
        "CREATE TRIGGER t BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION reading()",
        "trigger t",
    ),
    "trigger's argument": (
        (
            "CREATE TRIGGER t BEFORE INSERT ON users FOR EACH ROW"
            " EXECUTE FUNCTION nothing('id', 'data')"
        ),
        "trigger t",
    ),
    "rule": ("CREATE RULE r AS ON UPDATE TO users WHERE OLD.data IS NULL DO NOTHING", "rule r"),
    "policy": ("CREATE POLICY p ON users USING (data IS NOT NULL)", "policy p"),
    "publication": ("CREATE PUBLICATION lucent_pub FOR TABLE users (id, data)", "publication"),
    "statistics": ("CREATE STATISTICS s ON data, note FROM users", "statistics object s"),
    "function": (
        (
            "CREATE FUNCTION f() RETURNS bigint LANGUAGE sql"
            " BEGIN ATOMIC SELECT count(data) FROM users; END"
        ),
        "function f()",
    ),
}
MYSQL = {
    "generated": (
        "ALTER TABLE users ADD email varchar(99) AS (json_value(data, '$.email'))",
        "generated column email",
    ),
    "default": (
        "ALTER TABLE users ADD email varchar(99) DEFAULT (json_value(data, '$.email'))",
        "default of column email",
    ),
    "check": (
        "ALTER TABLE users ADD CONSTRAINT ck CHECK (`data` IS NOT NULL OR note = 'it''s')",
        "check constraint ck",
    ),
    "json and more": (
        "ALTER TABLE users ADD CONSTRAINT data_is CHECK (json_valid(data) OR id > 5)",
        "check constraint data_is",
    ),
    "index": ("CREATE FULLTEXT INDEX ix ON users (data)", "index ix"),
    "view": ("CREATE VIEW v AS SELECT * FROM users", "view v"),
    "own trigger": (
        (
            "CREATE TRIGGER t BEFORE UPDATE ON users FOR EACH ROW"
            " SET NEW.note = json_value(NEW.data, '$.email')"
        ),
        "trigger t",
    ),
    "other trigger": (
        "CREATE TRIGGER t AFTER INSERT ON others FOR EACH ROW UPDATE users SET data = '{}'",
        "trigger t",
    ),
}
# Of SQLite's indexes, SQLAlchemy warns.
pytestmark = pytest.mark.filterwarnings("ignore:Skipped unsupported reflection of expression")

CASES = [
    pytest.param(kind, *case, id=f"{kind}-{name}")
    for kind, cases in (("sqlite", SQLITE), ("postgresql", POSTGRESQL), ("mysql", MYSQL))
    for name, case in cases.items()
]

# What reads no value of the column, though some of it looks as if it did.
HARMLESS = {
    "sqlite": (
        "CREATE INDEX ix ON users (note)",
        "CREATE TABLE data (data TEXT CHECK (data <> 'data'))",
        "CREATE VIEW v AS SELECT note, 'data' AS said, 2 * id, id /* data */ FROM users -- data",
        "CREATE VIEW w AS SELECT count(*) AS n, database FROM users, (SELECT 1 AS database)",
        "CREATE TRIGGER t AFTER INSERT ON others BEGIN SELECT data FROM data; END",
    ),
    "postgresql": (
        "CREATE INDEX ix ON users (note)",
        "CREATE VIEW v AS SELECT note, 'data' AS said FROM users",
        "CREATE TRIGGER t BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION nothing('other')",
    ),
    "mysql": (
        "CREATE INDEX ix ON users (note)",
        "ALTER TABLE users ADD CONSTRAINT ck CHECK (note <> 'its \\'data\\'')",
        "ALTER TABLE users ADD other varchar(9) DEFAULT 'data'",
        "CREATE VIEW v AS SELECT note, 'data' AS said FROM users",
        "CREATE TRIGGER t BEFORE INSERT ON users FOR EACH ROW SET NEW.note = 'data'",
    ),
}


def users(type_: Any) -> Table:
    return Table(
        "users",
        MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("data", type_),
        sa.Column("note", sa.String(20)),
    )


SEALED = users(EncryptedJSON(redact=False))


@pytest.fixture
def engine(request: pytest.FixtureRequest, databases: Any) -> Iterator[Engine]:
    kind = request.node.callspec.params["kind"]
    engine = create_engine(databases.url(kind))
    drop_all(engine)
    with engine.begin() as connection:
        for statement in (
            f"CREATE TABLE users (id INTEGER PRIMARY KEY, data {TYPES[kind]}, note VARCHAR(20))",
            "CREATE TABLE others (id INTEGER PRIMARY KEY, n INTEGER)",
            "INSERT INTO users VALUES (1, '{\"email\": \"a@b\"}', 'n')",
        ):
            connection.exec_driver_sql(statement)
        for name, body in (("nothing", ""), ("reading", "NEW.note := NEW.data->>'email';")):
            if kind == "postgresql":
                connection.exec_driver_sql(
                    f"CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql"
                    f" AS $$ BEGIN {body} RETURN NEW; END $$"
                )
    yield engine
    drop_all(engine)
    engine.dispose()


def drop_all(engine: Engine) -> None:
    names = {
        "postgresql": (
            "DROP PUBLICATION IF EXISTS lucent_pub",
            "DROP FUNCTION IF EXISTS f, nothing, reading CASCADE",
            "DROP TABLE IF EXISTS users, others CASCADE",
        ),
        "mysql": ("DROP VIEW IF EXISTS v", "DROP TABLE IF EXISTS users, others"),
        "sqlite": (
            "DROP VIEW IF EXISTS v",
            "DROP VIEW IF EXISTS w",
            "DROP TABLE IF EXISTS users",
            "DROP TABLE IF EXISTS others",
            "DROP TABLE IF EXISTS data",
        ),
    }
    with engine.begin() as connection:
        for statement in names[engine.dialect.name]:
            connection.exec_driver_sql(statement)


def convert(engine: Engine, operation: Any, **options: Any) -> None:
    type_ = sa.dialects.postgresql.JSONB() if engine.dialect.name == "postgresql" else sa.JSON()
    with engine.connect() as connection:
        operations = Operations(MigrationContext.configure(connection))
        operation("users", "data", existing_type=type_, operations=operations, **options)


def columns(engine: Engine) -> set[str]:
    return {column["name"] for column in sa.inspect(engine).get_columns("users")}


def make(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


@pytest.mark.parametrize(("kind", "statement", "name"), CASES)
def test_what_reads_the_column_is_named_and_nothing_is_written(
    engine: Engine, kind: str, statement: str, name: str
) -> None:
    make(engine, statement)
    before = columns(engine)

    with pytest.raises(RotationError, match=r"users\.data is used by") as caught:
        convert(engine, encrypt_column)

    assert name in str(caught.value)
    assert columns(engine) == before


@pytest.mark.parametrize("kind", list(TYPES))
def test_everything_that_reads_the_column_is_named_at_once(engine: Engine, kind: str) -> None:
    cases = {"sqlite": SQLITE, "postgresql": POSTGRESQL, "mysql": MYSQL}[kind]
    make(engine, cases["generated"][0], cases["view"][0])

    with pytest.raises(RotationError, match=r"column email.*view v"):
        convert(engine, encrypt_column)


@pytest.mark.parametrize("kind", list(TYPES))
def test_what_only_looks_like_it_is_no_obstacle(engine: Engine, kind: str) -> None:
    make(engine, *HARMLESS[kind])

    convert(engine, encrypt_column)

    with engine.connect() as connection:
        assert connection.scalar(sa.select(SEALED.c.data)) == {"email": "a@b"}
    convert(engine, decrypt_column)
    with engine.connect() as connection:
        assert "a@b" in str(connection.scalar(sa.text("SELECT data FROM users")))


@pytest.mark.parametrize("kind", list(TYPES))
def test_what_reads_the_sealed_column_is_named_by_decrypting(engine: Engine, kind: str) -> None:
    convert(engine, encrypt_column)
    make(engine, "CREATE VIEW v AS SELECT data FROM users")

    with pytest.raises(RotationError, match=r"users\.data is used by .*v\b"):
        convert(engine, decrypt_column)

    assert columns(engine) == {"id", "data", "note"}


@pytest.mark.parametrize("kind", list(TYPES))
def test_the_check_of_a_sealed_column_goes_with_it_and_others_do_not(
    engine: Engine, kind: str
) -> None:
    convert(engine, encrypt_column)
    assert sa.inspect(engine).get_check_constraints("users")
    if kind != "sqlite":
        make(engine, "ALTER TABLE users ADD CONSTRAINT ck CHECK (length(data) > 3)")
        with pytest.raises(RotationError, match=r"used by (check )?constraint ck\b[^,]*, which"):
            convert(engine, decrypt_column)
        make(engine, "ALTER TABLE users DROP CONSTRAINT ck")

    convert(engine, decrypt_column)

    assert "lucent" not in str(sa.inspect(engine).get_check_constraints("users"))


@pytest.mark.parametrize("kind", list(TYPES))
def test_what_reads_the_kept_plaintext_is_named_before_that_is_dropped(
    engine: Engine, kind: str
) -> None:
    convert(engine, encrypt_column, drop=False)
    make(engine, "CREATE VIEW v AS SELECT data__sealed FROM users")

    with pytest.raises(RotationError, match=r"users\.data__sealed is used by .*v\b"):
        convert(engine, encrypt_column)

    assert columns(engine) == {"id", "data", "data__sealed", "note"}


@pytest.mark.parametrize("kind", ["sqlite"])
@pytest.mark.parametrize(
    ("clause", "refused"),
    [
        ("data JSON CHECK (json_valid(data))", False),
        ('data JSON NOT NULL CHECK (json_valid("data")) COLLATE BINARY', False),
        ("data JSON CHECK (json_valid(data) AND length(data) < 9)", True),
        ("data JSON, CHECK (data IS NOT NULL)", True),
        ("data JSON, n INTEGER, CONSTRAINT ck CHECK (n > 0 OR data IS NOT NULL)", True),
        ("data JSON, n INTEGER CONSTRAINT ck CHECK (n > length(data))", True),
        ("n INTEGER DEFAULT (max(1, 2)), data JSON, /* data, */ CHECK (n <> 'data, ')", False),
    ],
)
@pytest.mark.filterwarnings("ignore:Unnamed CHECK constraint")
def test_checks_of_sqlite_are_found_in_the_tables_own_sql(
    engine: Engine, kind: str, clause: str, refused: bool
) -> None:
    make(
        engine,
        "DROP TABLE users",
        f"CREATE TABLE users (id INTEGER PRIMARY KEY, note TEXT, {clause})",
        "INSERT INTO users (id, data) VALUES (1, '[1]')",
    )
    if refused:
        with pytest.raises(RotationError, match=r"users\.data is used by .*(check|column)"):
            convert(engine, encrypt_column)
        assert "data__sealed" not in columns(engine)
    else:
        convert(engine, encrypt_column)
        with engine.connect() as connection:
            assert connection.scalar(sa.select(SEALED.c.data)) == [1]


@pytest.mark.parametrize("kind", ["sqlite"])
def test_a_full_text_index_of_the_column_is_named(engine: Engine, kind: str) -> None:
    make(engine, "CREATE VIRTUAL TABLE found USING fts5(data, content='users')")
    try:
        with pytest.raises(RotationError, match="virtual table found"):
            convert(engine, encrypt_column)
    finally:
        make(engine, "DROP TABLE found")


@pytest.mark.parametrize("kind", ["postgresql"])
def test_what_reads_the_column_of_a_partition_is_named(engine: Engine, kind: str) -> None:
    make(
        engine,
        "DROP TABLE users",
        "CREATE TABLE users (id int PRIMARY KEY, data jsonb, note text) PARTITION BY RANGE (id)",
        "CREATE TABLE users_1 PARTITION OF users FOR VALUES FROM (0) TO (9)",
        "CREATE INDEX ix_of_partition ON users_1 ((data->>'email'))",
    )
    with pytest.raises(RotationError, match="index ix_of_partition"):
        convert(engine, encrypt_column)
