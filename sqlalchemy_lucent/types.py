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

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NoReturn

from sqlalchemy import JSON, Column, DefaultClause, LargeBinary, Table, event
from sqlalchemy.engine import Dialect, ExceptionContext
from sqlalchemy.exc import StatementError
from sqlalchemy.sql import operators
from sqlalchemy.sql.base import SchemaEventTarget
from sqlalchemy.sql.elements import ColumnClause, ColumnElement, Null
from sqlalchemy.types import TypeDecorator, TypeEngine

from . import _sql
from ._dialects import is_mysql
from ._envelope import Envelope, parse
from ._json import STRICT, Codec, EngineCodec, decode
from ._redacted import REDACTED, redact
from ._row import RowPart as RowPart
from ._row import encode_row as encode_row
from ._row import fault_of_type, value_check
from ._schema import Schema
from .exceptions import (
    ConfigurationError,
    LucentError,
    PicklingRefusedError,
    SerializationError,
    TamperedError,
    UnsupportedOperationError,
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
                value = decode(keys.subkeys[data[: keys.usual_size]].open(data, row) or b"")
            except Exception:  # noqa: BLE001, S110  (raised again by what follows, which says more)
                pass
            else:
                wrapper = self._redacted.get(type(value))
                return value if wrapper is None else wrapper(value)
        return self._open_through_the_layers(data, row, keyring)

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
    - ``insert().from_select()`` and ``update()`` that copy *another* column: bytes that do not open
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
    ) -> None:
        super().__init__()
        self.none_as_null = none_as_null
        self.context = context
        self.accept_contexts = _names("accept_contexts", accept_contexts)
        self.lazy = lazy
        self.redact = redact
        self.bound_to = _names("bound_to", bound_to)
        self.schema = schema
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
            time, so set the attribute instead.
        """
        type_ = cls(none_as_null, **options)
        if type_.lazy or type_.bound_to:
            raise ConfigurationError("a lazy or row-bound EncryptedJSON does not track changes")
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
        usual = _USUAL_KINDS if column.is_plain and not bound_to else frozenset()
        checks = self._row_checks(dialect)

        def process(value: Any) -> bytes | None:
            row = b""
            kind = type(value)
            # What is usual is sealed without the layers between this column and its key; whatever
            # else there is, and whatever is wrong, goes through them.
            if kind in usual:
                try:
                    return context_keys(context).primary.seal(dumps(value))
                except LucentError:
                    pass  # raised again below, where more is said, and with nothing behind it
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

        return process

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

    # -- the database's side ---------------------------------------------------------------------

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """LONGBLOB on MySQL and MariaDB, where BLOB ends at 64 KiB; LargeBinary elsewhere."""
        # Every statement that has a value of this type comes here before it is executed.
        event.listen(dialect, "handle_error", _hide_unsealed_parameters)
        if is_mysql(dialect):
            from sqlalchemy.dialects.mysql import LONGBLOB  # with that database only

            return dialect.type_descriptor(LONGBLOB())
        return dialect.type_descriptor(LargeBinary())

    def compare_values(self, x: Any, y: Any) -> bool:
        """Compare two values as Python does."""
        return bool(x == y)

    def __repr__(self) -> str:
        arguments = [
            f"{name}={getattr(self, name)!r}"
            for name, default in _DEFAULTS.items()
            if getattr(self, name) != default
            and not (name == "context" and self._context_is_derived)
        ]
        return f"{type(self).__name__}({', '.join(arguments)})"


_USUAL_KINDS: Final = frozenset({dict, list, str, int, float, bool})
"""Types of values that are a document, and none of the forms that mean something else."""

_DEFAULTS: Final[dict[str, object]] = {
    "none_as_null": False,
    "context": None,
    "accept_contexts": (),
    "lazy": False,
    "redact": True,
    "bound_to": (),
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
        default = column.server_default
        if isinstance(default, DefaultClause) and isinstance(default.arg, str):
            raise UnsupportedOperationError(
                f"server_default= of {context} would store plaintext: the database has no key to "
                "seal it with. Use default="
            )
    variants = {
        dialect: variant._attached(context, table)
        for dialect, variant in type_._variant_mapping.items()
        if isinstance(variant, EncryptedJSON)
    }
    if variants:
        column.type = type_.copy()
        column.type._variant_mapping = type_._variant_mapping.union(variants)


def _hide_unsealed_parameters(context: ExceptionContext) -> None:
    """Take the parameters out of an error that was raised before they were sealed.

    Another column's bind processor, a default or a missing parameter may fail before this type
    has seen a value, and SQLAlchemy prints the row's parameters with the error. Those of an error
    of the database are sealed, and stay.
    """
    error = context.sqlalchemy_exception
    if context.execution_context is None and isinstance(error, StatementError) and error.params:
        error.params = None
        error.add_detail("parameters hidden: an EncryptedJSON value may be among them, unsealed")


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
    if value._codec.contexts[0] not in column.contexts:
        raise SerializationError(
            f"a Sealed value of {value._codec.contexts[0]} was given to {column.contexts[0]}, "
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
