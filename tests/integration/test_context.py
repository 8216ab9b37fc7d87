"""What values are bound to: the context of each column, however the column came into being."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any

import pymysql
import pytest
from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    case,
    create_engine,
    func,
    insert,
    literal,
    select,
    text,
    type_coerce,
    union_all,
    update,
)
from sqlalchemy.ext.declarative import ConcreteBase
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    declared_attr,
    mapped_column,
    registry,
)

from sqlalchemy_lucent import (
    ConfigurationError,
    EncryptedJSON,
    Keyring,
    NotSealedError,
    TamperedError,
    UnsupportedOperationError,
)
from tests.databases import create_unguarded


def context_of(column: Any) -> str | None:
    type_ = column.type
    assert isinstance(type_, EncryptedJSON)
    return type_.context


@pytest.fixture
def connection() -> Iterator[Connection]:
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


# -- how a column comes into being -----------------------------------------------------------------


def test_a_core_column_takes_its_context_from_its_table() -> None:
    table = Table("t", MetaData(), Column("c", EncryptedJSON))
    assert context_of(table.c.c) == "t.c"


def test_a_column_added_to_a_table_later_takes_its_context() -> None:
    table = Table("t", MetaData())
    table.append_column(Column("c", EncryptedJSON()))
    assert context_of(table.c.c) == "t.c"


def test_a_schema_is_no_part_of_the_context() -> None:
    assert context_of(Table("t", MetaData(schema="s"), Column("c", EncryptedJSON)).c.c) == "t.c"


def test_the_name_in_the_database_counts_and_not_the_attributes() -> None:
    class Base(DeclarativeBase):
        pass

    class Model(Base):
        __tablename__ = "models"
        id: Mapped[int] = mapped_column(primary_key=True)
        attribute: Mapped[Any] = mapped_column("column", EncryptedJSON)

    assert context_of(Model.__table__.c.column) == "models.column"


def test_every_declarative_way_gives_each_column_its_own_context() -> None:
    shared = EncryptedJSON()

    class Base(DeclarativeBase):
        type_annotation_map = {dict[str, Any]: shared}  # noqa: RUF012

    class Mixin:
        mixed: Mapped[Any] = mapped_column(EncryptedJSON)

        @declared_attr
        def declared(cls) -> Mapped[Any]:
            return mapped_column(EncryptedJSON)

    class Abstract(Base):
        __abstract__ = True
        inherited: Mapped[Any] = mapped_column(shared)

    class First(Mixin, Abstract):
        __tablename__ = "firsts"
        id: Mapped[int] = mapped_column(primary_key=True)
        annotated: Mapped[dict[str, Any]]
        another: Mapped[dict[str, Any]]

    class Second(Mixin, Abstract):
        __tablename__ = "seconds"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Joined(First):
        __tablename__ = "joined"
        id: Mapped[int] = mapped_column(ForeignKey(First.id), primary_key=True)
        own: Mapped[dict[str, Any]]

    class Single(First):
        late: Mapped[Any] = mapped_column(shared, nullable=True)

    for model in (First, Second, Joined):
        for column in model.__table__.c:
            if isinstance(column.type, EncryptedJSON):
                assert context_of(column) == f"{model.__tablename__}.{column.name}"
    assert context_of(First.__table__.c.late) == "firsts.late"
    assert shared.context is None


def test_an_imperatively_mapped_column_takes_its_context() -> None:
    mapper_registry = registry()
    table = Table(
        "t",
        mapper_registry.metadata,
        Column("id", Integer, primary_key=True),
        Column("c", EncryptedJSON),
    )

    class Model:
        pass

    mapper_registry.map_imperatively(Model, table)
    assert context_of(table.c.c) == "t.c"


def test_one_type_given_to_two_columns_is_two_types() -> None:
    type_ = EncryptedJSON()
    metadata = MetaData()
    first = Table("first", metadata, Column("a", type_), Column("b", type_))
    second = Table("second", metadata, Column("a", type_))
    assert [context_of(c) for c in (*first.c, *second.c)] == ["first.a", "first.b", "second.a"]


def test_a_copied_table_has_the_contexts_of_its_own_name() -> None:
    table = Table("t", MetaData(), Column("c", EncryptedJSON), Column("d", EncryptedJSON()))
    copied = table.to_metadata(MetaData())
    renamed = table.to_metadata(MetaData(), name="renamed")
    assert [context_of(c) for c in copied.c] == ["t.c", "t.d"]
    assert [context_of(c) for c in renamed.c] == ["renamed.c", "renamed.d"]
    assert [context_of(c) for c in table.c] == ["t.c", "t.d"]


def test_a_column_that_overrides_a_reflected_one_takes_its_context(connection: Connection) -> None:
    connection.execute(text("CREATE TABLE t (id INTEGER PRIMARY KEY, c BLOB)"))
    table = Table("t", MetaData(), Column("c", EncryptedJSON), autoload_with=connection)
    assert context_of(table.c.c) == "t.c"
    connection.execute(insert(table).values(id=1, c={"a": 1}))
    assert connection.scalar(select(table.c.c)) == {"a": 1}


def test_aliases_subqueries_and_unions_share_the_columns_context(connection: Connection) -> None:
    table = Table(
        "t", MetaData(), Column("id", Integer, primary_key=True), Column("c", EncryptedJSON)
    )
    table.create(connection)
    connection.execute(insert(table).values(id=1, c={"a": 1}))
    inner = select(table.c.c)
    for source in (
        table.alias("other").c.c,
        inner.subquery().c.c,
        inner.cte().c.c,
        inner.union_all(inner).subquery().c.c,
        table.c.c.label("label"),
        inner.scalar_subquery(),
    ):
        assert connection.scalars(select(source)).first() == {"a": 1}


def test_a_given_context_is_kept_everywhere() -> None:
    type_ = EncryptedJSON(context="old.name")
    table = Table("t", MetaData(), Column("c", type_), Column("d", type_))
    assert [context_of(c) for c in table.c] == ["old.name", "old.name"]
    assert context_of(table.to_metadata(MetaData(), name="u").c.c) == "old.name"


def test_a_type_without_a_column_refuses_to_seal_and_to_open(connection: Connection) -> None:
    for statement in (
        select(literal({"a": 1}, EncryptedJSON)),
        text("SELECT x'00' AS c").columns(c=EncryptedJSON),
        select(type_coerce(literal(b"x"), EncryptedJSON)),
    ):
        with pytest.raises(ConfigurationError, match="belongs to no column"):
            connection.execute(statement).all()
    assert connection.scalar(select(literal({"a": 1}, EncryptedJSON(context="x.y")))) == {"a": 1}


# -- variants --------------------------------------------------------------------------------------


def test_a_variant_takes_the_columns_context(connection: Connection) -> None:
    table = Table(
        "t",
        MetaData(),
        Column("c", JSON().with_variant(EncryptedJSON(), "sqlite")),
        Column("d", EncryptedJSON().with_variant(EncryptedJSON(none_as_null=True), "sqlite")),
    )
    renamed = table.to_metadata(MetaData(), name="u")
    for target in (table, renamed):
        target.create(connection)
        connection.execute(insert(target).values(c={"a": 1}, d=None))
        assert connection.execute(select(target)).one() == ({"a": 1}, None)
        raw, null = connection.exec_driver_sql(f"SELECT c, d FROM {target.name}").one()
        keyring = Keyring({"v1": bytes(range(32))})
        assert keyring.for_context(f"{target.name}.c").open(raw) == b'{"a":1}'
        assert null is None


@pytest.mark.parametrize("variant", [JSON(), JSON, LargeBinary()])
def test_a_variant_that_would_store_plaintext_is_refused(variant: Any) -> None:
    with pytest.raises(UnsupportedOperationError, match="plaintext on sqlite"):
        EncryptedJSON().with_variant(variant, "sqlite")


# -- names with dots -------------------------------------------------------------------------------


def test_names_that_would_share_a_context_need_one_of_their_own(connection: Connection) -> None:
    for table, column in (("a.b", "c"), ("a", "b.c")):
        for type_ in (EncryptedJSON(), JSON().with_variant(EncryptedJSON(), "sqlite")):
            with pytest.raises(ConfigurationError, match=r"context='a\.b\.c'"):
                Table(table, MetaData(), Column(column, type_))
    kept = Table("a", MetaData(), Column("b.c", EncryptedJSON(context="a.b.c")))
    kept.create(connection)
    connection.execute(insert(kept).values({kept.c["b.c"]: {"a": 1}}))
    assert connection.scalar(select(kept)) == {"a": 1}
    assert context_of(kept.to_metadata(MetaData(), name="x.y").c["b.c"]) == "a.b.c"


# -- one result column, several contexts -----------------------------------------------------------


class Papers(DeclarativeBase):
    pass


class Paper(ConcreteBase, Papers):
    __tablename__ = "papers"
    id: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[Any] = mapped_column(EncryptedJSON)
    __mapper_args__ = {  # noqa: RUF012
        "polymorphic_identity": "paper",
        "concrete": True,
    }


class Contract(Paper):
    __tablename__ = "contracts"
    id: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[Any] = mapped_column(EncryptedJSON)
    __mapper_args__ = {  # noqa: RUF012
        "polymorphic_identity": "contract",
        "concrete": True,
    }


PAPERS: Any = Paper.__table__
CONTRACTS: Any = Contract.__table__
BOTH = union_all(select(PAPERS.c.id, PAPERS.c.data), select(CONTRACTS.c.id, CONTRACTS.c.data))
ALL = BOTH.subquery()


@pytest.fixture
def papers(engine: Engine) -> Iterator[Session]:
    Papers.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([Paper(id=1, data=["p"]), Contract(id=2, data=["c"])])
        session.commit()
        yield session


def outer(expression: Any) -> Any:
    """The expression for each contract, with the paper of the same id, of which there is none."""
    return select(expression).select_from(
        CONTRACTS.outerjoin(PAPERS, PAPERS.c.id == CONTRACTS.c.id)
    )


MIXED: dict[str, tuple[Callable[[], Any], list[Any]]] = {
    "a subquery": (lambda: select(BOTH.subquery().c.data), [["c"], ["p"]]),
    "a CTE": (lambda: select(BOTH.cte().c.data), [["c"], ["p"]]),
    "an alias of a subquery": (lambda: select(BOTH.subquery().alias().c.data), [["c"], ["p"]]),
    "a UNION of UNIONs": (
        lambda: select(
            union_all(select(BOTH.subquery()), select(BOTH.subquery())).subquery().c.data
        ).distinct(),
        [["c"], ["p"]],
    ),
    "coalesce": (lambda: outer(func.coalesce(PAPERS.c.data, CONTRACTS.c.data)), [["c"]]),
    "coalesce with a name": (
        lambda: outer(func.coalesce(PAPERS.c.data, CONTRACTS.c.data).label("l")),
        [["c"]],
    ),
    "CASE": (
        lambda: outer(case((PAPERS.c.id.is_not(None), PAPERS.c.data), else_=CONTRACTS.c.data)),
        [["c"]],
    ),
    "a scalar subquery": (
        lambda: select(
            func.coalesce(
                select(PAPERS.c.data).where(PAPERS.c.id == 9).scalar_subquery(),
                select(CONTRACTS.c.data).scalar_subquery(),
            )
        ),
        [["c"]],
    ),
    "a window": (
        lambda: select(
            func.first_value(ALL.c.data, type_=PAPERS.c.data.type).over(order_by=ALL.c.id)
        ).distinct(),
        [["p"]],
    ),
}


@pytest.mark.parametrize("spelling", MIXED)
def test_each_value_opens_in_the_context_of_its_own_column(papers: Session, spelling: str) -> None:
    statement, expected = MIXED[spelling]
    assert sorted(papers.scalars(statement())) == expected


def test_concrete_inheritance_opens_each_class_in_its_own_context(papers: Session) -> None:
    found = papers.scalars(select(Paper)).all()
    assert {type(paper): list(paper.data) for paper in found} == {Paper: ["p"], Contract: ["c"]}


def test_what_opens_in_several_contexts_opens_in_no_other(papers: Session) -> None:
    papers.execute(text("UPDATE contracts SET data = (SELECT data FROM papers)"))
    with pytest.raises(TamperedError, match="UNION"):
        papers.scalars(select(CONTRACTS.c.data)).all()


def test_a_union_by_itself_is_refused_and_says_how_it_works(papers: Session) -> None:
    orm = union_all(select(Paper.data), select(Contract.data))
    for statement in (BOTH, orm, select(Paper).from_statement(BOTH)):
        with pytest.raises(UnsupportedOperationError, match="subquery"):
            papers.execute(statement).all()


def test_a_union_of_columns_that_share_a_context_works(connection: Connection) -> None:
    first, second = (
        Table(name, MetaData(), Column("c", EncryptedJSON(context="shared"))) for name in "ab"
    )
    for table in (first, second):
        table.create(connection)
        connection.execute(insert(table).values(c=[table.name]))
    both = union_all(select(first.c.c), select(second.c.c))
    assert connection.scalars(both).all() == [["a"], ["b"]]
    assert connection.scalars(select(both.subquery())).all() == [["a"], ["b"]]


def test_columns_that_are_read_in_other_ways_are_not_mixed(connection: Connection) -> None:
    table = Table(
        "t", MetaData(), Column("a", EncryptedJSON), Column("b", EncryptedJSON(lazy=True))
    )
    table.create(connection)
    with pytest.raises(UnsupportedOperationError, match="lazy"):
        connection.execute(select(func.coalesce(table.c.a, table.c.b)))


def test_a_column_that_is_read_as_another_type_opens_in_that_types_context_only(
    connection: Connection,
) -> None:
    table = Table("t", MetaData(), Column("a", EncryptedJSON))
    table.create(connection)
    connection.execute(insert(table).values(a=1))
    other = type_coerce(table.c.a, EncryptedJSON(context="other"))
    for expression in (other, other.label("l")):
        with pytest.raises(TamperedError):
            connection.scalar(select(expression))


# -- renames ---------------------------------------------------------------------------------------


@pytest.fixture
def documents(engine: Engine) -> Table:
    table = Table(
        "documents",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("data", EncryptedJSON),
    )
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(insert(table).values(id=1, data={"a": 1}))
    return table


def renamed_table(engine: Engine, *type_: Any, **options: Any) -> Table:
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE documents RENAME TO papers"))
    return Table(
        "papers",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("data", EncryptedJSON(**options)),
    )


def test_after_a_rename_the_old_name_as_context_opens_and_seals(
    engine: Engine, documents: Table
) -> None:
    papers = renamed_table(engine, context="documents.data")
    with engine.begin() as connection:
        connection.execute(insert(papers).values(id=2, data={"b": 2}))
        assert connection.scalars(select(papers.c.data).order_by(papers.c.id)).all() == [
            {"a": 1},
            {"b": 2},
        ]


def test_after_a_rename_without_the_old_name_nothing_opens_and_the_error_says_how(
    engine: Engine, documents: Table
) -> None:
    papers = renamed_table(engine)
    with engine.begin() as connection, pytest.raises(TamperedError, match="context="):
        connection.scalar(select(papers.c.data))


def test_accepted_contexts_open_and_new_values_are_sealed_under_the_new_name(
    engine: Engine, documents: Table
) -> None:
    papers = renamed_table(engine, accept_contexts=["never.was", "documents.data"])
    only_new = Table("papers", MetaData(), Column("id", Integer), Column("data", EncryptedJSON))
    with engine.begin() as connection:
        assert connection.scalar(select(papers.c.data)) == {"a": 1}
        connection.execute(update(papers).values(data={"b": 2}))
        assert connection.scalar(select(papers.c.data)) == {"b": 2}
        assert connection.scalar(select(only_new.c.data)) == {"b": 2}


def test_an_accepted_context_does_not_hide_what_is_not_sealed(
    engine: Engine, documents: Table
) -> None:
    documents.drop(engine)
    create_unguarded(documents.metadata, engine)
    papers = renamed_table(engine, accept_contexts=["documents.data"])
    with engine.begin() as connection:
        connection.execute(insert(papers).values(id=1, data=type_coerce(b"{}", LargeBinary)))
        with pytest.raises(NotSealedError):
            connection.scalar(select(papers.c.data))


def test_accepted_contexts_are_a_list_of_names() -> None:
    with pytest.raises(ConfigurationError, match="accept_contexts"):
        EncryptedJSON(accept_contexts="documents.data")


# -- the statement cache ---------------------------------------------------------------------------


def test_interleaved_statements_never_use_each_others_context(engine: Engine) -> None:
    """Same SQL shape, same names, other contexts: one engine, one statement cache."""
    metadata = MetaData()
    tables = [
        Table(
            name,
            metadata,
            Column("id", Integer, primary_key=True),
            Column("a", EncryptedJSON),
            Column("b", EncryptedJSON),
        )
        for name in ("first", "second")
    ]
    metadata.create_all(engine)
    # The same table and column under two contexts: nothing but the type tells them apart.
    twin = Table(
        "first",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("a", EncryptedJSON(context="twin.a")),
        Column("b", EncryptedJSON(context="twin.b")),
    )
    variants = [*tables, twin]
    order = random.Random(1)
    written: dict[tuple[str, int], list[Table]] = {}
    with engine.begin() as connection:
        for id_ in range(1, 61):
            table = order.choice(variants)
            connection.execute(insert(table), {"id": id_, "a": {"id": id_}, "b": [id_]})
            written.setdefault((table.name, id_), []).append(table)
        for (_, id_), (table,) in order.sample(sorted(written.items(), key=str), len(written)):
            column = order.choice([table.c.a, table.c.b])
            expected = {"id": id_} if column.name == "a" else [id_]
            alias = aliased(table) if order.random() < 0.5 else table
            source = alias.c[column.name]
            assert connection.scalar(select(source).where(alias.c.id == id_)) == expected
            others = [t for t in variants if t.name == table.name and t is not table]
            for other in others:
                with pytest.raises(TamperedError):
                    connection.scalar(select(other.c.a).where(other.c.id == id_))


def test_the_cache_keeps_types_with_other_options_apart(engine: Engine, documents: Table) -> None:
    def table(**options: Any) -> Table:
        return Table(
            "documents",
            MetaData(),
            Column("id", Integer, primary_key=True),
            Column("data", EncryptedJSON(**options)),
        )

    with engine.connect() as connection:
        for _ in range(2):
            plain = connection.scalar(select(table(redact=False).c.data))
            redacted = connection.scalar(select(table().c.data))
            lazy: Any = connection.scalar(select(table(lazy=True).c.data))
            typed = connection.scalar(select(table(schema=dict[str, int]).c.data))
            assert repr(plain) == "{'a': 1}"
            assert repr(redacted) == "<redacted dict>"
            assert lazy.open() == typed == {"a": 1}
            with pytest.raises(Exception, match="does not fit"):
                connection.scalar(select(table(schema=list[int]).c.data))


def test_the_cache_keeps_contexts_apart_where_no_column_tells_them_apart(
    engine: Engine, documents: Table
) -> None:
    first, second = EncryptedJSON(context="first"), EncryptedJSON(context="second")
    if engine.driver == "pymysql" and pymysql.VERSION < (1, 2, 1):
        # It sends bytes as text, which a SELECT without a column gives back as text.
        engine = create_engine(engine.url.update_query_dict({"binary_prefix": "true"}))
    with engine.connect() as connection:
        for _ in range(2):
            for type_ in (first, second, documents.c.data.type):
                assert connection.scalar(select(literal({"a": 1}, type_))) == {"a": 1}
            query = "SELECT data FROM documents"
            good = text(query).columns(data=documents.c.data.type)
            assert connection.scalar(good) == {"a": 1}
            for type_ in (first, second):
                with pytest.raises(TamperedError, match=type_.context):
                    connection.scalar(text(query).columns(data=type_))
    engine.dispose()


def test_every_option_is_part_of_the_cache_key() -> None:
    class Subclass(EncryptedJSON):
        cache_ok = True

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)

    options: dict[str, Any] = {
        "none_as_null": True,
        "context": "a.b",
        "accept_contexts": ["c.d"],
        "lazy": True,
        "redact": False,
        "bound_to": ["e"],
        "schema": dict[str, int],
        "create_constraint": False,
    }
    for type_ in (EncryptedJSON, Subclass):
        assert options.keys() == inspect.signature(EncryptedJSON).parameters.keys()
        keys = {type_()._static_cache_key}
        for name, value in options.items():
            keys.add(type_(**{name: value})._static_cache_key)
        assert len(keys) == 1 + len(options)


def test_sessions_of_two_models_over_one_engine_do_not_mix_contexts(engine: Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class First(Base):
        __tablename__ = "firsts"
        id: Mapped[int] = mapped_column(primary_key=True)
        a: Mapped[Any] = mapped_column(EncryptedJSON)
        b: Mapped[Any] = mapped_column(EncryptedJSON)

    class Second(Base):
        __tablename__ = "seconds"
        id: Mapped[int] = mapped_column(primary_key=True)
        a: Mapped[Any] = mapped_column(EncryptedJSON)
        b: Mapped[Any] = mapped_column(EncryptedJSON)

    Base.metadata.create_all(engine)
    with Session(engine) as session:
        models: list[Any] = [First, Second]
        for id_ in range(1, 6):
            for model in models:
                session.add(model(id=id_, a={"a": id_}, b={"b": id_}))
                session.commit()
                row = session.get_one(model, id_)
                row.a, row.b = row.b, row.a
                session.commit()
                assert (row.a, row.b) == ({"b": id_}, {"a": id_})
