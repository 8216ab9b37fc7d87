"""Look into the frames of an error, as an error reporter does."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType
from typing import Any


def frames_of_ours(error: BaseException) -> Iterator[FrameType]:
    """Give the package's frames in the traceback of `error` and of what it is chained to."""
    chain: list[BaseException | None] = [error]
    seen: set[int] = set()
    while chain:
        link = chain.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        chain += [link.__cause__, link.__context__]
        traceback = link.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_globals.get("__name__", "").startswith("sqlalchemy_lucent"):
                yield traceback.tb_frame
            traceback = traceback.tb_next


def texts_in_frames(error: BaseException) -> Iterator[tuple[str, bytes]]:
    """Give each text and bytes that is reached from a local variable of the package's frames.

    With each comes the name of the function that holds it. Attributes, slots and containers are
    followed.
    """
    for frame in frames_of_ours(error):
        seen: set[int] = set()
        waiting: list[Any] = list(frame.f_locals.values())
        while waiting:
            value = waiting.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            yield from ((frame.f_code.co_qualname, data) for data in _data(value))
            waiting += _within(value)


def _data(value: Any) -> Iterator[bytes]:
    if isinstance(value, str):
        yield value.encode("utf-8", "surrogatepass")
    elif isinstance(value, (bytes, bytearray, memoryview)):
        yield bytes(value)
    elif not isinstance(value, type):
        yield repr(value).encode("utf-8", "surrogatepass")


def _within(value: Any) -> list[Any]:
    if isinstance(value, (str, bytes, int, float, type(None), type)):
        return []
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    module = type(value).__module__ or ""
    if not module.startswith(("sqlalchemy_lucent", "tests")):
        return []  # what others hold is theirs to hide
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    held = [getattr(value, name, None) for name in slots if isinstance(name, str)]
    return [*held, *getattr(value, "__dict__", {}).values()]
