"""EncryptedJSON as a type: what SQL may do with it, and what SQLAlchemy asks of it."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import json
import pickle
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import (
    JSON,
    Column,
    Computed,
    DefaultClause,
    FetchedValue,
    Identity,
    Integer,
    LargeBinary,
    MetaData,
    Sequence,
    String,
    Table,
    cast,
    create_engine,
    func,
    insert,
    literal,
    literal_column,
    null,
    or_,
    select,
    text,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, aliased, mapped_column
from sqlalchemy.schema import CreateTable

import sqlalchemy_lucent.migrations  # noqa: F401  (its operations are registered by the import)
from sqlalchemy_lucent import (
    ConfigurationError,
    EncryptedJSON,
    SerializationError,
    UnsupportedOperationError,
)
from sqlalchemy_lucent._row import encode_row
from sqlalchemy_lucent.types import Bound, Sealed


class Base(DeclarativeBase):
    pass


class Model(Base):
    __tablename__ = "models"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))
    data: Mapped[Any] = mapped_column(EncryptedJSON)
    other: Mapped[Any] = mapped_column(EncryptedJSON)


table: Any = Model.__table__
DIALECTS: list[Any] = [dialect.dialect() for dialect in (sqlite, postgresql, mysql)]
SQLITE, POSTGRESQL, MYSQL = DIALECTS

# -- comparing -------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "==": lambda c: c == {"a": 1},
    "== str": lambda c: c == "x",
    "== JSON.NULL": lambda c: c == JSON.NULL,
    "== literal": lambda c: c == literal({"a": 1}),
    "== from the right": lambda c: {"a": 1} == c,  # noqa: SIM300
    "== subquery": lambda c: c == select(table.c.data).scalar_subquery(),
    "!=": lambda c: c != {"a": 1},
    "<": lambda c: c < 1,
    ">= from the right": lambda c: c <= 1,
    "is_": lambda c: c.is_(True),
    "is_distinct_from": lambda c: c.is_distinct_from({"a": 1}),
    "in_": lambda c: c.in_([1, 2]),
    "in_ empty": lambda c: c.in_([]),
    "in_ select": lambda c: c.in_(select(table.c.data)),
    "not_in": lambda c: c.not_in([1]),
    "like": lambda c: c.like("%x%"),
    "ilike": lambda c: c.ilike("%x%"),
    "contains": lambda c: c.contains("x"),
    "startswith": lambda c: c.startswith("x"),
    "match": lambda c: c.match("x"),
    "regexp_match": lambda c: c.regexp_match("x"),
    "between": lambda c: c.between(1, 2),
    "asc": lambda c: c.asc(),
    "desc": lambda c: c.desc(),
    "nulls_first": lambda c: c.nulls_first(),
    "distinct": lambda c: c.distinct(),
    "collate": lambda c: c.collate("C"),
    "any_": lambda c: c.any_(),
    "index by name": lambda c: c["a"],
    "index by number": lambda c: c[0],
    "index by path": lambda c: c["a", "b"],
    "+": lambda c: c + 1,
    "+ from the right": lambda c: 1 + c,
    "|| from the right": lambda c: "a" + c,
    "-": lambda c: -c,
    "~": lambda c: ~c,
    "&": lambda c: c & (table.c.id == 1),
    "op": lambda c: c.op("->>")("a"),
    "bool_op": lambda c: c.bool_op("@>")({"a": 1}),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_comparing_is_refused_when_the_expression_is_built(operation: str) -> None:
    with pytest.raises(UnsupportedOperationError, match="key_version"):
        OPERATIONS[operation](table.c.data)


@pytest.mark.parametrize(
    "column",
    [
        Model.data,
        aliased(Model).data,
        select(table.c.data).subquery().c.data,
        table.c.data.label("label"),
    ],
    ids=["ORM", "alias", "subquery", "label"],
)
def test_comparing_is_refused_whatever_form_the_column_has(column: Any) -> None:
    for operation in ("==", "in_", "like", "desc", "index by name"):
        with pytest.raises(UnsupportedOperationError, match="key_version"):
            OPERATIONS[operation](column)


def test_filter_by_is_refused_when_it_is_built() -> None:
    with pytest.raises(UnsupportedOperationError, match="Look rows up by a column"):
        select(Model).filter_by(data={"a": 1})


@pytest.mark.parametrize("operator", ["__eq__", "__ne__"])
def test_comparing_with_a_column_is_refused_when_it_is_compiled(operator: str) -> None:
    for other in (table.c.other, table.c.name, table.c.data):
        statement = select(Model.id).where(getattr(table.c.data, operator)(other))
        for dialect in (None, *DIALECTS):
            with pytest.raises(UnsupportedOperationError, match="no meaning"):
                statement.compile(dialect=dialect)


def test_columns_are_found_in_lists_and_dicts() -> None:
    data, other = table.c.data, table.c.other
    assert data in [other, data]
    assert data not in [other, table.c.name]
    assert [other, data].index(data) == 1
    annotated = Model.data.__clause_element__()
    assert {data: 1}[annotated] == 1
    assert bool(data == data)
    assert not bool(data == other)
    assert bool(data != other)


NULL_TESTS: dict[str, Callable[[Any], Any]] = {
    "is_(None)": lambda c: c.is_(None),
    "== None": lambda c: c == None,  # noqa: E711
    "is_(null())": lambda c: c.is_(null()),
    "== null()": lambda c: c == null(),
    "is_not(None)": lambda c: c.is_not(None),
    "isnot(None)": lambda c: c.isnot(None),
    "!= None": lambda c: c != None,  # noqa: E711
}


@pytest.mark.parametrize("test", NULL_TESTS)
def test_null_tests_work(test: str) -> None:
    for column in (table.c.data, Model.data):
        expected = "IS NOT NULL" if "not" in test or "!" in test else "IS NULL"
        assert str(NULL_TESTS[test](column)) == f"models.data {expected}"
        or_(NULL_TESTS[test](column), table.c.id == 1)


# What a type cannot see, pinned: see the docstring of `EncryptedComparator`.
UNSEEN: dict[str, Callable[[Any], Any]] = {
    "ORDER BY": lambda c: select(table.c.id).order_by(c),
    "GROUP BY": lambda c: select(func.count()).group_by(c),
    "SELECT DISTINCT": lambda c: select(c).distinct(),
    "an aggregate": lambda c: select(func.max(c)),
    "a CAST": lambda c: select(cast(c, String)),
    "another column on the left": lambda c: select(table.c.id).where(table.c.name == c),
    "a value on the left": lambda c: select(table.c.id).where(literal("x") == c),
    "IN on the left": lambda c: select(table.c.id).where(table.c.name.in_([c])),
}


@pytest.mark.parametrize("use", UNSEEN)
def test_what_a_type_cannot_see_builds(use: str) -> None:
    assert "models.data" in str(UNSEEN[use](table.c.data))


# -- what SQLAlchemy asks of a type ----------------------------------------------------------------


def test_the_attributes_of_json_are_taken_over() -> None:
    ours, theirs = EncryptedJSON(), JSON()
    for name in ("hashable", "python_type", "should_evaluate_none", "sort_key_function"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert EncryptedJSON(none_as_null=True).should_evaluate_none is False
    assert EncryptedJSON(none_as_null=True).evaluates_none().should_evaluate_none is True
    assert EncryptedJSON.NULL is JSON.NULL
    assert EncryptedJSON(schema=str).python_type is str


@pytest.mark.parametrize(
    "left, right, equal",
    [
        ({"a": [1]}, {"a": [1]}, True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": 1}, {"a": True}, False),
        ({"a": 1}, {"a": 1.0}, False),
        ([0.0], [-0.0], False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, False),
        (None, None, True),
        (None, JSON.NULL, False),
        (None, null(), False),
        (1, "1", False),
        ({"a": {1}}, {"a": {1}}, False),
        ({"a": float("nan")}, {"a": float("nan")}, False),
    ],
)
def test_values_are_compared_to_the_bit(left: Any, right: Any, equal: bool) -> None:
    for type_ in (EncryptedJSON(), EncryptedJSON(schema=dict[str, int])):
        assert type_.compare_values(left, right) is equal
        assert type_.compare_values(right, left) is equal


def test_a_compared_value_has_the_columns_type() -> None:
    type_ = table.c.data.type
    assert type_.coerce_compared_value(None, {"a": 1}) is type_


@pytest.mark.parametrize("value", [{"a": 1}, "x", 1])
def test_a_value_is_not_rendered_into_sql(value: Any) -> None:
    statement = insert(table).values(data=value)
    for dialect in DIALECTS:
        with pytest.raises(UnsupportedOperationError, match="not rendered into SQL"):
            statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True})


@pytest.mark.parametrize(
    "type_",
    [EncryptedJSON(context="t.c"), EncryptedJSON(context="t.c", schema=dict[str, int])],
    ids=["any", "schema"],
)
@pytest.mark.parametrize("what", ["sealing", "opening"])
def test_nothing_is_left_behind(type_: EncryptedJSON, what: str) -> None:
    bound = type_.dialect_impl(SQLITE)
    seal, open_ = bound.bind_processor(SQLITE), bound.result_processor(SQLITE, None)
    assert seal is not None
    assert open_ is not None
    process, value = (seal, {"n": 1}) if what == "sealing" else (open_, seal({"n": 1}))
    kept = []
    tracemalloc.start()
    try:
        for count in (1_000, 10_000):  # the first ones fill what is kept on purpose
            for _ in range(count):
                process(value)
            gc.collect()
            kept.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert kept[1] - kept[0] < 1_000


def test_ddl_and_compiling_need_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.schema import CreateTable

    from sqlalchemy_lucent import set_default_keyring

    for name in ("LUCENT_SECRETS_KEY", "LUCENT_SECRETS_KEYS"):
        monkeypatch.delenv(name, raising=False)
    set_default_keyring(None)
    assert "data BLOB" in str(CreateTable(table).compile(dialect=SQLITE))
    assert "data BYTEA" in str(CreateTable(table).compile(dialect=POSTGRESQL))
    assert "data LONGBLOB" in str(CreateTable(table).compile(dialect=MYSQL))
    assert "models.data" in str(select(Model).where(Model.data.is_(None)))
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        Base.metadata.create_all(connection)
        assert connection.execute(select(table)).all() == []
        with pytest.raises(ConfigurationError, match="LUCENT_SECRETS_KEY"):
            connection.execute(insert(table), {"name": "x", "data": 1, "other": 1})
    engine.dispose()


def test_repr_gives_back_the_type_without_what_was_derived() -> None:
    for text_ in (
        "EncryptedJSON()",
        "EncryptedJSON(none_as_null=True)",
        "EncryptedJSON(context='a.b', accept_contexts=('c.d',), lazy=True)",
        "EncryptedJSON(redact=False, bound_to=('tenant',))",
    ):
        assert repr(eval(text_)) == text_
    assert repr(table.c.data.type) == "EncryptedJSON()"
    assert repr(EncryptedJSON.mutable(schema=dict[str, int])) == "EncryptedJSON()"


def test_a_copy_keeps_every_option() -> None:
    type_ = EncryptedJSON.mutable(
        True, context="a.b", accept_contexts=["c.d"], redact=False, schema=dict[str, int]
    )
    for copied in (type_.copy(), copy.copy(type_), pickle.loads(pickle.dumps(type_))):
        assert copied._static_cache_key == type_._static_cache_key
        assert copied.tracks_changes is True


def test_a_subclass_works_as_the_class_does() -> None:
    class Typed(EncryptedJSON):
        cache_ok = True

    engine = create_engine("sqlite://")
    own = Table("own", MetaData(), Column("id", Integer, primary_key=True), Column("c", Typed))
    own.create(engine)
    with engine.connect() as connection:
        connection.execute(insert(own), {"c": [1]})
        assert connection.scalar(select(own.c.c)) == [1]
    assert isinstance(own.c.c.type, Typed)
    assert own.c.c.type.context == "own.c"
    engine.dispose()


# -- defaults --------------------------------------------------------------------------------------

DEFAULTS: dict[str, Callable[[], dict[str, Any]]] = {
    "text of Python": lambda: {"server_default": "{}"},
    "text of Python that says NULL": lambda: {"server_default": "NULL"},
    "SQL text": lambda: {"server_default": text("'{}'")},
    "a literal": lambda: {"server_default": literal("{}")},
    "bytes": lambda: {"server_default": literal(b"{}")},
    "a literal column": lambda: {"server_default": literal_column("'{}'")},
    "a function": lambda: {"server_default": func.json_object()},
    "DefaultClause": lambda: {"server_default": DefaultClause(text("x'7b7d'"))},
    "FetchedValue": lambda: {"server_default": FetchedValue()},
    "ON UPDATE": lambda: {"server_default": text("NULL ON UPDATE '{}'")},
    "server_onupdate": lambda: {"server_onupdate": FetchedValue()},
    "default= as SQL text": lambda: {"default": text("'{}'")},
    "default= as a function": lambda: {"default": func.json_object()},
    "default= as a literal": lambda: {"default": literal("{}")},
    "default= as a subquery": lambda: {"default": select(literal("{}")).scalar_subquery()},
    "default= as a Sequence": lambda: {"default": Sequence("s")},
    "insert_default= as SQL": lambda: {"insert_default": func.json_object()},
    "onupdate= as SQL": lambda: {"onupdate": func.json_object()},
}
GENERATED: dict[str, Callable[[], Any]] = {
    "Computed": lambda: Computed("other"),
    "Identity": Identity,
    "DefaultClause": lambda: DefaultClause("{}"),
}
NULL_DEFAULTS: dict[str, Callable[[], Any]] = {
    "null()": null,
    "text()": lambda: text("NULL"),
    "lower case": lambda: text(" (null) "),
    "as PostgreSQL reflects it": lambda: text("NULL::bytea"),
    "DefaultClause": lambda: DefaultClause(text("NULL")),
    "a cast": lambda: cast(null(), LargeBinary),
}


def migration(dialect: str) -> tuple[Operations, io.StringIO]:
    output = io.StringIO()
    options = {"as_sql": True, "output_buffer": output}
    return Operations(MigrationContext.configure(dialect_name=dialect, opts=options)), output


@pytest.mark.parametrize("default", DEFAULTS)
def test_a_default_that_the_database_would_make_is_refused(default: str) -> None:
    operations, output = migration("postgresql")
    options = DEFAULTS[default]
    for declare in (
        lambda: Table("t", MetaData(), Column("c", EncryptedJSON, **options())),
        lambda: Table("t", MetaData()).append_column(Column("c", EncryptedJSON(), **options())),
        lambda: operations.add_column("t", Column("c", EncryptedJSON(), **options())),
        lambda: operations.create_table("t", Column("c", EncryptedJSON(), **options())),
        lambda: declarative_model(mapped_column("c", EncryptedJSON, **options())),
    ):
        with pytest.raises(UnsupportedOperationError, match=r"t\.c would store a value"):
            declare()
    assert output.getvalue() == ""


def declarative_model(column: Any) -> type[Any]:
    class Base(DeclarativeBase):
        pass

    return type(
        "Declared",
        (Base,),
        {
            "__tablename__": "t",
            "id": mapped_column(Integer, primary_key=True),
            "c": column,
        },
    )


@pytest.mark.parametrize("generated", GENERATED)
def test_a_value_that_the_database_generates_is_refused(generated: str) -> None:
    with pytest.raises(UnsupportedOperationError, match=r"t\.c would store a value"):
        Table("t", MetaData(), Column("c", EncryptedJSON, GENERATED[generated]()))


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: str(dialect.name))
def test_a_default_that_a_column_was_given_later_is_refused_in_ddl(dialect: Any) -> None:
    for type_ in (EncryptedJSON(), JSON().with_variant(EncryptedJSON(), dialect.name)):
        own = Table("t", MetaData(), Column("c", type_))
        str(CreateTable(own).compile(dialect=dialect))
        own.c.c.server_default = DefaultClause(text("'{}'"))
        with pytest.raises(UnsupportedOperationError, match=r"t\.c would store a value"):
            CreateTable(own).compile(dialect=dialect)


@pytest.mark.parametrize("default", NULL_DEFAULTS)
def test_null_is_a_server_default(default: str) -> None:
    own = Table(
        "t", MetaData(), Column("c", EncryptedJSON, server_default=NULL_DEFAULTS[default]())
    )
    for dialect in DIALECTS:
        assert "DEFAULT" in str(CreateTable(own).compile(dialect=dialect))


def test_a_default_of_python_is_sealed() -> None:
    engine = create_engine("sqlite://")
    own = Table(
        "t",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("c", EncryptedJSON, default={"a": 1}, onupdate=lambda: {"b": 2}),
        Column("d", EncryptedJSON(True), default=null()),
    )
    own.create(engine)
    with engine.connect() as connection:
        connection.execute(insert(own).values(id=1))
        assert connection.execute(select(own)).one() == (1, {"a": 1}, None)
        connection.execute(own.update().values(id=2))
        assert connection.scalar(select(own.c.c)) == {"b": 2}
    engine.dispose()


@pytest.mark.parametrize("name", ["sqlite", "postgresql", "mysql"])
def test_a_migration_gives_a_sealed_column_no_server_default_but_null(name: str) -> None:
    if "replace" not in inspect.signature(Operations.implementation_for).parameters:
        pytest.skip("the operations of this Alembic cannot be extended")
    operations, output = migration(name)
    alter_column: Any = operations.alter_column
    types: dict[str, Any]
    for types in (
        {"existing_type": EncryptedJSON()},
        {"existing_type": LargeBinary(), "type_": EncryptedJSON},
    ):
        for default in ("{}", text("'{}'"), FetchedValue(), Computed("other")):
            with pytest.raises(UnsupportedOperationError, match=r"t\.c would store a value"):
                alter_column("t", "c", server_default=default, **types)
    assert output.getvalue() == ""
    if name != "sqlite":
        types = {"existing_type": EncryptedJSON()}
        alter_column("t", "c", server_default=text("NULL"), **types)
        alter_column("t", "c", server_default=None, **types)
        alter_column("t", "c", nullable=False, **types)
        types = {"existing_type": EncryptedJSON(), "type_": JSON()}
        alter_column("t", "c", server_default=text("'{}'"), **types)


# -- Sealed and Bound ------------------------------------------------------------------------------


@pytest.fixture
def sealed() -> Sealed:
    codec = EncryptedJSON(context="a.b").column_codec(SQLITE)
    return Sealed(codec.seal({"a": "plaintext"}), codec)


def test_a_sealed_value_tells_its_key_and_opens(sealed: Sealed, keyring: Any) -> None:
    assert sealed.open() == {"a": "plaintext"}
    assert sealed.key_version == "v1"
    assert sealed.fingerprint == keyring.fingerprint("v1")
    assert repr(sealed).startswith("<Sealed a.b key_version=v1 ")
    assert "plaintext" not in repr(sealed)


def test_a_sealed_value_is_equal_and_hashed_by_its_bytes(sealed: Sealed) -> None:
    codec = EncryptedJSON(context="a.b").column_codec(SQLITE)
    assert {sealed, Sealed(bytes(sealed), codec)} == {sealed}
    assert sealed != Sealed(codec.seal({"a": "plaintext"}), codec)
    assert sealed != bytes(sealed)


def test_a_pickled_sealed_value_opens(sealed: Sealed) -> None:
    restored = pickle.loads(pickle.dumps(sealed))
    assert restored == sealed
    assert restored.open() == {"a": "plaintext"}


def a_reader(text_: str) -> Any:
    return {"read": json.loads(text_)}


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"json_serializer": lambda value: json.dumps(value)}, {"n": 1}),
        ({"json_deserializer": json.loads}, {"n": 1}),
        ({"json_serializer": lambda v: json.dumps(v["read"]), "json_deserializer": a_reader},
         {"read": {"n": 1}}),
        ({"json_deserializer": lambda text_: json.loads(text_)}, None),
    ],
)  # fmt: skip
def test_a_pickle_names_the_function_that_reads_and_leaves_out_the_one_that_writes(
    options: dict[str, Any], expected: Any
) -> None:
    engine = create_engine("sqlite://", **options)
    table = Table("lazies", MetaData(), Column("c", EncryptedJSON(lazy=True)))
    table.create(engine)
    with engine.connect() as connection:
        connection.execute(insert(table), {"c": expected or {"n": 1}})
        sealed = connection.scalars(select(table.c.c)).one()
    engine.dispose()
    for copied in (copy.copy(sealed), copy.deepcopy(sealed)):
        assert copied.open() == sealed.open()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        once = pickle.loads(pickle.dumps(sealed, protocol))
        pickled = pickle.loads(pickle.dumps(once, protocol))
        assert pickled == sealed
        if expected is not None:
            assert pickled.open() == expected
            continue
        with pytest.raises(SerializationError, match="define it in a module"):
            pickled.open()


def test_a_sealed_value_of_another_column_is_not_stored() -> None:
    first = table.c.data.type.bind_processor(SQLITE)
    own = Sealed(first({"a": 1}), table.c.data.type.column_codec(SQLITE))
    assert first(own) == bytes(own)
    with pytest.raises(SerializationError, match="where it would not open"):
        table.c.other.type.bind_processor(SQLITE)(own)


def test_a_sealed_value_that_may_be_of_several_columns_is_not_stored_in_one() -> None:
    for other in (
        EncryptedJSON(context="models.data", accept_contexts=["models.other"]),
        EncryptedJSON(context="models.data", bound_to=["id"]),
    ):
        value = Sealed(b"v1:", other.column_codec(SQLITE))
        with pytest.raises(SerializationError, match="would not open"):
            table.c.data.type.bind_processor(SQLITE)(value)


def test_a_row_context_is_unambiguous() -> None:
    assert encode_row(["a", "bc"]) != encode_row(["ab", "c"])
    for part in (None, 1.5, True, b"x"):
        with pytest.raises(ConfigurationError, match="binding column"):
            encode_row([part])  # type: ignore[list-item]


def test_a_bound_value_prints_nothing_and_is_not_pickled() -> None:
    bound = Bound({"a": "plaintext"}, row=["r"])
    assert "plaintext" not in repr(bound)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(bound)


def test_a_null_of_sql_may_be_bound_as_a_value() -> None:
    own = Table("t", MetaData(), Column("value", EncryptedJSON))
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        own.create(connection)
        connection.execute(insert(own), [{"value": null()}])
        assert connection.exec_driver_sql("SELECT value FROM t").scalar() is None
    engine.dispose()
