"""How the operations and column types are written into a generated file."""

from __future__ import annotations

from typing import Literal

from alembic.autogenerate.api import AutogenContext
from alembic.autogenerate.render import _repr_type, renderers
from sqlalchemy import Computed
from sqlalchemy.sql.expression import ColumnClause

from .._sql import key_version
from ..models import UTCDateTime
from ..types import EncryptedJSON
from .operations import (
    ColumnOp,
    ConvertColumnOp,
    CreateLucentSecretsOp,
    CreateSealedCheckOp,
    DecryptColumnOp,
    DropLucentSecretsOp,
    DropSealedCheckOp,
    EncryptColumnOp,
    RebindEncryptedColumnOp,
    RotateEncryptedColumnOp,
    SealedCheckOp,
)


@renderers.dispatch_for(CreateLucentSecretsOp)
def _render_create(autogen_context: AutogenContext, operation: CreateLucentSecretsOp) -> str:
    return f"op.create_lucent_secrets({_rendered_name(operation)})"


@renderers.dispatch_for(DropLucentSecretsOp)
def _render_drop(autogen_context: AutogenContext, operation: DropLucentSecretsOp) -> str:
    return f"op.drop_lucent_secrets({_rendered_name(operation)})"


def _rendered_name(operation: CreateLucentSecretsOp | DropLucentSecretsOp) -> str:
    arguments = [] if operation.table_name == "lucent_secrets" else [repr(operation.table_name)]
    if operation.schema is not None:
        arguments.append(f"schema={operation.schema!r}")
    return ", ".join(arguments)


@renderers.dispatch_for(RotateEncryptedColumnOp)
def _render_rotate(autogen_context: AutogenContext, operation: RotateEncryptedColumnOp) -> str:
    return _rendered_call("rotate_encrypted_column", autogen_context, operation)


@renderers.dispatch_for(EncryptColumnOp)
def _render_encrypt(autogen_context: AutogenContext, operation: EncryptColumnOp) -> str:
    return _rendered_call("encrypt_column", autogen_context, operation)


@renderers.dispatch_for(DecryptColumnOp)
def _render_decrypt(autogen_context: AutogenContext, operation: DecryptColumnOp) -> str:
    return _rendered_call("decrypt_column", autogen_context, operation)


@renderers.dispatch_for(RebindEncryptedColumnOp)
def _render_rebind(autogen_context: AutogenContext, operation: RebindEncryptedColumnOp) -> str:
    return _rendered_call("rebind_encrypted_column", autogen_context, operation)


@renderers.dispatch_for(CreateSealedCheckOp)
@renderers.dispatch_for(DropSealedCheckOp)
def _render_sealed_check(autogen_context: AutogenContext, operation: SealedCheckOp) -> str:
    schema = "" if operation.schema is None else f", schema={operation.schema!r}"
    return f"op.{operation.name}({operation.table_name!r}, {operation.column_name!r}{schema})"


def _rendered_call(name: str, autogen_context: AutogenContext, operation: ColumnOp) -> str:
    """Render a call; a `reader` or `writer` is a function, which has no text: add it by hand."""
    arguments = [repr(operation.table_name), repr(operation.column_name)]
    if isinstance(operation, ConvertColumnOp):
        rendered = _repr_type(operation.existing_type, autogen_context)
        arguments.append(f"existing_type={rendered}")
    if isinstance(operation, RebindEncryptedColumnOp):
        arguments.append(f"from_context={operation.from_context!r}")
    for argument, value in operation.arguments().items():
        if isinstance(value, dict):
            members = (f"{n!r}: {_repr_type(t, autogen_context)}" for n, t in value.items())
            arguments.append(f"{argument}={{{', '.join(members)}}}")
        else:
            arguments.append(f"{argument}={value!r}")
    return f"op.{name}({', '.join(arguments)})"


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
