"""
Row-bound attributes: values that open in the row they were sealed for, and nowhere else.

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

from collections.abc import Iterator
from functools import partial
from typing import Any, Final, cast

from sqlalchemy import Column, event, inspect
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import InstanceState, Mapped, Mapper, mapped_column

from .exceptions import ConfigurationError, UnsupportedOperationError
from .types import Bound, EncryptedJSON, RowPart, Sealed

_PREFIX: Final = "_sealed_"


def row_bound(*bound_to: str, name: str | None = None, **options: Any) -> Mapped[Any]:
    """
    Declare an encrypted attribute of a Declarative class, bound to columns of its row.

    :param bound_to: names of the columns of the same table whose values the secret is bound to:
        str, int or UUID columns whose values are known before the row is written.
    :param name: name of the database column, if not the attribute's.
    :param options: passed to :class:`EncryptedJSON` (``none_as_null``, ``context``,
        ``accept_contexts``, ``redact``) or else to :func:`sqlalchemy.orm.mapped_column`
        (``nullable``, ``comment``, ``sort_order`` …).
    :raises ConfigurationError: no column is named; when mappers are configured, a named column
        does not exist, or its value is known only after INSERT.

    Reading the attribute opens the value once per load. ``select(Model.attribute)`` gives
    :class:`Sealed` objects, opened with ``.open(row=(…))``.
    """
    if not bound_to:
        raise ConfigurationError("row_bound() needs the name of at least one column to bind to")
    type_options = {key: options.pop(key) for key in _TYPE_OPTIONS if key in options}
    type_ = EncryptedJSON(bound_to=bound_to, **type_options)
    return cast("Mapped[Any]", _Declaration(type_, name, options))


_TYPE_OPTIONS: Final = ("none_as_null", "context", "accept_contexts", "redact")


class _Declaration:
    """Stands in the class body until the class exists; then gives way to column and hybrid."""

    def __init__(self, type_: EncryptedJSON, name: str | None, options: dict[str, Any]) -> None:
        self._type = type_
        self._name = name
        self._options = options

    def __set_name__(self, owner: type[Any], name: str) -> None:
        sealed_name = _PREFIX + name
        column = mapped_column(self._name or name, self._type, **self._options)
        setattr(owner, sealed_name, column)
        setattr(owner, name, _hybrid(name, sealed_name))
        for identifier, listener in (
            ("before_insert", _before_insert),
            ("before_update", _before_update),
            ("mapper_configured", _check_mapping),
        ):
            # On a mixin or base that is not mapped itself, `propagate` reaches what is.
            event.listen(owner, identifier, listener, propagate=True)


def _hybrid(name: str, sealed_name: str) -> hybrid_property[Any]:
    def get(self: Any) -> Any:
        stored = getattr(self, sealed_name)
        if isinstance(stored, Sealed):
            return stored._open_once(_stored_row(self, sealed_name))
        return stored.value if isinstance(stored, Bound) else stored

    def set_(self: Any, value: Any) -> None:
        setattr(self, sealed_name, Bound(value, partial(_current_row, self, sealed_name)))

    def expression(cls: Any) -> Any:
        return getattr(cls, sealed_name)

    def update_expression(cls: Any, value: Any) -> list[tuple[Any, Any]]:
        return [(getattr(cls, sealed_name), value)]

    # The hybrid names itself after its getter.
    get.__name__ = name
    return hybrid_property(
        get, fset=set_, expr=cast("Any", expression), update_expr=cast("Any", update_expression)
    )


def _row_bound_columns(mapper: Mapper[Any]) -> Iterator[tuple[str, Column[Any], EncryptedJSON]]:
    for attribute in mapper.column_attrs:
        column = attribute.columns[0]
        if (
            isinstance(column, Column)
            and isinstance(column.type, EncryptedJSON)
            and column.type.bound_to
        ):
            yield attribute.key, column, column.type


def _binding_attributes(mapper: Mapper[Any], sealed_name: str) -> list[str]:
    """Return the attributes that hold the binding columns, in order."""
    column = mapper.column_attrs[sealed_name].columns[0]
    type_ = column.type
    assert isinstance(column, Column)
    assert isinstance(type_, EncryptedJSON)
    return [mapper.get_property_by_column(column.table.c[bound]).key for bound in type_.bound_to]


def _current_row(target: Any, sealed_name: str) -> list[RowPart]:
    """The binding columns as the object has them now: what a new value is sealed for."""
    mapper = cast("InstanceState[Any]", inspect(target)).mapper
    return [getattr(target, key) for key in _binding_attributes(mapper, sealed_name)]


def _stored_row(target: Any, sealed_name: str) -> list[RowPart]:
    """The binding columns as the database has them: what a loaded value was sealed for."""
    state = cast("InstanceState[Any]", inspect(target))
    row = []
    for key in _binding_attributes(state.mapper, sealed_name):
        current = getattr(target, key)
        replaced = state.attrs[key].history.deleted
        row.append(replaced[0] if replaced else current)
    return row


def _before_insert(mapper: Mapper[Any], connection: object, target: Any) -> None:
    for sealed_name, column, type_ in _row_bound_columns(mapper):
        stored = inspect(target).dict.get(sealed_name)
        if not isinstance(stored, Bound):
            continue
        for bound in type_.bound_to:
            _apply_default(mapper, column.table.c[bound], target)
        _rehome(target, sealed_name, stored.value)


def _apply_default(mapper: Mapper[Any], column: Column[Any], target: Any) -> None:
    """
    Give the object its Python-side default now; SQLAlchemy would only when the row is written,
    and by then the value is sealed.
    """
    key = mapper.get_property_by_column(column).key
    default: Any = column.default
    if default is None or getattr(target, key) is not None:
        return
    if default.is_scalar:
        setattr(target, key, default.arg)
    elif default.is_callable:
        setattr(target, key, default.arg(None))


def _before_update(mapper: Mapper[Any], connection: object, target: Any) -> None:
    state = cast("InstanceState[Any]", inspect(target))
    for sealed_name, column, _ in _row_bound_columns(mapper):
        stored = state.dict.get(sealed_name)
        keys = _binding_attributes(mapper, sealed_name)
        moved = [key for key in keys if state.attrs[key].history.has_changes()]
        if isinstance(stored, Bound):
            if moved or state.attrs[sealed_name].history.has_changes():
                _rehome(target, sealed_name, stored.value)
        elif not moved or (stored is None and sealed_name in state.dict):
            continue
        elif isinstance(stored, Sealed) and stored._is_open():
            _rehome(target, sealed_name, stored._open_once(()))
        else:
            raise UnsupportedOperationError(
                f"{column} is sealed for its row, and {', '.join(moved)} of that row would change "
                "while it stays sealed: read the attribute before you change the row, so that it "
                "is sealed anew in the same flush, or set it"
            )


def _rehome(target: Any, sealed_name: str, value: Any) -> None:
    # A new object: after merge(), the old one may belong to the object that was merged from.
    setattr(target, sealed_name, Bound(value, partial(_current_row, target, sealed_name)))


def _check_mapping(mapper: Mapper[Any], class_: type[Any]) -> None:
    for _, column, type_ in _row_bound_columns(mapper):
        for name in type_.bound_to:
            bound = column.table.c.get(name)
            if bound is None:
                raise ConfigurationError(
                    f"{column} is bound to a column {name!r}, which its table does not have"
                )
            if (
                bound is column.table.autoincrement_column
                or bound.server_default is not None
                or bound.computed is not None
                or (bound.default is not None and bound.default.is_clause_element)
                or (bound.default is not None and bound.default.is_sequence)
            ):
                raise ConfigurationError(
                    f"{column} is bound to {name!r}, whose value the database makes: it is known "
                    "only after the row was written. Bind to a natural key, or to a UUID with a "
                    "default in Python"
                )
