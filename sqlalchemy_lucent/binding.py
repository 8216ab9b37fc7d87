"""Row-bound attributes: values that open in the row they were sealed for, and nowhere else.

::

    class Integration(Base):
        __tablename__ = "integrations"
        tenant_id: Mapped[str] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(primary_key=True)
        credentials: Mapped[dict[str, Any]] = row_bound("tenant_id", "name")

A column type sees a value and never its row, so the attribute stands in front of the mapped
column: a hybrid that reads and writes plain values, over a column of :class:`EncryptedJSON`. What
is set goes to the column as a :class:`Bound`, which asks the object for its binding columns when
the row is written; what is loaded comes as a :class:`Sealed`, opened with the object's binding
columns when it is read.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, MutableMapping
from functools import partial
from typing import Any, Final, NoReturn, cast

from sqlalchemy import Column, event, inspect
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import InstanceState, Mapped, Mapper, mapped_column

# Association proxies have their dataclass options in the same way; there is no public one.
from sqlalchemy.orm.interfaces import _DCAttributeOptions
from sqlalchemy.types import TypeDecorator

from .exceptions import ConfigurationError, TamperedError, UnsupportedOperationError
from .types import Bound, EncryptedJSON, RowPart, Sealed, encode_row

_PREFIX: Final = "_sealed_"

_TYPE_OPTIONS: Final = ("none_as_null", "context", "accept_contexts", "redact", "schema")
_DATACLASS_OPTIONS: Final = (
    "init",
    "default",
    "default_factory",
    "compare",
    "kw_only",
    "hash",
    "dataclass_metadata",
)


def row_bound(
    *bound_to: str, name: str | None = None, nullable: bool = False, **options: Any
) -> Mapped[Any]:
    """Declare an encrypted attribute of a Declarative class, bound to columns of its row.

    :param bound_to: names of the columns of the same table whose values the secret is bound to:
        str, int or UUID columns whose values are known before the row is written.
    :param name: name of the database column, if not the attribute's.
    :param nullable: whether a row may have no value. The annotation is not looked at.
    :param options: passed to :class:`EncryptedJSON` (``none_as_null``, ``context``,
        ``accept_contexts``, ``redact``), to the dataclass field of a
        :class:`~sqlalchemy.orm.MappedAsDataclass` (``init``, ``default``, ``default_factory``,
        ``compare``, ``kw_only``, ``hash``; never ``repr``), or else to
        :func:`sqlalchemy.orm.mapped_column` (``comment``, ``sort_order``, ``deferred`` …).
    :raises ConfigurationError: no column is named; when mappers are configured, a named column
        does not exist, cannot be bound to, or has its value made by the database.

    Reading the attribute opens the value once per load. ``select(Model.attribute)`` gives
    :class:`Sealed` objects, opened with ``.open(row=(…))``.
    """
    if not bound_to:
        raise ConfigurationError("row_bound() needs the name of at least one column to bind to")
    type_options = {key: options.pop(key) for key in _TYPE_OPTIONS if key in options}
    dataclass_options: dict[str, Any] = {
        key: options.pop(key) for key in _DATACLASS_OPTIONS if key in options
    }
    type_ = EncryptedJSON(bound_to=bound_to, **type_options)
    options["nullable"] = nullable
    return cast("Mapped[Any]", _Declaration(type_, name, options, dataclass_options))


def bound_rows(model: type[Any], rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Prepare dicts with plain values of row-bound attributes for ORM bulk statements.

    ``session.execute(insert(Model), bound_rows(Model, rows))`` works on every supported
    SQLAlchemy; from 2.1 on, ``session.execute(insert(Model), rows)`` does the same by itself.

    :param rows: one dict per row, by attribute name; with every binding column, also where it
        has a default.
    :raises ConfigurationError: a binding column of a row is missing.
    """
    attributes = [
        attribute
        for attribute in cast("Mapper[Any]", inspect(model)).all_orm_descriptors.values()
        if isinstance(attribute, _RowBound)
    ]
    prepared = [dict(row) for row in rows]
    for row in prepared:
        for attribute in attributes:
            if attribute.key in row:
                attribute.bind_row(model, row, row.pop(attribute.key))
    return prepared


class _Declaration:
    """Stands in the class body until the class exists; then gives way to column and hybrid."""

    def __init__(
        self,
        type_: EncryptedJSON,
        name: str | None,
        options: dict[str, Any],
        dataclass_options: dict[str, Any],
    ) -> None:
        self._type = type_
        self._name = name
        self._options = options
        self._dataclass_options = dataclass_options

    def __set_name__(self, owner: type[Any], name: str) -> None:
        attribute = _RowBound(name, self._dataclass_options)
        column = mapped_column(self._name or name, self._type, **self._options)
        setattr(owner, attribute.sealed_key, column)
        setattr(owner, name, attribute)
        for identifier, listener in (
            ("before_insert", attribute.before_insert),
            ("before_update", attribute.before_update),
            ("after_update", attribute.after_update),
            ("mapper_configured", attribute.check_mapping),
        ):
            # On a mixin or base that is not mapped itself, `propagate` reaches what is.
            event.listen(owner, identifier, listener, propagate=True)

    # Reached only where Python calls no `__set_name__`: without these, a value that is assigned
    # would stay a plain attribute of the object, and never be stored.
    def __get__(self, instance: object, owner: type[Any]) -> NoReturn:
        raise self._refusal()

    def __set__(self, instance: object, value: object) -> NoReturn:
        raise self._refusal()

    @staticmethod
    def _refusal() -> ConfigurationError:
        return ConfigurationError(
            "row_bound() is written in the body of a class (a model, mixin or base), not returned "
            "by declared_attr and not assigned to a class afterwards"
        )


class _RowBound(hybrid_property[Any], _DCAttributeOptions):
    """The attribute that stands in front of the mapped column."""

    key: str
    sealed_key: str

    def __init__(self, key: str, dataclass_options: dict[str, Any]) -> None:
        sealed_key = _PREFIX + key

        def expression(class_: Any) -> Any:
            return getattr(class_, sealed_key)

        def update_expression(class_: Any, value: Any) -> list[tuple[Any, Any]]:
            return [(getattr(class_, sealed_key), value)]

        super().__init__(
            self.read,
            fset=self.write,
            expr=cast("Any", expression),
            update_expr=cast("Any", update_expression),
        )
        self.key = self.__name__ = key  # a hybrid is found on its class by this name
        self.__doc__ = None
        self.sealed_key = sealed_key
        # SQLAlchemy 2.1 calls this for each dict of a bulk statement; 2.0 knows of no such thing.
        self.bulk_dml_setter = cast("Any", self.bind_row)
        self._attribute_options = mapped_column(repr=False, **dataclass_options)._attribute_options
        self._has_dataclass_arguments = bool(dataclass_options)

    # -- on an object ----------------------------------------------------------------------------

    def read(self, target: Any) -> Any:
        stored = getattr(target, self.sealed_key)
        if isinstance(stored, Sealed):
            if stored._is_open():
                return stored._opened
            return stored._open_once(self._stored_row(target))
        return stored.value if isinstance(stored, Bound) else stored

    def write(self, target: Any, value: Any) -> None:
        # Not the row itself: its columns may be set after this attribute, or only at flush.
        setattr(target, self.sealed_key, Bound(value, partial(self._current_row, target)))

    def _current_row(self, target: Any) -> list[RowPart]:
        """The binding columns as the object has them now: what a new value is sealed for."""
        mapper = cast("InstanceState[Any]", inspect(target)).mapper
        return [
            _checked(column, getattr(target, key)) for key, column in self._bound_columns(mapper)
        ]

    def _stored_row(self, target: Any) -> list[RowPart]:
        """The binding columns as the database has them: what a loaded value was sealed for."""
        state = cast("InstanceState[Any]", inspect(target))
        row = []
        for key, _ in self._bound_columns(state.mapper):
            current = getattr(target, key)
            replaced = state.attrs[key].history.deleted
            row.append(replaced[0] if replaced else current)
        return row

    def _bound_columns(self, mapper: Mapper[Any]) -> list[tuple[str, Column[Any]]]:
        """Return the binding columns, in order, each with the name of its attribute."""
        column = _sealed_column(mapper, self.sealed_key)
        bound = [column.table.c[name] for name in column.type.bound_to]
        return [(mapper.get_property_by_column(column).key, column) for column in bound]

    # -- at flush --------------------------------------------------------------------------------

    def before_insert(self, mapper: Mapper[Any], connection: object, target: Any) -> None:
        stored = inspect(target).dict.get(self.sealed_key)
        if isinstance(stored, Bound):
            for key, _ in self._bound_columns(mapper):
                _apply_default(mapper, key, target)
            self.write(target, stored.value)
        elif isinstance(stored, Sealed):
            # An object that was loaded and is inserted again: merged or made transient.
            self._rehome(mapper, target, stored, "the row is another one now")

    def before_update(self, mapper: Mapper[Any], connection: object, target: Any) -> None:
        state = cast("InstanceState[Any]", inspect(target))
        stored = state.dict.get(self.sealed_key)
        keys = [key for key, _ in self._bound_columns(mapper)]
        moved = [key for key in keys if state.attrs[key].history.has_changes()]
        if isinstance(stored, Bound):
            if moved or state.attrs[self.sealed_key].history.has_changes():
                # Anew, because after merge() it still names the object that was merged from.
                self.write(target, stored.value)
        elif moved:
            # Loads the value if it is not there: it may be NULL, and then nothing is sealed.
            stored = getattr(target, self.sealed_key)
            if stored is not None:
                why = f"{', '.join(moved)} of that row would change beneath it"
                self._rehome(mapper, target, stored, why)

    def after_update(self, mapper: Mapper[Any], connection: object, target: Any) -> None:
        """Refuse, too, what a listener of the model's own changed after :meth:`before_update`."""
        state = cast("InstanceState[Any]", inspect(target))
        keys = [key for key, _ in self._bound_columns(mapper)]
        moved = [key for key in keys if state.attrs[key].history.has_changes()]
        stored = getattr(target, self.sealed_key) if moved else None
        if isinstance(stored, Sealed):
            try:
                stored.open(row=self._current_row(target))
            except TamperedError:
                pass
            else:
                return
            raise self._refusal(mapper, f"{', '.join(moved)} of that row changed beneath it")

    def _rehome(self, mapper: Mapper[Any], target: Any, stored: Sealed, why: str) -> None:
        """Have a value that was loaded sealed for the row that the object has now."""
        if stored._is_open():
            self.write(target, stored._opened)
            return
        try:
            stored._open_once(self._current_row(target))
        except TamperedError:
            pass
        else:
            return
        raise self._refusal(mapper, why)

    def _refusal(self, mapper: Mapper[Any], why: str) -> UnsupportedOperationError:
        return UnsupportedOperationError(
            f"{_sealed_column(mapper, self.sealed_key)} is sealed for its row, and {why}: read "
            f"the attribute {self.key!r} before you change the row, so that it is sealed anew in "
            "the same flush, or set it"
        )

    def bind_row(self, class_: type[Any], row: MutableMapping[str, Any], value: Any) -> None:
        """Put the value into the dict of a bulk statement, bound to the dict's own columns."""
        if not isinstance(value, Bound):
            mapper = cast("Mapper[Any]", inspect(class_))
            # No default is applied: the statement may be an UPDATE, where the row has a value.
            columns = self._bound_columns(mapper)
            parts = [_checked(column, row.get(key)) for key, column in columns]
            encode_row(parts, [column.name for _, column in columns])
            value = Bound(value, parts)
        row[self.sealed_key] = value

    # -- when mappers are configured -------------------------------------------------------------

    def check_mapping(self, mapper: Mapper[Any], class_: type[Any]) -> None:
        column = _sealed_column(mapper, self.sealed_key)
        for name in column.type.bound_to:
            bound = column.table.c.get(name)
            fault = (
                "which its table does not have"
                if bound is None
                else _fault_of_type(bound) or _fault_of_origin(mapper, bound)
            )
            if fault is not None:
                raise ConfigurationError(f"{column} is bound to {name!r}, {fault}")
        for key, _ in self._bound_columns(mapper):
            # A loaded value is opened with the old value of a column that was changed, so the old
            # one has to be loaded when it is replaced; this is what the option does.
            event.listen(getattr(class_, key), "set", _no_change, active_history=True)


def _no_change(target: object, value: object, old: object, initiator: object) -> None:
    pass


def _sealed_column(mapper: Mapper[Any], sealed_key: str) -> Any:
    return mapper.column_attrs[sealed_key].columns[0]


def _apply_default(mapper: Mapper[Any], key: str, target: Any) -> None:
    """Give the object its Python-side default now; SQLAlchemy would only when the row is written,
    and by then the value is sealed.
    """
    if getattr(target, key) is not None:
        return
    # With joined inheritance, the default is that of the parent table's column.
    for column in mapper.column_attrs[key].columns:
        default: Any = column.default
        if default is not None and default.is_scalar:
            setattr(target, key, default.arg)
        elif default is not None and default.is_callable:
            setattr(target, key, default.arg(None))


def _python_type(column: Column[Any]) -> type[Any] | None:
    """Return the type of the column's values, where SQLAlchemy is sure of it."""
    if isinstance(column.type, TypeDecorator):
        return None
    try:
        return column.type.python_type
    except NotImplementedError:
        return None


def _checked(column: Column[Any], value: Any) -> Any:
    """Return `value` if the database gives it back as it is.

    A UUID given as text would come back as a UUID, and its text form may be another.
    """
    expected = _python_type(column)
    if value is not None and expected is not None and not isinstance(value, expected):
        raise ConfigurationError(
            f"binding column {column} has values of type {expected.__name__} and was given "
            f"one of type {type(value).__name__}: the database would give back another value "
            "than the one that the secret is sealed for"
        )
    return value


def _fault_of_type(bound: Column[Any]) -> str | None:
    type_ = _python_type(bound)
    if type_ is None or (issubclass(type_, (str, int, uuid.UUID)) and type_ is not bool):
        return None
    return f"whose values are of type {type_.__name__}; bind to str, int or UUID columns"


def _fault_of_origin(mapper: Mapper[Any], bound: Column[Any]) -> str | None:
    default: Any = bound.default
    if (
        bound is bound.table.autoincrement_column
        or bound.computed is not None
        or (bound.server_default is not None and default is None)
        or (default is not None and (default.is_clause_element or default.is_sequence))
    ):
        return (
            "whose value the database makes: it is known only after the row was written. Bind to "
            "a natural key, to a UUID with a default in Python, or set autoincrement=False and "
            "number the rows yourself"
        )
    if bound.onupdate is not None or bound.server_onupdate is not None:
        return "which changes with every UPDATE; bind to columns that stay"
    if bound is mapper.version_id_col:
        return "which counts the versions of the row; bind to columns that stay"
    for key in bound.foreign_keys:
        actions = {(key.onupdate or "").upper(), (key.ondelete or "").upper()}
        if (key.onupdate or "").upper() == "CASCADE" or actions & {"SET NULL", "SET DEFAULT"}:
            return (
                "which the database changes by itself (its foreign key has ON UPDATE or ON DELETE "
                "actions), and the secret would stay sealed for the old value"
            )
    return None
