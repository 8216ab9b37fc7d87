"""The tree of errors: as it is drawn, usable without an engine option, and safe to pass on."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import traceback

import pytest
from sqlalchemy import bindparam, create_engine, exc, select
from sqlalchemy.types import String, TypeDecorator

import sqlalchemy_lucent
from sqlalchemy_lucent import LucentError, exceptions

CLASSES = [
    value
    for value in vars(exceptions).values()
    if inspect.isclass(value) and value.__module__ == exceptions.__name__
]
each_class = pytest.mark.parametrize("class_", CLASSES)


def drawn() -> dict[str, tuple[int, list[str]]]:
    """Return the tree in the docstring: for each name its depth and its other bases."""
    tree = {}
    pattern = r"^( +)(\w+Error)(?: +\((.+?)\))?(?: {2,}\S.*)?$"
    for indent, name, bases in re.findall(pattern, exceptions.__doc__ or "", re.MULTILINE):
        tree[name] = (len(indent) // 2 - 2, [b.split(".")[-1] for b in bases.split(", ") if b])
    return tree


def test_the_tree_in_the_docstring_names_every_class_and_no_other() -> None:
    assert list(drawn()) == [class_.__name__ for class_ in CLASSES]


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    parents: list[str] = []
    for name, (depth, others) in drawn().items():
        bases = [base.__name__ for base in getattr(exceptions, name).__bases__]
        parents[depth:] = [name]
        assert bases == ([parents[depth - 1], *others] if depth else others), name


@each_class
def test_every_error_is_a_lucent_error_that_sqlalchemy_does_not_wrap(
    class_: type[LucentError],
) -> None:
    assert issubclass(class_, LucentError)
    assert issubclass(class_, exc.DontWrapMixin)


@each_class
def test_every_error_is_documented_and_exported(class_: type[LucentError]) -> None:
    assert class_.__doc__
    assert getattr(sqlalchemy_lucent, class_.__name__) is class_


@each_class
def test_every_error_survives_pickle_and_copy(class_: type[LucentError]) -> None:
    error = class_("what is wrong, and what to do")
    protocols = range(pickle.HIGHEST_PROTOCOL + 1)
    pickled = [pickle.loads(pickle.dumps(error, protocol)) for protocol in protocols]
    for again in (*pickled, copy.copy(error), copy.deepcopy(error)):
        assert type(again) is class_
        assert str(again) == "what is wrong, and what to do"


@each_class
def test_the_message_of_every_error_is_the_sentence_alone(class_: type[LucentError]) -> None:
    assert str(class_("a sentence")) == "a sentence"


@each_class
def test_an_error_raised_while_binding_keeps_its_class_and_shows_no_parameter(
    class_: type[LucentError],
) -> None:
    class Refusing(TypeDecorator[str]):
        impl = String
        cache_ok = True

        def process_bind_param(self, value: object, dialect: object) -> str:
            raise class_("refused")

    engine = create_engine("sqlite://")
    with engine.connect() as connection, pytest.raises(class_, match=r"^refused$") as caught:
        connection.execute(select(bindparam("p", type_=Refusing())), {"p": "MARKER"})
    engine.dispose()
    assert type(caught.value) is class_
    assert "MARKER" not in "".join(traceback.format_exception_only(caught.value))
