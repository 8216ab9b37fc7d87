"""Row-bound attributes: values that open in the row they were sealed for, and nowhere else.

::

    class Integration(Base):
        __tablename__ = "integrations"
        tenant_id: Mapped[str] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(primary_key=True)
        credentials: Mapped[dict[str, Any]] = row_bound("tenant_id", "name")

A column type sees a value and never its row. So the attribute of a mapped column whose type has
`bound_to` converts between plain values and the column's. A value that is set goes to the column as
a :class:`Bound`, which asks the object for its binding columns when the row is written. A value
that is loaded is a :class:`Sealed`, opened with the object's binding columns when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any, Final, NoReturn, cast

from sqlalchemy import Column, Table, event, inspect, null
from sqlalchemy.orm import InstanceState, InstrumentedAttribute, Mapped, Mapper, mapped_column
from sqlalchemy.orm.attributes import flag_modified, get_attribute

from ._row import RowPart, binding_column, encode_row
from ._sealing import Bound, Sealed
from .exceptions import (
    ConfigurationError,
    DecryptionError,
    TamperedError,
    UnsupportedOperationError,
    hide_locals,
)
from .types import EncryptedJSON

_TYPE_OPTIONS: Final = ("none_as_null", "context", "accept_contexts", "redact", "schema")


def row_bound(
    *bound_to: str, name: str | None = None, nullable: bool = False, **options: Any
) -> Mapped[Any]:
    """Declare an encrypted attribute of a Declarative class, bound to columns of its row.

    :param bound_to: names of the columns of the same table whose values the secret is bound to:
        str, int or UUID columns whose values are known before the row is written.
    :param name: name of the database column, if not the attribute's.
    :param nullable: whether a row may have no value. The annotation is ignored.
    :param options: passed to :class:`EncryptedJSON` (``none_as_null``, ``context``,
        ``accept_contexts``, ``redact``, ``schema``), or else to
        :func:`sqlalchemy.orm.mapped_column` (``comment``, ``sort_order``, ``deferred``, and the
        options of a dataclass field; the field is never part of the ``repr``).
    :raises ConfigurationError: no column is named. When mappers are configured: a named column does
        not exist, cannot be bound to, or gets its value from the database.

    Reading the attribute opens the value once per load. ``select(Model.attribute)`` gives
    :class:`Sealed` objects, opened with ``.open(row=(…))``.
    """
    if not bound_to:
        raise ConfigurationError("row_bound() needs the name of at least one column to bind to")
    type_options = {key: options.pop(key) for key in _TYPE_OPTIONS if key in options}
    type_ = EncryptedJSON(bound_to=bound_to, **type_options)
    column: Any = mapped_column(type_, name=name, nullable=nullable, **options)
    # Passed as an option, it would be refused in a class that is not a dataclass.
    column._attribute_options = column._attribute_options._replace(dataclasses_repr=False)
    return cast("Mapped[Any]", _Declaration(column))


@hide_locals
def bound_rows(model: type[Any], rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Prepare dicts with plain values of row-bound attributes for ORM bulk statements.

    ``session.execute(insert(Model), bound_rows(Model, rows))`` works on every supported
    SQLAlchemy; from 2.1 on, ``session.execute(insert(Model), rows)`` does the same.

    :param rows: one dict per row, by attribute name, with every binding column, even one with a
        default.
    :raises ConfigurationError: a binding column of a row is missing.
    """
    mapper = cast("Mapper[Any]", inspect(model))
    keys = [key for key, _ in _bound_attributes(mapper)]
    prepared = [dict(row) for row in rows]
    for row in prepared:
        for key in keys:
            if key in row:
                _bind_row(mapper, key, row)
    return prepared


class _Declaration:
    """A placeholder in the class body; once the class exists, the mapped column replaces it."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __set_name__(self, owner: type[Any], name: str) -> None:
        # Python would turn an error raised here into a RuntimeError; see `__get__`.
        if not is_pydantic(owner):
            setattr(owner, name, self._column)

    # Reached only if `__set_name__` was not called. Without these, an assigned value would stay a
    # plain attribute of the object and never be stored.
    def __get__(self, instance: object, owner: type[Any]) -> NoReturn:
        raise self._refusal(owner)

    def __set__(self, instance: object, value: object) -> NoReturn:
        raise self._refusal(type(instance))

    @staticmethod
    def _refusal(owner: type[Any]) -> ConfigurationError:
        if is_pydantic(owner):
            return ConfigurationError(
                f"row_bound() cannot be a field of {owner.__name__}, a pydantic model. In "
                "SQLModel, give the field a type that names the binding columns: "
                'Field(sa_type=EncryptedJSON(bound_to=["tenant_id"]))'
            )
        return ConfigurationError(
            "row_bound() must be written in the body of a class (a model, mixin or base), not "
            "returned by declared_attr or assigned to a class afterwards"
        )


def is_pydantic(owner: type[Any]) -> bool:
    """Say whether a class is a pydantic model, as SQLModel's are."""
    return hasattr(owner, "__pydantic_complete__")


# The class of row-bound attributes. Without a docstring: an attribute has its column's `__doc__`.
class _RowBound(InstrumentedAttribute[Any]):
    __slots__ = ()

    inherit_cache = True

    def __get__(self, instance: Any, owner: Any) -> Any:
        value = super().__get__(instance, owner)
        if type(value) is Bound:
            value = value.value
        if type(value) is not Sealed:
            return value
        if value._is_open():
            return value._opened
        given = [instance, value]
        del instance, value  # an error passes through this frame
        return _open(self.key, given)

    def __delete__(self, instance: object) -> None:
        self.__set__(instance, null())

    # SQLAlchemy 2.1 calls the returned function for each dict of a bulk statement; 2.0 does not.
    def _bulk_dml_setter(self, key: str) -> Callable[..., Any] | None:
        return partial(_bind_row, cast("Mapper[Any]", self.parent), key)


# -- when mappers are configured -------------------------------------------------------------------


def bind_attributes(mapper: Mapper[Any], class_: type[Any]) -> None:
    """Make the attributes of a mapper's row-bound columns bind their values.

    A listener for ``mapper_configured``: column types are final then, however they were declared.
    """
    bound = list(_bound_attributes(mapper))
    for key, column in bound:
        for name in column.type.bound_to:
            other = binding_column(column.table, name, str(column))
            fault = _fault_of_origin(mapper, other)
            if fault is not None:
                raise ConfigurationError(f"{column} is bound to {name!r}, {fault}")
        for other_key, _ in _binding_columns(mapper, key):
            # A loaded value is opened with the old value of a changed column. The option loads the
            # old value when it is replaced.
            event.listen(getattr(class_, other_key), "set", _no_change, active_history=True)
        attribute: Any = mapper.class_manager[key]
        # No supported hook serves. There is an event for setting an attribute, none for reading it.
        # Opening values in the events "load" and "refresh" would put plaintext into every loaded
        # object and its pickles. A hybrid or synonym in front of the attribute is not accepted
        # under its name by defer(), refresh(), expire(), validates() and set_committed_value(),
        # nor as a field by SQLModel and dataclasses. With another class, the attribute stays the
        # one that SQLAlchemy has instrumented.
        attribute.__class__ = _RowBound
        event.listen(attribute, "set", partial(_bind, key), retval=True, raw=True)
    if bound:
        keys = [key for key, _ in bound]
        event.listen(mapper, "before_insert", partial(_before_insert, keys))
        event.listen(mapper, "before_update", partial(_before_update, keys))
        event.listen(mapper, "after_update", partial(_after_update, keys))


def _bound_attributes(mapper: Mapper[Any]) -> Iterator[tuple[str, Any]]:
    """Give the row-bound attributes, by name, each with its column."""
    for attribute in mapper.column_attrs:
        column = attribute.columns[0]
        # In a class that is mapped to a subquery, values stay sealed, as in a SELECT.
        if isinstance(column, Column) and isinstance(column.table, Table):
            type_: Any = column.type
            if isinstance(type_, EncryptedJSON) and type_.bound_to:
                yield attribute.key, column


def _binding_columns(mapper: Mapper[Any], key: str) -> list[tuple[str, Column[Any]]]:
    """Return the binding columns, in order, each with the name of its attribute."""
    column: Any = mapper.column_attrs[key].columns[0]
    bound = [column.table.c[name] for name in column.type.bound_to]
    return [(mapper.get_property_by_column(each).key, each) for each in bound]


def _no_change(target: object, value: object, old: object, initiator: object) -> None:
    pass


# -- on an object ----------------------------------------------------------------------------------


def _bind(key: str, state: InstanceState[Any], value: Any, old: object, initiator: object) -> Any:
    """Return what is stored in the object for a value that is set."""
    if type(value) is Sealed:
        return value  # by merge(), most likely; checked when the row is written
    if type(value) is Bound:
        value = value.value  # merge() copies it from another object
    return _bound(state, key, value)


def _current_row(state: InstanceState[Any], key: str) -> list[RowPart]:
    """Return the object's current binding columns, which a new value is sealed for."""
    target = state.obj()
    return [getattr(target, other) for other, _ in _binding_columns(state.mapper, key)]


def _stored_row(state: InstanceState[Any], key: str) -> list[RowPart]:
    """Return the binding columns as the database has them, which a loaded value is sealed for."""
    target = state.obj()
    row = []
    for other, _ in _binding_columns(state.mapper, key):
        current = getattr(target, other)
        replaced = state.attrs[other].history.deleted
        row.append(replaced[0] if replaced else current)
    return row


@hide_locals
def _open(key: str, given: list[Any]) -> Any:
    """Open the value of an object; take both out of `given`, so that no frame has them."""
    sealed, target = given.pop(), given.pop()
    state = cast("InstanceState[Any]", inspect(target))
    try:
        return sealed._open_once(_stored_row(state, key))
    except DecryptionError as error:
        refusal = error
    if state.identity is None:
        raise refusal
    raise type(refusal)(f"{refusal}. It is in the row with the primary key {state.identity}")


# -- at flush --------------------------------------------------------------------------------------


@hide_locals
def _before_insert(keys: list[str], mapper: Mapper[Any], connection: object, target: Any) -> None:
    state = cast("InstanceState[Any]", inspect(target))
    for key in keys:
        if key not in state.dict:
            _apply_default(mapper, key, target)
        stored = state.dict.get(key)
        if type(stored) is Sealed:
            # An object that was loaded and is inserted again: merged or made transient.
            _reseal_for_current_row(state, key, stored, "the row is a different one now")
        elif key in state.dict:
            for other, _ in _binding_columns(mapper, key):
                if getattr(target, other) is None:
                    _apply_default(mapper, other, target)
            if type(stored) is not Bound:
                _set(state, key, stored)


@hide_locals
def _before_update(keys: list[str], mapper: Mapper[Any], connection: object, target: Any) -> None:
    state = cast("InstanceState[Any]", inspect(target))
    for key in keys:
        moved = _moved(state, key)
        if moved and key not in state.dict:
            get_attribute(target, key)  # it may be NULL, and then nothing is sealed
        stored = state.dict.get(key)
        is_set = key in state.dict and state.attrs[key].history.has_changes()
        if type(stored) is Sealed:
            if moved:
                _reseal_for_current_row(
                    state, key, stored, f"the flush would change {moved} of that row"
                )
            elif is_set:
                _reseal_for_current_row(state, key, stored, "this value belongs to another row")
        elif type(stored) is Bound:
            if moved and not is_set:  # written before, for the row as it was
                _set(state, key, stored.value)
        elif is_set:
            _set(state, key, stored)


@hide_locals
def _after_update(keys: list[str], mapper: Mapper[Any], connection: object, target: Any) -> None:
    """Refuse changes that a listener of the model's own made after :func:`_before_update`."""
    state = cast("InstanceState[Any]", inspect(target))
    for key in keys:
        moved = _moved(state, key)
        stored = get_attribute(target, key) if moved else None
        if type(stored) is Sealed and not _opens_here(state, key, stored):
            raise _refusal(mapper, key, f"the flush changed {moved} of that row")


def _moved(state: InstanceState[Any], key: str) -> str:
    """Return the names of the binding columns that were changed."""
    others = [other for other, _ in _binding_columns(state.mapper, key)]
    return ", ".join(other for other in others if state.attrs[other].history.has_changes())


def _set(state: InstanceState[Any], key: str, value: Any) -> None:
    # Not by setattr(): the value was validated when it was set.
    state.dict[key] = _bound(state, key, value)
    flag_modified(state.obj(), key)


def _bound(state: InstanceState[Any], key: str, value: Any) -> Bound:
    # A function, because the row's columns may be set after this attribute, or only at flush.
    return Bound(value, partial(_current_row, state, key))


def _reseal_for_current_row(state: InstanceState[Any], key: str, stored: Sealed, why: str) -> None:
    """Seal a loaded value for the object's current row."""
    if stored._is_open():
        _set(state, key, stored._opened)
    elif _opens_here(state, key, stored):
        _set(state, key, stored)
    else:
        raise _refusal(state.mapper, key, why)


def _opens_here(state: InstanceState[Any], key: str, stored: Sealed) -> bool:
    try:
        stored.open(row=_current_row(state, key))
    except TamperedError:
        return False
    return True


def _refusal(mapper: Mapper[Any], key: str, why: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        f"{mapper.column_attrs[key].columns[0]} is sealed for its row, and {why}: read the "
        f"attribute {key!r} before you change the row, so that the flush seals it again, or set it "
        "to a plain value"
    )


@hide_locals
def _bind_row(mapper: Mapper[Any], key: str, row: MutableMapping[str, Any]) -> None:
    """Bind the value in the dict of a bulk statement to the dict's own columns."""
    if not isinstance(row[key], Bound):
        columns = _binding_columns(mapper, key)
        # No default is applied: the statement may be an UPDATE, where the row has a value.
        parts = [row.get(other) for other, _ in columns]
        encode_row(cast("Any", parts), [column.name for _, column in columns])
        row[key] = Bound(row[key], cast("Any", parts))


def _apply_default(mapper: Mapper[Any], key: str, target: Any) -> None:
    """Apply the column's Python default now: SQLAlchemy would apply it after values were sealed."""
    # With joined inheritance, the parent table's column has the default.
    for column in mapper.column_attrs[key].columns:
        default: Any = column.default
        if default is not None and default.is_scalar:
            setattr(target, key, default.arg)
        elif default is not None and default.is_callable:
            setattr(target, key, default.arg(None))


def _fault_of_origin(mapper: Mapper[Any], bound: Column[Any]) -> str | None:
    default: Any = bound.default
    if (
        bound is bound.table.autoincrement_column
        or bound.computed is not None
        or (bound.server_default is not None and default is None)
        or (default is not None and (default.is_clause_element or default.is_sequence))
    ):
        return (
            "whose value comes from the database, after the row was written. Bind to a natural key "
            "or to a UUID with a default in Python, or set autoincrement=False and number the rows "
            "yourself"
        )
    if bound.onupdate is not None or bound.server_onupdate is not None:
        return "which changes with every UPDATE; bind to columns that do not change"
    if bound is mapper.version_id_col:
        return "which counts the versions of the row; bind to columns that do not change"
    for key in bound.foreign_keys:
        actions = {(key.onupdate or "").upper(), (key.ondelete or "").upper()}
        if (key.onupdate or "").upper() == "CASCADE" or actions & {"SET NULL", "SET DEFAULT"}:
            return (
                "which the database may change (its foreign key has ON UPDATE or ON DELETE "
                "actions) while the secret stays sealed for the old value"
            )
    return None
