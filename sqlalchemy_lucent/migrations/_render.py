"""Render operations and column types into a revision file."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any, Literal

from alembic.autogenerate.api import AutogenContext
from alembic.autogenerate.render import _repr_type, renderers
from sqlalchemy import Computed
from sqlalchemy.sql.expression import ColumnClause
from sqlalchemy.types import TypeEngine

from .._sql import key_version
from ..models import UTCDateTime
from ..types import EncryptedJSON
from .operations import LucentOp


@renderers.dispatch_for(LucentOp)
def _render_operation(autogen_context: AutogenContext, operation: LucentOp) -> str:
    """Render the call, with the arguments that differ from their defaults."""
    arguments = []
    for field in sorted(fields(operation), key=_is_option):
        value = getattr(operation, field.name)
        # A `reader` or `writer` is a function and has no text: add it by hand.
        if value == field.default or callable(value):
            continue
        name = f"{field.name}=" if field.kw_only else ""
        arguments.append(name + _render_value(value, autogen_context))
    return f"op.{operation.name}({', '.join(arguments)})"


def _is_option(field: Field[Any]) -> bool:
    return field.kw_only and field.default is not MISSING


def _render_value(value: object, autogen_context: AutogenContext) -> str:
    if isinstance(value, TypeEngine):
        return _repr_type(value, autogen_context)
    if isinstance(value, dict):
        members = (f"{name!r}: {_repr_type(t, autogen_context)}" for name, t in value.items())
        return f"{{{', '.join(members)}}}"
    return repr(value)


def render_item(type_: str, item: object, autogen_context: AutogenContext) -> str | Literal[False]:
    """Render this package's column types and key versions with the import that they need.

    Pass it to ``context.configure(render_item=…)``; a hook of your own calls it for what it does
    not render itself.
    """
    if type_ == "type" and isinstance(item, EncryptedJSON):
        autogen_context.imports.add("from sqlalchemy_lucent import EncryptedJSON")
        return repr(item)
    if type_ == "type" and isinstance(item, UTCDateTime):
        autogen_context.imports.add("from sqlalchemy_lucent.models import UTCDateTime")
        return "UTCDateTime()"
    if type_ == "server_default" and isinstance(item, Computed):
        return _rendered_key_version(item, autogen_context)
    return False


def _rendered_key_version(item: Computed, autogen_context: AutogenContext) -> str | Literal[False]:
    # Alembic would write the SQL of the database that it is connected to.
    if not isinstance(item.sqltext, key_version):
        return False
    (value,) = item.sqltext.clauses
    if not isinstance(value, ColumnClause):
        return False
    autogen_context.imports.add("from sqlalchemy_lucent.models import computed_key_version")
    return f"computed_key_version({str(value.name)!r})"
