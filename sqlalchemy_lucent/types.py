"""``EncryptedJSON``: a drop-in for :class:`sqlalchemy.JSON` whose values are sealed.

::

    class Integration(Base):
        __tablename__ = "integrations"
        id: Mapped[int] = mapped_column(primary_key=True)
        credentials: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)

The type only adapts. It holds no key: the keyring is looked up each time a value is sealed or
opened. Every value is bound to a *context*, ``table.column``. The type learns it when its column
joins a table; until then it refuses to seal.

A value that is *written into* a statement (``insert(table).values(data=value)``, ``literal()``)
stays in the memory of that statement, and in the engine's statement cache, where SQLAlchemy keeps
the first statement of each form; ``statement.compile().params`` and ``repr(literal(value, type))``
show it. The ORM's own writes, and parameters passed to ``execute()``, are in none of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from inspect import signature
from typing import Any, Final, NoReturn

from sqlalchemy import JSON, Column, LargeBinary, Table, event, type_coerce
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import operators
from sqlalchemy.sql.base import SchemaEventTarget
from sqlalchemy.sql.elements import ColumnClause, ColumnElement, Null
from sqlalchemy.types import TypeDecorator, TypeEngine

from . import _sql
from ._check import attach_check
from ._envelope import as_bytes
from ._json import STRICT, EngineCodec, same_document
from ._row import RowPart as RowPart
from ._row import row_checks
from ._schema import Schema
from ._sealing import Bound as Bound
from ._sealing import ColumnCodec, SealedType, parameter_sealer
from ._sealing import Sealed as Sealed
from ._sql import is_mysql
from ._statements import refuse_unsealed_defaults, watch
from .exceptions import ConfigurationError, UnsupportedOperationError


class EncryptedComparator(TypeDecorator.Comparator[Any]):
    """What SQL may do with a sealed column: test for NULL, and read the key version.

    Every other operator is refused when the expression is built, or when it is compiled if it
    compares two columns. SQLAlchemy does not ask the type about the following, which work on the
    stored bytes:

    - ``order_by(col)``, ``desc(col)``: an order that means nothing
    - ``group_by(col)``, ``distinct()``, ``UNION``: no two values are ever the same
    - ``func.max(col)``: one of the values
    - ``cast(col, T)``: the bytes as another type, or an error of the database
    - ``other == col``, ``other.in_(select(col))``: never true
    """

    __slots__ = ()

    @property
    def key_version(self) -> ColumnElement[str]:
        """The key version of each value as SQL, for WHERE, GROUP BY, indexes and constraints."""
        return _sql.key_version(self.expr)

    def operate(self, op: operators.OperatorType, *other: Any, **kwargs: Any) -> Any:
        """Build a test for NULL; refuse everything else."""
        if op in _NULL_TESTS:
            if other[0] is None or isinstance(other[0], Null):
                return super().operate(op, *other, **kwargs)
            if isinstance(other[0], ColumnClause) and op in (operators.eq, operators.ne):
                return _sql.RefusedComparison(self.expr, other[0], op)
        raise _sql.comparison_refused(op)

    def reverse_operate(self, op: operators.OperatorType, other: Any, **kwargs: Any) -> Any:
        """Refuse: no test for NULL has the column on its right."""
        raise _sql.comparison_refused(op)


_NULL_TESTS: Final = frozenset({operators.eq, operators.ne, operators.is_, operators.is_not})


class EncryptedJSON(SealedType):
    """A column of JSON values, each sealed with AES-256-GCM and bound to its column.

    :param none_as_null: as in :class:`sqlalchemy.JSON`: store Python ``None`` as SQL NULL rather
        than as the (sealed) JSON value ``null``.
    :param context: what values are bound to, if not ``table.column``. After a table or column was
        renamed, give its old name here to keep opening its rows.
    :param accept_contexts: earlier contexts whose values still open. New values are sealed in
        `context`.
    :param lazy: return :class:`Sealed` objects, so that reading rows opens none.
    :param redact: return ``dict``, ``list`` and ``str`` values that do not print themselves.
    :param bound_to: names of the columns whose values each value is bound to as well. Declare such
        a column with :func:`sqlalchemy_lucent.row_bound`.
    :param schema: take and return values of this type (a dataclass, TypedDict, msgspec Struct or
        pydantic model, or an annotation made of them) rather than plain JSON. A stored document
        that does not fit raises :exc:`SchemaMismatchError`. `redact` has no effect on such values:
        their type decides how they print.
    :param create_constraint: add a CHECK constraint to the table's DDL that refuses unsealed
        values, whoever writes them. It is named by the MetaData's naming convention.

    In a subclass, set ``cache_ok = True``, and let an ``__init__`` take and pass on ``**options``:
    SQLAlchemy builds the statement cache's key from the parameters that it finds there.

    A pickled model holds what its attributes hold. That includes opened values, as with
    :class:`sqlalchemy.JSON`; the attributes of a lazy or row-bound column pickle as ciphertext.
    """

    impl = LargeBinary
    cache_ok = True
    hashable = False
    comparator_factory = EncryptedComparator
    NULL = JSON.NULL

    tracks_changes = False
    _owner: Table | None = None
    """The table whose columns values are bound to, once the column has joined it."""

    # SQLAlchemy builds the statement cache's key from the attributes named like these parameters.
    # So everything that changes what a processor does must be one of them, and no key may be. They
    # are not keyword-only because SQLAlchemy does not see such parameters.
    def __init__(
        self,
        none_as_null: bool = False,
        context: str | None = None,
        accept_contexts: Iterable[str] = (),
        lazy: bool = False,
        redact: bool = True,
        bound_to: Iterable[str] = (),
        schema: Any = None,
        create_constraint: bool = True,
    ) -> None:
        super().__init__()
        self.none_as_null = none_as_null
        self.context = context
        self.accept_contexts = _names("accept_contexts", accept_contexts)
        self.lazy = lazy
        self.redact = redact
        self.bound_to = _names("bound_to", bound_to)
        self.schema = schema
        self.create_constraint = create_constraint
        self._context_is_derived = False
        if schema is not None:
            Schema(schema)  # raises if it cannot convert it
        if self.bound_to:
            from .binding import bind_attributes  # imports the ORM

            _when_mapped(bind_attributes)

    @classmethod
    def mutable(cls, none_as_null: bool = False, **options: Any) -> EncryptedJSON:
        """Return a type that writes edits of its ``dict`` and ``list`` values, at any depth, at the
        next flush. See :mod:`sqlalchemy_lucent.mutable`. The parameters are those of the class.

        :raises ConfigurationError: `lazy` or `bound_to` is given: such values are opened each time,
            so set the attribute instead. Or `schema` has mutable values that are neither a dict nor
            a list.
        """
        type_ = cls(none_as_null, **options)
        if type_.lazy or type_.bound_to:
            raise ConfigurationError("a lazy or row-bound EncryptedJSON does not track changes")
        untracked = None if type_.schema is None else Schema(type_.schema).untracked_part()
        if untracked is not None:
            raise ConfigurationError(
                f"EncryptedJSON.mutable(schema=) sees edits of dicts and lists (also of a "
                f"TypedDict), not those of {untracked}; use EncryptedJSON(schema=) and set the "
                "attribute to a new value"
            )
        type_.tracks_changes = True
        from .mutable import track_mapped_columns  # imports the ORM

        _when_mapped(track_mapped_columns)
        return type_

    @property
    def should_evaluate_none(self) -> bool:
        """Whether the ORM passes ``None`` to this type rather than leaving the column out."""
        return not self.none_as_null

    @should_evaluate_none.setter
    def should_evaluate_none(self, value: bool) -> None:
        self.none_as_null = not value

    @property
    def python_type(self) -> type[Any]:
        """The schema, if it is a class; else what :class:`sqlalchemy.JSON` says."""
        return self.schema if isinstance(self.schema, type) else JSON().python_type

    # -- context ---------------------------------------------------------------------------------

    def _set_parent(self, parent: SchemaEventTarget, outer: bool = False, **kw: Any) -> None:
        super()._set_parent(parent, outer=outer, **kw)
        if isinstance(parent, Column):
            if isinstance(getattr(parent, "table", None), Table):
                _derive_context(parent, parent.table)
            else:
                event.listen(parent, "after_parent_attach", _derive_context)

    def _attached(self, context: str, owner: Table) -> EncryptedJSON:
        """Return a copy of this type for the column that it has joined. Copies let any number of
        columns share one instance.
        """
        is_given = self.context is not None and not self._context_is_derived
        if (is_given or self.context == context) and not self.bound_to:
            return self
        if not is_given and context.count(".") > 1:
            raise ConfigurationError(
                f"{context!r} has a name with a dot in it, so it may be the context of another "
                "column too: give the column a context of its own, EncryptedJSON(context=...). If "
                f"it has sealed values already, context={context!r} opens them"
            )
        attached = self.copy()
        if not is_given:
            attached.context = context
            attached._context_is_derived = True
        if self.bound_to:
            attached._owner = owner
        return attached

    @property
    def explicit_context(self) -> str | None:
        """The context that was given; ``None`` if it was derived from the column."""
        return None if self._context_is_derived else self.context

    # -- values ----------------------------------------------------------------------------------

    def column_codec(self, dialect: Dialect) -> ColumnCodec:
        """Return what seals and opens this column's values on `dialect`. Internal."""
        serializer = getattr(dialect, "_json_serializer", None)
        deserializer = getattr(dialect, "_json_deserializer", None)
        codec = EngineCodec(serializer, deserializer) if serializer or deserializer else STRICT
        schema = None if self.schema is None else Schema(self.schema)
        return ColumnCodec(self.contexts, codec, self.bound_to, self.redact, schema)

    # `process_bind_param` would be followed by LargeBinary's own processor, which wraps every value
    # in a memoryview that no supported driver needs.
    def bind_processor(self, dialect: Dialect) -> Callable[[Any], bytes | None]:
        """Return the function that seals parameters."""
        codec = self.column_codec(dialect)
        checks = row_checks(self._owner, self.bound_to, str(self.context), dialect)
        return parameter_sealer(codec, none_as_null=self.none_as_null, checks=checks)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        """Return the function that opens results."""
        codec = self.column_codec(dialect)
        if self.lazy or self.bound_to:
            return lambda data: None if data is None else Sealed(as_bytes(data), codec)
        return codec.open

    def literal_processor(self, dialect: Dialect) -> NoReturn:
        """Refuse: a literal would put the value into SQL text, and errors about it into logs."""
        # Raised here, because SQLAlchemy turns an error of a processor into a CompileError that
        # shows the value.
        raise UnsupportedOperationError(
            "an EncryptedJSON value is not rendered into SQL text (literal_binds, offline mode); "
            "execute the statement with bound parameters"
        )

    def with_variant(self, type_: Any, *dialect_names: str) -> EncryptedJSON:
        """As in SQLAlchemy, but only another EncryptedJSON is a variant of this type.

        :raises UnsupportedOperationError: `type_` would store plaintext on that database.
        """
        variant = type_() if isinstance(type_, type) else type_
        if not isinstance(variant, EncryptedJSON):
            raise UnsupportedOperationError(
                f"with_variant({type(variant).__name__}) would store plaintext on "
                f"{', '.join(dialect_names)}; the variant of an EncryptedJSON is an EncryptedJSON"
            )
        return super().with_variant(variant, *dialect_names)

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        """Open each value in the context of its own column, where one result column has values of
        several (a subquery of UNION, concrete inheritance, ``coalesce``, CASE).

        :raises UnsupportedOperationError: the columns differ in more than their context.
        """
        if isinstance(getattr(column, "table", None), Table) or self.context is None:
            return column
        contexts = dict.fromkeys(self.contexts)
        for source in _sql.sources(column):
            type_ = getattr(source, "type", None)
            if isinstance(type_, EncryptedJSON) and type_.context is not None:
                contexts.update(dict.fromkeys(type_.contexts))
                if any(getattr(type_, name) != getattr(self, name) for name in _READING_OPTIONS):
                    raise UnsupportedOperationError(
                        f"one result column has values of {self.context} and of {type_.context}, "
                        f"whose types differ in one of {', '.join(_READING_OPTIONS)}: select "
                        "them as two columns"
                    )
        if len(contexts) == len(self.contexts):
            return column
        merged = self.copy()
        merged.accept_contexts = tuple(contexts)[1:]
        return type_coerce(column, merged)

    # -- the database's side ---------------------------------------------------------------------

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """LONGBLOB on MySQL and MariaDB, where BLOB ends at 64 KiB; LargeBinary elsewhere."""
        # SQLAlchemy calls this before it executes any statement that has a value of this type.
        watch(dialect)
        if is_mysql(dialect):
            from sqlalchemy.dialects.mysql import LONGBLOB  # with that database only

            return dialect.type_descriptor(LONGBLOB())
        return dialect.type_descriptor(LargeBinary())

    def compare_values(self, x: Any, y: Any) -> bool:
        """Say whether `x` may be left unwritten where it replaces `y`.

        Plain JSON is compared as it would be written: ``1``, ``1.0`` and ``True`` differ, as do
        ``0.0`` and ``-0.0``, and two orders of names. Any other value is written. So is one that
        shares a dict or list with the old value, because it may have been edited in place.
        """
        if isinstance(x, Sealed) or isinstance(y, Sealed):
            return bool(x == y)
        return (x is y and self.tracks_changes) or same_document(x, y)

    def __repr__(self) -> str:
        arguments = [
            f"{name}={getattr(self, name)!r}"
            for name, parameter in _SHOWN.items()
            if getattr(self, name) != parameter.default
            and not (name == "context" and self._context_is_derived)
        ]
        return f"{type(self).__name__}({', '.join(arguments)})"


_READING_OPTIONS: Final = ("lazy", "redact", "bound_to", "schema")

# What `repr` shows, and so what migrations contain. A migration could not import the schema.
_SHOWN: Final = {n: p for n, p in signature(EncryptedJSON).parameters.items() if n != "schema"}


def _names(parameter: str, names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(f"EncryptedJSON({parameter}=) takes a list of names")
    return tuple(names)


def _when_mapped(listener: Callable[[Any, type[Any]], None]) -> None:
    """Call `listener` for each mapper when it is configured: by then, column types are final."""
    from sqlalchemy.orm import Mapper  # only for whoever has such a column

    if not event.contains(Mapper, "mapper_configured", listener):
        event.listen(Mapper, "mapper_configured", listener)


def _derive_context(column: Column[Any], table: Any) -> None:
    """Give the column's type its context, now that the column has joined its table."""
    if not isinstance(table, Table):
        return
    context = f"{table.name}.{column.name}"
    type_ = column.type
    if isinstance(type_, EncryptedJSON):
        column.type = type_ = type_._attached(context, table)
        refuse_unsealed_defaults(column, type_)
    variants = {
        dialect: variant._attached(context, table)
        for dialect, variant in type_._variant_mapping.items()
        if isinstance(variant, EncryptedJSON)
    }
    if variants:
        column.type = type_.copy()
        column.type._variant_mapping = type_._variant_mapping.union(variants)
    sealed = [t for t in (column.type, *variants.values()) if isinstance(t, EncryptedJSON)]
    if any(type_.create_constraint for type_ in sealed):
        attach_check(column, table, partial(has_check, column))


def has_check(column: Column[Any], dialect: Dialect) -> bool:
    """Say whether a column has its CHECK constraint in its table's DDL on `dialect`."""
    type_ = column.type._variant_mapping.get(dialect.name, column.type)
    return isinstance(type_, EncryptedJSON) and type_.create_constraint


@compiles(EncryptedJSON)
def _compile_type(type_: EncryptedJSON, compiler: Any, **kw: Any) -> str:
    # A default may have been given to the column after it joined its table.
    column = kw.get("type_expression")
    if isinstance(column, Column):
        refuse_unsealed_defaults(column, type_)
    return str(compiler.visit_type_decorator(type_, **kw))
