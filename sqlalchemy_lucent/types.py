"""``EncryptedJSON``: a drop-in for :class:`sqlalchemy.JSON` whose values are sealed.

::

    class Integration(Base):
        __tablename__ = "integrations"
        id: Mapped[int] = mapped_column(primary_key=True)
        credentials: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)

The type only adapts. It holds no key: the keyring is looked up each time a value is sealed or
opened. It knows its *context*, ``table.column``, which every value is bound to, from the moment
its column joins a table; until then it has none, and refuses to seal.

A value that is *written into* a statement (``insert(table).values(data=value)``, ``literal()``) is
in the memory of that statement, and of the engine's statement cache, where SQLAlchemy keeps the
first statement of each form; ``statement.compile().params`` and ``repr(literal(value, type))`` show
it. The ORM's own writes, and parameters passed to ``execute()``, are in none of these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Final, NoReturn

from sqlalchemy import (
    JSON,
    BindParameter,
    Column,
    CompoundSelect,
    LargeBinary,
    Table,
    event,
    inspect,
    type_coerce,
)
from sqlalchemy.engine import Dialect, ExceptionContext
from sqlalchemy.exc import StatementError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import operators
from sqlalchemy.sql.base import SchemaEventTarget
from sqlalchemy.sql.dml import Insert, Update
from sqlalchemy.sql.elements import (
    Cast,
    ClauseElement,
    ColumnClause,
    ColumnElement,
    Null,
    TextClause,
    TypeCoerce,
)
from sqlalchemy.sql.sqltypes import _Binary
from sqlalchemy.types import NullType, TypeDecorator, TypeEngine

from . import _sql
from ._check import attach_check
from ._driver_errors import HIDDEN, hide_row
from ._envelope import Envelope, parse
from ._json import STRICT, Codec, EngineCodec, decode, same_document
from ._redacted import REDACTED, redact
from ._row import RowPart as RowPart
from ._row import encode_row as encode_row
from ._row import fault_of_type, value_check
from ._schema import Schema
from ._sql import is_mysql
from .exceptions import (
    ConfigurationError,
    LucentError,
    PicklingRefusedError,
    SerializationError,
    TamperedError,
    UnsupportedOperationError,
    hide_locals,
)
from .keyring import Keyring, context_keys

_JSON_NULL: Final = b"null"


class ColumnCodec:
    """Seals and opens the values of one column as one engine sees it. Internal."""

    __slots__ = ("_context", "_redacted", "bound_to", "codec", "contexts", "is_plain", "schema")

    def __init__(
        self,
        contexts: tuple[str, ...],
        codec: Codec,
        bound_to: tuple[str, ...],
        redacts: bool,
        schema: Schema[Any] | None = None,
    ) -> None:
        self.contexts = contexts
        self.codec = codec
        self.bound_to = bound_to
        self.schema = schema
        self.is_plain = schema is None and codec is STRICT
        """Whether values are JSON documents as the default codec writes them, and nothing else."""
        self._context = contexts[0]
        self._redacted = REDACTED if redacts else {}

    def seal(self, value: Any, row: bytes = b"", keyring: Keyring | None = None) -> bytes:
        """Return the stored bytes of a value."""
        try:
            if self.schema is not None and value is not None:
                value = self.schema.dump(value)
            document = self.codec.dumps(value)
        except SerializationError as error:
            fault = str(error)
        else:
            return context_keys(self.contexts[0], keyring).primary.seal(document, row)
        raise SerializationError(f"{self.contexts[0]}: {fault}")

    def open(self, data: Any, row: bytes = b"", keyring: Keyring | None = None) -> Any:
        """Return the value of stored bytes; ``None`` for SQL NULL.

        What is usual is done without the layers between this column and its key; whatever else
        there is, and whatever is wrong, goes through them.
        """
        if data is None:
            return None
        if self.is_plain:
            try:
                keys = context_keys(self._context, keyring)
                value = decode(
                    keys.subkeys[data[: keys.primary_header_size]].open(data, row) or b""
                )
            except Exception:  # noqa: BLE001, S110  (raised again by what follows, which says more)
                pass
            else:
                wrapper = self._redacted.get(type(value))
                return value if wrapper is None else wrapper(value)
        try:
            return self._open_through_the_layers(data, row, keyring)
        except LucentError as error:
            fault = error.with_traceback(None)
        del data  # a tracker of errors would send it, and it may be plaintext
        raise fault

    def __reduce__(self) -> tuple[type[ColumnCodec], tuple[object, ...]]:
        redacts = bool(self._redacted)
        return type(self), (self.contexts, self.codec, self.bound_to, redacts, self.schema)

    def __deepcopy__(self, memo: object) -> ColumnCodec:
        return self

    def _open_through_the_layers(self, data: Any, row: bytes, keyring: Keyring | None) -> Any:
        document = open_in_contexts(self.contexts, data, row, keyring)
        if self.schema is None:
            value = self.codec.loads(document)
        elif document == _JSON_NULL:
            return None  # a column's NULL rules do not depend on its schema
        else:
            value = self.schema.load(
                document if self.codec is STRICT else self.codec.loads(document)
            )
        return redact(value) if self._redacted else value


def as_bytes(value: Any) -> bytes:
    """Return what a driver gave as bytes: some give a memoryview, and SQLite gives text or a number
    for a plaintext that was never sealed.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    return str(value).encode("utf-8", "replace")


def open_in_contexts(
    contexts: Sequence[str], data: Any, row: bytes, keyring: Keyring | None
) -> bytes:
    """Return the plaintext of `data` under the first of `contexts` that it was sealed in."""
    if type(data) is not bytes:
        data = as_bytes(data)
    try:
        return context_keys(contexts[0], keyring).open(data, row)
    except TamperedError as error:
        refusal = error
    for context in contexts[1:]:
        try:
            return context_keys(context, keyring).open(data, row)
        except TamperedError:
            continue
    raise refusal


class Sealed:
    """A stored value that was not opened: what lazy and row-bound columns give.

    Holds ciphertext only; ``repr`` and pickles show no plaintext. Equal and hashed by its bytes.
    """

    __slots__ = ("_codec", "_data", "_opened", "_sealed_for")

    _opened: Any

    def __init__(self, data: bytes, codec: ColumnCodec, sealed_for: bytes | None = None) -> None:
        self._data = data
        self._codec = codec
        self._sealed_for = sealed_for
        """The row context that this process has just sealed it with, if it has."""

    def open(self, *, row: Sequence[RowPart] | None = None, keyring: Keyring | None = None) -> Any:
        """Open the value.

        :param row: the values of the columns that it is bound to, in the order of ``bound_to``;
            for a row-bound column only.
        :param keyring: the keyring to use; the default one if left out.
        :raises DecryptionError: it does not open; the subclass says why.
        :raises ConfigurationError: `row` is missing, or given for a column that has none.
        """
        return self._codec.open(self._data, self._encode_row(row), keyring)

    def _encode_row(self, row: Sequence[RowPart] | None) -> bytes:
        names = self._codec.bound_to
        if len(names) != (0 if row is None else len(row)):
            raise ConfigurationError(
                f"a value of {self._codec.contexts[0]} opens with "
                + (f"row=({', '.join(names)})" if names else "no row=")
            )
        return encode_row(row or (), names)

    def _open_once(self, row: Sequence[RowPart]) -> Any:
        # Kept here so that it goes when the ORM replaces this object on refresh, and so that a
        # pickle of the model leaves it out.
        try:
            return self._opened
        except AttributeError:
            self._opened = self.open(row=row)
            return self._opened

    def _is_open(self) -> bool:
        return hasattr(self, "_opened")

    @property
    def _envelope(self) -> Envelope | None:
        return parse(self._data)

    @property
    def key_version(self) -> str | None:
        """The version of the key that sealed the value; ``None`` if the bytes are not sealed."""
        envelope = self._envelope
        return None if envelope is None else envelope.version

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of that key; ``None`` if the bytes are not sealed."""
        envelope = self._envelope
        return None if envelope is None else envelope.key_id.hex()

    def __bytes__(self) -> bytes:
        return self._data

    def __eq__(self, other: object) -> bool:
        return self._data == other._data if isinstance(other, Sealed) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._data)

    def __repr__(self) -> str:
        return (
            f"<Sealed {self._codec.contexts[0]} key_version={self.key_version} "
            f"{len(self._data)} bytes>"
        )

    def __getstate__(self) -> tuple[bytes, ColumnCodec]:
        return self._data, self._codec

    def __setstate__(self, state: tuple[bytes, ColumnCodec]) -> None:
        self._data, self._codec = state
        self._sealed_for = None


class Bound:
    """A plain value on its way into a row-bound column, with the row that it belongs to.

    The ORM attribute makes these itself; in Core, write
    ``insert(table).values(payload=Bound(value, row=(tenant_id, name)), …)``.

    :param value: the JSON value.
    :param row: the values of the binding columns, or a callable that gives them when the
        statement is executed.
    """

    __slots__ = ("_row", "value")

    def __init__(
        self, value: Any, row: Sequence[RowPart] | Callable[[], Sequence[RowPart]]
    ) -> None:
        self.value = value
        self._row = row

    @property
    def row(self) -> Sequence[RowPart]:
        """The values of the binding columns, as they are now."""
        return self._row() if callable(self._row) else self._row

    def __repr__(self) -> str:
        return "<Bound: a value not yet sealed>"

    @hide_locals
    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PicklingRefusedError(
            "a value that was set and not yet read back from the database is not pickled: it is "
            "plaintext. Flush and refresh the object first"
        )


class EncryptedComparator(TypeDecorator.Comparator[Any]):
    """What SQL may do with a sealed column: test for NULL, and tell the key version.

    Every operator is refused when the expression is built; a column compared with a column, when
    it is compiled. What SQLAlchemy does not ask a type about is not seen here, and works on the
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


class EncryptedJSON(TypeDecorator[Any]):
    """A column of JSON values, each sealed with AES-256-GCM and bound to its column.

    :param none_as_null: as in :class:`sqlalchemy.JSON`: store Python ``None`` as SQL NULL rather
        than as the (sealed) JSON value ``null``.
    :param context: what values are bound to, if not ``table.column``. A table or column that was
        renamed keeps opening its rows when its old name is given here.
    :param accept_contexts: earlier contexts whose values still open. New values are sealed under
        `context`.
    :param lazy: give :class:`Sealed` objects, so that reading rows opens none.
    :param redact: give ``dict``, ``list`` and ``str`` values that do not print themselves.
    :param bound_to: names of columns whose values each value is bound to as well. Declare such a
        column with :func:`sqlalchemy_lucent.row_bound`.
    :param schema: give and take values of this type (a dataclass, TypedDict, msgspec Struct or
        pydantic model, or an annotation made of them) rather than plain JSON. A stored document
        that does not fit raises :exc:`SchemaMismatchError`. How such a value prints itself is its
        type's affair, whatever `redact` says.
    :param create_constraint: have the table's DDL refuse what is not sealed, whoever writes it, by
        a CHECK constraint that is named as the MetaData's naming convention says.

    In a subclass, set ``cache_ok = True``, and let an ``__init__`` take and pass on ``**options``:
    SQLAlchemy makes the statement cache's key of the parameters that it finds there.

    A pickled model holds what its attributes hold, so an opened value is in it, as with
    :class:`sqlalchemy.JSON`; the pickle of one that is lazy or row-bound holds ciphertext.
    """

    impl = LargeBinary
    cache_ok = True
    hashable = False
    comparator_factory = EncryptedComparator
    NULL = JSON.NULL

    none_as_null: bool
    context: str | None
    accept_contexts: tuple[str, ...]
    lazy: bool
    redact: bool
    bound_to: tuple[str, ...]
    schema: Any
    create_constraint: bool

    tracks_changes = False
    _owner: Table | None = None
    """The table whose columns values are bound to, once the column has joined it."""

    # The statement cache's key is made of the attributes that are named like these parameters, so
    # everything that changes what a processor does must be one of them, and no key may be. They
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
            Schema(schema)  # refuses here what it cannot convert
        if self.bound_to:
            _watch_mappers()

    @classmethod
    def mutable(cls, none_as_null: bool = False, **options: Any) -> EncryptedJSON:
        """Return a type whose ``dict`` and ``list`` values write edits at any depth at flush.

        See :mod:`sqlalchemy_lucent.mutable`. The parameters are those of the class.

        :raises ConfigurationError: `lazy` or `bound_to` is among them: such values are opened each
            time, so set the attribute instead. Or `schema` has values that may be edited and are
            neither a dict nor a list.
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
        from sqlalchemy.orm import Mapper  # with the ORM only

        from .mutable import track_mapped_columns

        # Whether a mapped column asks for tracking is known when its mapper is configured. One
        # listener serves them all.
        if not event.contains(Mapper, "mapper_configured", track_mapped_columns):
            event.listen(Mapper, "mapper_configured", track_mapped_columns)
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
        """Return the type for a column of this name: a copy, so that one instance may be given
        to any number of columns.
        """
        is_given = self.context is not None and not self._context_is_derived
        if (is_given or self.context == context) and not self.bound_to:
            return self
        if not is_given and context.count(".") > 1:
            raise ConfigurationError(
                f"{context!r} may be the context of another column too, because a name in it has "
                "a dot: give the column a context of its own, EncryptedJSON(context=...). If it "
                f"has sealed values already, context={context!r} opens them"
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
        """The context that was given; ``None`` if it is that of the column."""
        return None if self._context_is_derived else self.context

    @property
    def contexts(self) -> tuple[str, ...]:
        """The context that values are sealed under, then those that are opened too.

        :raises ConfigurationError: the type has no context.
        """
        if self.context is None:
            raise ConfigurationError(
                "this EncryptedJSON belongs to no column of a table, so it has no context to bind "
                'values to; give it one: EncryptedJSON(context="table.column")'
            )
        return (self.context, *self.accept_contexts)

    # -- values ----------------------------------------------------------------------------------

    def column_codec(self, dialect: Dialect) -> ColumnCodec:
        """Return what seals and opens this column's values on `dialect`. Internal."""
        serializer = getattr(dialect, "_json_serializer", None)
        deserializer = getattr(dialect, "_json_deserializer", None)
        codec = EngineCodec(serializer, deserializer) if serializer or deserializer else STRICT
        schema = None if self.schema is None else Schema(self.schema)
        return ColumnCodec(self.contexts, codec, self.bound_to, self.redact, schema)

    def _row_checks(self, dialect: Dialect) -> list[Callable[[Any], str | None]]:
        """Return what tells of each binding column why a value would not come back from it."""
        checks: list[Callable[[Any], str | None]] = []
        if self._owner is None:
            return checks
        for name in self.bound_to:
            column = self._owner.columns.get(name)
            fault = "which its table does not have" if column is None else fault_of_type(column)
            if column is None or fault is not None:
                raise ConfigurationError(f"{self.context} is bound to {name!r}, {fault}")
            checks.append(value_check(column, dialect))
        return checks

    # `process_bind_param` would run behind LargeBinary's own processor, which wraps every value in
    # a memoryview that no supported driver needs.
    def bind_processor(self, dialect: Dialect) -> Callable[[Any], bytes | None]:
        """Return the function that seals parameters."""
        column = self.column_codec(dialect)
        seal, bound_to = column.seal, column.bound_to
        none_as_null, json_null = self.none_as_null, JSON.NULL
        context, dumps = column.contexts[0], column.codec.dumps
        usual = _PLAIN_TYPES if column.is_plain and not bound_to else frozenset()
        checks = self._row_checks(dialect)

        @hide_locals
        def unusual(value: Any) -> bytes | None:
            row = b""
            kind = type(value)
            if kind is Bound:
                row = _row_of(value, column, checks)
                value = value.value
                kind = type(value)
                if kind is Sealed:
                    return _reuse(value, column, row)
            elif kind is Sealed:
                return _reuse(value, column, None)
            elif bound_to:
                if value is None or kind is Null:
                    return None
                raise _unbound(column)
            if value is None:
                if none_as_null:
                    return None
            elif value is json_null:
                value = None
            elif kind is Null:
                return None
            return seal(value, row)

        def process(value: Any) -> bytes | None:
            # What is usual is sealed without the layers between this column and its key; whatever
            # else there is, and whatever is wrong, goes through them.
            if type(value) in usual:
                try:
                    return context_keys(context).primary.seal(dumps(value))
                except SerializationError as error:
                    fault = str(error)
                except LucentError:
                    fault = ""  # raised again below, where more is said, and with nothing behind it
                if fault:
                    del value  # a tracker of errors would send it
                    raise SerializationError(f"{context}: {fault}")
            given, value = [value], None  # nor hold it here while it is refused there
            return unusual(given.pop())

        return process if usual else unusual

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        """Return the function that opens results."""
        column = self.column_codec(dialect)
        if self.lazy or self.bound_to:
            return lambda data: None if data is None else Sealed(as_bytes(data), column)
        return column.open

    def literal_processor(self, dialect: Dialect) -> NoReturn:
        """Refuse: a literal would put the value into SQL text, and errors about it into logs."""
        # Raised here and not from a processor: SQLAlchemy answers an error of a processor with a
        # CompileError that shows the value.
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
        """Open each value of a result column that takes them from several columns (a subquery of
        UNION, concrete inheritance, ``coalesce``, CASE) in the context of its own.

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
        # Every statement that has a value of this type comes here before it is executed.
        event.listen(dialect, "handle_error", _hide_unsealed_parameters)
        for execution in ("do_execute", "do_executemany", "do_execute_no_params"):
            event.listen(dialect, execution, _refuse_statement)
        event.listen(dialect, "handle_error", hide_row)
        if is_mysql(dialect):
            from sqlalchemy.dialects.mysql import LONGBLOB  # with that database only

            return dialect.type_descriptor(LONGBLOB())
        return dialect.type_descriptor(LargeBinary())

    def compare_values(self, x: Any, y: Any) -> bool:
        """Say whether `x`, set in the place of `y`, need not be written.

        Plain JSON is compared as it would be written: ``1``, ``1.0`` and ``True`` differ, and so
        do ``0.0`` and ``-0.0`` and two orders of names. Whatever else is set is written, and so is
        a value that has a dict or list of the old one in it, which may have been edited in place.
        """
        if isinstance(x, Sealed) or isinstance(y, Sealed):
            return bool(x == y)
        return (x is y and self.tracks_changes) or same_document(x, y)

    def __repr__(self) -> str:
        arguments = [
            f"{name}={getattr(self, name)!r}"
            for name, default in _DEFAULTS.items()
            if getattr(self, name) != default
            and not (name == "context" and self._context_is_derived)
        ]
        return f"{type(self).__name__}({', '.join(arguments)})"


_PLAIN_TYPES: Final = frozenset({dict, list, str, int, float, bool})
"""Types of values that are a document, and none of the forms that mean something else."""

_READING_OPTIONS: Final = ("lazy", "redact", "bound_to", "schema")

_DEFAULTS: Final[dict[str, object]] = {
    "none_as_null": False,
    "context": None,
    "accept_contexts": (),
    "lazy": False,
    "redact": True,
    "bound_to": (),
    "create_constraint": True,
}
"""What ``repr`` shows, which migrations hold: no schema, because it is a name of the user's."""


def _names(parameter: str, names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(f"EncryptedJSON({parameter}=) takes a list of names")
    return tuple(names)


def _watch_mappers() -> None:
    """Have mapped attributes of row-bound columns bind their values. One listener serves all."""
    from sqlalchemy.orm import Mapper  # only for whoever has such a column

    from .binding import bind_attributes

    if not event.contains(Mapper, "mapper_configured", bind_attributes):
        event.listen(Mapper, "mapper_configured", bind_attributes)


def _derive_context(column: Column[Any], table: Any) -> None:
    """Give the column's type its context, now that the column has joined its table."""
    if not isinstance(table, Table):
        return
    context = f"{table.name}.{column.name}"
    type_ = column.type
    if isinstance(type_, EncryptedJSON):
        column.type = type_ = type_._attached(context, table)
        _refuse_unsealed_defaults(column, type_)
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
    """Say whether the DDL of a column's table has its CHECK constraint on `dialect`."""
    type_ = column.type._variant_mapping.get(dialect.name, column.type)
    return isinstance(type_, EncryptedJSON) and type_.create_constraint


@compiles(EncryptedJSON)
def _compile_type(type_: EncryptedJSON, compiler: Any, **kw: Any) -> str:
    # A default may be given to a column after it joined its table.
    column = kw.get("type_expression")
    if isinstance(column, Column):
        _refuse_unsealed_defaults(column, type_)
    return str(compiler.visit_type_decorator(type_, **kw))


def _refuse_unsealed_defaults(column: Column[Any], type_: EncryptedJSON) -> None:
    """Refuse what the database would make a value of: it has no key to seal it with."""
    for name in ("server_default", "server_onupdate"):
        refuse_server_default(str(column), name, getattr(column, name))
    for name in ("default", "onupdate"):
        default = getattr(column, name)
        if default is None or default.is_scalar or default.is_callable:
            continue
        fault = "a Sequence" if default.is_sequence else _fault_of(default.arg, type_)
        if fault is not None:
            raise UnsupportedOperationError(
                f"{name}= of {column} would store a value that is not sealed ({fault}): give it a "
                "value or a function of Python"
            )


def refuse_server_default(column: str, name: str, default: Any) -> None:
    """Refuse a server default of a sealed column that is not NULL. Internal."""
    expression = getattr(default, "arg", default)
    if expression is None:
        return
    # FetchedValue, Computed and Identity are no expressions.
    if isinstance(expression, ClauseElement) and all(map(_is_null, _sql.sources(expression))):
        return
    raise UnsupportedOperationError(
        f"{name}= of {column} would store a value that is not sealed, because the database has no "
        "key: only NULL is a server default of a sealed column. Use default= or onupdate= with a "
        "value or a function of Python"
    )


_NULL: Final = re.compile(r"\s*\(*\s*NULL\s*(::[\w\s]+)?\)*\s*", re.IGNORECASE)


def _is_null(source: Any) -> bool:
    if isinstance(source, (Cast, TypeCoerce)):
        return all(map(_is_null, _sql.sources(source.clause)))
    if isinstance(source, TextClause) or getattr(source, "is_literal", False):
        return _NULL.fullmatch(str(source)) is not None
    return isinstance(source, Null)


def _fault_of(value: Any, type_: object) -> str | None:
    """Return what in `value` is not sealed for a column of `type_`; ``None`` if nothing is."""
    if hasattr(value, "__clause_element__"):
        value = value.__clause_element__()
    if not (isinstance(type_, EncryptedJSON) and isinstance(value, ClauseElement)):
        return None  # another column, or a value of Python, which the type binds
    for source in _sql.sources(value):
        fault = _fault_of_source(source, type_)
        if fault is not None:
            return fault
    return None


def _fault_of_source(source: Any, type_: EncryptedJSON) -> str | None:
    if _is_null(source):
        return None
    if isinstance(source, (Cast, TypeCoerce)):
        return _fault_of(source.clause, type_)
    if isinstance(source, TextClause) or getattr(source, "is_literal", False):
        return "SQL text"
    if isinstance(source, (ColumnClause, BindParameter)):
        given = source.type
        if isinstance(given, EncryptedJSON):
            if given.context in type_.contexts and given.bound_to == type_.bound_to:
                return None
            return f"values of {given.context}"
        if isinstance(given, _Binary):
            return None  # stored bytes, which the CHECK constraint judges
        kind = "the column" if isinstance(source, ColumnClause) else "a parameter"
        return f"{kind} of type {type(given).__name__}"
    return f"the expression {type(source).__name__}"


def _refuse_statement(*arguments: Any) -> None:
    """Refuse a statement that gives a sealed column a value that is not bound by its type, or
    whose UNION mixes values of several columns.

    SQLAlchemy asks a column's type about parameters only, not about SQL expressions, and about
    the first member of a UNION only. So this listens to each dialect that has met a sealed
    column, and sees a statement before it is executed. The arguments are those of ``do_execute``
    and its kind; the last is the context.
    """
    fault = _fault_of_statement(arguments[-1])
    del arguments  # there may be plaintext among the parameters
    if fault is not None:
        raise UnsupportedOperationError(fault)


def _fault_of_statement(context: Any) -> str | None:
    compiled = context.compiled
    if compiled is None:
        return None
    statement = compiled.statement
    statement = getattr(statement, "element", statement)  # what from_statement() was given
    if isinstance(statement, CompoundSelect):
        return _fault_of_union(statement)
    assigned = []
    if context.isinsert or context.isupdate:
        state = compiled.compile_state
        values = state._dict_parameters
        if values or state.statement._post_values_clause is not None:
            assigned.append((state.statement, state._multi_parameters or [values or {}]))
    inside = [cte.element for cte in getattr(compiled, "ctes", None) or ()]
    assigned += [(dml, _rows_of(dml)) for dml in inside if isinstance(dml, (Insert, Update))]
    for statement, rows in assigned:
        for key, value, takes_type in _values_of(statement, rows):
            if takes_type and isinstance(value, BindParameter) and isinstance(value.type, NullType):
                continue
            column = statement.table.c.get(key) if isinstance(key, str) else key
            type_ = getattr(column, "type", None)
            if isinstance(type_, TypeEngine):
                type_ = type_._variant_mapping.get(context.dialect.name, type_)
            fault = _fault_of(value, type_)
            if fault is not None:
                return (
                    f"{column} was given a value that its type does not seal ({fault}): pass a "
                    "value of Python, or a parameter that has no type or the column's. NULL, the "
                    "column itself and columns of the same context are taken too"
                )
    return None


def _fault_of_union(statement: CompoundSelect[Any]) -> str | None:
    for first, *others in zip(*_sql.columns_of_members(statement), strict=False):
        type_ = getattr(first, "type", None)
        if not isinstance(type_, EncryptedJSON):
            continue
        for source in chain.from_iterable(map(_sql.sources, others)):
            given = getattr(source, "type", None)
            if isinstance(given, EncryptedJSON) and not set(given.contexts) <= set(type_.contexts):
                return (
                    f"a UNION has values of {given.context} in the column of {type_.context}, and "
                    "SQLAlchemy opens all of them as the first: select from it as a subquery, "
                    "select(union.subquery()), or give both columns one context="
                )
    return None


def _rows_of(statement: Insert | Update) -> Sequence[Mapping[Any, Any]]:
    """Return the VALUES of a statement inside another, which has no state of its own."""
    names = statement.table.c.keys()
    several = [
        row if isinstance(row, Mapping) else dict(zip(names, row, strict=False))
        for rows in statement._multi_values
        for row in rows
    ]
    ordered = getattr(statement, "_ordered_values", None)  # SQLAlchemy 2.0
    rows = several or [dict(ordered or statement._values or {})]
    entity = statement.entity_description.get("entity")
    if entity is None:
        return rows
    columns = inspect(entity).mapper.columns  # by the names of the attributes
    return [{columns.get(key, key): value for key, value in row.items()} for row in rows]


def _values_of(
    statement: Insert | Update, rows: Sequence[Mapping[Any, Any]]
) -> Iterator[tuple[Any, Any, bool]]:
    """Give each value with the column it is for, and whether a parameter that has no type is
    given the column's.
    """
    for number, row in enumerate(rows):
        for key, value in row.items():
            yield key, value, number == 0
    if isinstance(statement, Insert):
        for position, key in enumerate(statement._select_names or ()):
            for source in _sql.selected(statement.select, position):
                yield key, source, False
        clause = statement._post_values_clause
        for part in getattr(clause, "clauses", [clause]):
            updates = getattr(part, "update_values_to_set", None) or getattr(part, "update", {})
            for key, value in dict(updates).items():
                yield key, value, True


def _hide_unsealed_parameters(context: ExceptionContext) -> None:
    """Take the parameters out of an error that was raised before they were sealed.

    Another column's bind processor, a default or a missing parameter may fail before this type
    has seen a value, and SQLAlchemy prints the row's parameters with the error. Those of an error
    of the database are sealed, and stay.
    """
    error = context.sqlalchemy_exception
    if context.execution_context is None and isinstance(error, StatementError) and error.params:
        error.params = None
        error.add_detail(HIDDEN)


def _row_of(
    value: Bound, column: ColumnCodec, checks: Sequence[Callable[[Any], str | None]]
) -> bytes:
    row, names = value.row, column.bound_to
    if len(row) != len(names):
        raise ConfigurationError(
            f"{column.contexts[0]} is bound to {len(names)} columns of its row, "
            f"and was given {len(row)} values for them"
        )
    for name, part, check in zip(names, row, checks, strict=False):  # no table, no checks
        fault = check(part)
        if fault is not None:
            raise ConfigurationError(
                f"{column.contexts[0]} is sealed for its row, and binding column {name} {fault}: "
                "the database would give back another value than the one that the secret is "
                "sealed for, and the secret would never open"
            )
    return encode_row(row, names)


def _reuse(value: Sealed, column: ColumnCodec, row: bytes | None) -> bytes:
    """Return the bytes of a value that is sealed already, if they open where they go."""
    given = value._codec
    if not set(given.contexts) <= set(column.contexts) or given.bound_to != column.bound_to:
        raise SerializationError(
            f"a Sealed value of {given.contexts[0]} was given to {column.contexts[0]}, "
            "where it would not open; open() it and pass what it holds"
        )
    if column.bound_to and value._sealed_for is None:
        if row is None:
            raise SerializationError(
                f"a Sealed value was given to {column.contexts[0]}, which is bound to its row; "
                f"pass Bound(sealed, row=({', '.join(column.bound_to)})), or open() it and pass "
                "what it holds in a Bound"
            )
        try:
            open_in_contexts(column.contexts, value._data, row, None)
        except TamperedError:
            pass
        else:
            return value._data
        raise SerializationError(
            f"a Sealed value of another row was given to {column.contexts[0]}, which is bound to "
            "its row, and where it would not open; open() it and pass what it holds"
        )
    return value._data


def _unbound(column: ColumnCodec) -> ConfigurationError:
    return ConfigurationError(
        f"{column.contexts[0]} is bound to its row; set the model's attribute, or pass "
        f"Bound(value, row=({', '.join(column.bound_to)}))"
    )
