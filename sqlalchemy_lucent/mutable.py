# ruff: noqa: D102  (the methods do what those of dict and list do)
"""Change tracking: edits inside a document, at any depth, are written at the next flush.

::

    credentials: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON.mutable())

    account.credentials["tokens"][0]["expiry"] = 0
    session.commit()

:class:`sqlalchemy.ext.mutable.MutableDict` sees edits of the outermost ``dict`` only. Here every
``dict`` and ``list`` of a document is a subclass that reports each edit to the document's *owner*,
the attribute that holds it. A document has one owner: a value that is set on an attribute, or put
into a document, is copied. Edit the copy: ``account.credentials["new"]``.

SQLModel bypasses the event that tracks a value when it is set; such a value is tracked after the
next flush.

Tracked values are a real ``dict`` and ``list``. ``copy.deepcopy()`` returns a value that is not
tracked. A pickle of the model keeps the tracking; a pickle of the value alone has no owner.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import wraps
from typing import Any, Final, Self, SupportsIndex

from sqlalchemy import Column, event
from sqlalchemy.orm import InstanceState, Mapper, QueryableAttribute
from sqlalchemy.orm.attributes import flag_modified

from ._json import MAX_DEPTH
from ._redacted import redact
from .exceptions import UnsupportedOperationError


class Owner:
    """The attribute that holds a document, if any; shared by all containers of the document."""

    __slots__ = ("_key", "_state", "redacts")

    def __init__(self, redacts: bool = True) -> None:
        self.redacts = redacts
        self._state: weakref.ref[InstanceState[Any]] | None = None
        self._key = ""

    def attach(self, state: InstanceState[Any], key: str) -> None:
        """Make this attribute of this object the owner."""
        self._state = weakref.ref(state)
        self._key = key

    def is_held_by(self, state: InstanceState[Any], key: str) -> bool:
        """Say whether this attribute of this object is the owner."""
        return self._state is not None and self._state() is state and self._key == key

    def detach(self) -> None:
        """Give up the owner: its attribute holds another value now."""
        self._state = None

    def adopt(self, value: Any, depth: int = 0) -> Any:
        """Return `value` as part of this document."""
        # The codec refuses a document that is too deep or contains itself.
        if depth > MAX_DEPTH or (isinstance(value, _TRACKED) and value._owner is self):
            return value
        # No comprehensions or helpers: each level must take only one of Python's frames.
        if isinstance(value, dict):
            members = dict.__new__(TrackedDict)
            members._owner = self
            for name, child in value.items():
                dict.__setitem__(members, name, self.adopt(child, depth + 1))
            return members
        if isinstance(value, list):
            items = list.__new__(TrackedList)
            items._owner = self
            for child in value:
                list.append(items, self.adopt(child, depth + 1))
            return items
        return value

    def changed(self) -> None:
        """Mark the attribute as modified.

        :raises UnsupportedOperationError: the attribute no longer holds this document.
        """
        state = None if self._state is None else self._state()
        target = None if state is None else state.obj()
        if state is None or target is None:
            return
        if getattr(state.dict.get(self._key), "_owner", None) is not self:
            raise UnsupportedOperationError(
                f"{type(target).__name__}.{self._key} no longer holds this value: the object was "
                "expired or loaded again after the value was read (commit() and rollback() expire "
                "objects), so the edit would be lost. Read the attribute again and edit that value"
            )
        flag_modified(target, self._key)


def _reported(method: Any) -> Any:
    """Return a method of dict or list that adds nothing, as one that reports the edit."""

    @wraps(method)
    def edit(self: Any, *arguments: Any, **options: Any) -> Any:
        result = method(self, *arguments, **options)
        self._owner.changed()
        return result

    return edit


class _Tracked:
    """What a tracked ``dict`` and ``list`` have in common."""

    __slots__ = ()

    _owner: Owner
    _plain_type: Any

    def __new__(cls, *_: Any, **__: Any) -> Any:
        self: Any = super().__new__(cls)
        self._owner = Owner()
        return self

    def __copy__(self) -> Any:
        return _untracked(self._plain_type(self), self._owner)

    def __deepcopy__(self, memo: object) -> Any:
        return _untracked(_plain(self), self._owner)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _restore, (_plain(self), self._owner.redacts)

    def __repr__(self) -> str:
        hidden = f"<redacted {self._plain_type.__name__}>"
        return hidden if self._owner.redacts else super().__repr__()

    __sentry_repr__ = __repr__


class TrackedDict(_Tracked, dict[str, Any]):
    """A ``dict`` of a tracked document."""

    __slots__ = ("_owner",)
    _plain_type = dict

    def __init__(self, *values: Any, **named: Any) -> None:
        super().__init__()
        self.update(*values, **named)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, self._owner.adopt(value, 1))
        self._owner.changed()

    def update(self, *values: Any, **named: Any) -> None:
        adopt = self._owner.adopt
        super().update({name: adopt(child, 1) for name, child in dict(*values, **named).items()})
        self._owner.changed()

    def __ior__(self, other: Any) -> Self:  # type: ignore[override,misc]
        self.update(other)
        return self

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    __delitem__ = _reported(dict.__delitem__)
    pop = _reported(dict.pop)
    popitem = _reported(dict.popitem)
    clear = _reported(dict.clear)


class TrackedList(_Tracked, list[Any]):
    """A ``list`` of a tracked document."""

    __slots__ = ("_owner",)
    _plain_type = list

    def __init__(self, values: Iterable[Any] = ()) -> None:
        super().__init__(self._adopted(values))

    def _adopted(self, values: Iterable[Any]) -> list[Any]:
        adopt = self._owner.adopt
        return [adopt(child, 1) for child in values]

    def __setitem__(self, index: Any, value: Any) -> None:
        is_slice = isinstance(index, slice)
        super().__setitem__(
            index, self._adopted(value) if is_slice else self._owner.adopt(value, 1)
        )
        self._owner.changed()

    def append(self, value: Any) -> None:
        super().append(self._owner.adopt(value, 1))
        self._owner.changed()

    def extend(self, values: Iterable[Any]) -> None:
        super().extend(self._adopted(values))
        self._owner.changed()

    def insert(self, index: SupportsIndex, value: Any) -> None:
        super().insert(index, self._owner.adopt(value, 1))
        self._owner.changed()

    def __iadd__(self, values: Iterable[Any]) -> Self:  # type: ignore[misc]
        self.extend(values)
        return self

    __delitem__ = _reported(list.__delitem__)
    __imul__ = _reported(list.__imul__)
    pop = _reported(list.pop)
    remove = _reported(list.remove)
    clear = _reported(list.clear)
    sort = _reported(list.sort)
    reverse = _reported(list.reverse)


_TRACKED: Final = (TrackedDict, TrackedList)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(child) for name, child in value.items()}
    if isinstance(value, list):
        return [_plain(child) for child in value]
    return value


def _untracked(value: Any, owner: Owner) -> Any:
    return redact(value) if owner.redacts else value


def _restore(value: Any, redacts: bool) -> Any:
    return Owner(redacts).adopt(value)


# -- listeners -------------------------------------------------------------------------------------

_PICKLED: Final = "lucent.tracked"
"""The name of the tracked values in the pickled state of an object."""


def track_mapped_columns(mapper: Mapper[Any], class_: type[Any]) -> None:
    """Track the attributes of a mapper whose columns ask for it.

    A listener for ``mapper_configured``: column types are final then, however they were declared.
    """
    for attribute in mapper.column_attrs:
        column = attribute.columns[0]
        # An inherited attribute has the listeners of the class that defines it.
        if attribute.parent is mapper and isinstance(column, Column):
            type_: Any = column.type
            if getattr(type_, "tracks_changes", False):
                _listen(getattr(class_, attribute.key), redacts=type_.redact)


def _listen(attribute: QueryableAttribute[Any], redacts: bool) -> None:
    key = attribute.key

    def own(state: InstanceState[Any], value: Any) -> Any:
        tracked = Owner(redacts).adopt(value)
        if isinstance(tracked, _TRACKED):
            tracked._owner.attach(state, key)
        return tracked

    def load(state: InstanceState[Any], *_: Any) -> None:
        value = state.dict.get(key)
        if isinstance(value, _TRACKED) and value._owner.is_held_by(state, key):
            return
        if isinstance(value, (dict, list)):
            state.dict[key] = own(state, value)

    def refresh(state: InstanceState[Any], _: Any, names: Iterable[str] | None) -> None:
        if not names or key in names:
            load(state)

    def written(_: Any, __: Any, state: InstanceState[Any]) -> None:
        load(state)  # SQLModel writes to the object's dict, bypassing the event "set"

    def replace(state: InstanceState[Any], value: Any, old: Any, _: Any) -> Any:
        if value is old:
            return value
        if isinstance(old, _TRACKED):
            old._owner.detach()
        return own(state, value)

    def pickle(state: InstanceState[Any], pickled: dict[str, Any]) -> None:
        value = state.dict.get(key)
        if isinstance(value, _TRACKED):
            pickled.setdefault(_PICKLED, {})[key] = value

    def unpickle(state: InstanceState[Any], pickled: dict[str, Any]) -> None:
        # The object has no attributes yet. Its attribute is going to have this value.
        value = pickled.get(_PICKLED, {}).get(key)
        if isinstance(value, _TRACKED):
            value._owner.attach(state, key)

    event.listen(attribute, "set", replace, raw=True, retval=True, propagate=True)
    for name, listener in (
        ("load", load),
        ("refresh", refresh),
        ("refresh_flush", refresh),
        ("after_insert", written),
        ("after_update", written),
        ("_sa_event_merge_wo_load", load),  # merge(load=False), as sqlalchemy.ext.mutable does
        ("pickle", pickle),
        ("unpickle", unpickle),
    ):
        event.listen(attribute.class_, name, listener, raw=True, propagate=True)
