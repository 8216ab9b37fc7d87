"""Operations as values: how they render, what they show, what undoes them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import alembic.operations
import pytest
import sqlalchemy as sa
from alembic.autogenerate import render_python_code
from alembic.operations.ops import UpgradeOps

import sqlalchemy_lucent.migrations as lucent_migrations
from sqlalchemy_lucent.migrations import (
    CreateLucentSecretsOp,
    DecryptColumnOp,
    DropLucentSecretsOp,
    EncryptColumnOp,
    FenceKeyVersionOp,
    RebindEncryptedColumnOp,
    RotateEncryptedColumnOp,
    UnfenceKeyVersionOp,
)


@pytest.mark.parametrize(
    ("operation", "code"),
    [
        (
            EncryptColumnOp("users", "token", existing_type=sa.JSON),
            "op.encrypt_column('users', 'token', existing_type=sa.JSON())",
        ),
        (
            EncryptColumnOp(
                "users",
                "token",
                existing_type=sa.String(50),
                schema="app",
                context="people.token",
                bound_to=["id"],
                through="token_sealed",
                swap=False,
                drop=False,
                batch_size=10,
            ),
            (
                "op.encrypt_column('users', 'token', existing_type=sa.String(length=50), "
                "schema='app', context='people.token', bound_to=('id',), batch_size=10, "
                "through='token_sealed', swap=False, drop=False)"
            ),
        ),
        (
            DecryptColumnOp("users", "token", existing_type=sa.Text(), bound_to={"id": sa.Uuid()}),
            (
                "op.decrypt_column('users', 'token', existing_type=sa.Text(), "
                "bound_to={'id': sa.Uuid()})"
            ),
        ),
        (
            RebindEncryptedColumnOp("users", "token", from_context="users.old"),
            "op.rebind_encrypted_column('users', 'token', from_context='users.old')",
        ),
        (
            DropLucentSecretsOp("app_secrets", force=True),
            "op.drop_lucent_secrets('app_secrets', force=True)",
        ),
        (
            RotateEncryptedColumnOp("users", "token", bound_to={"id": sa.Uuid()}),
            "op.rotate_encrypted_column('users', 'token', bound_to={'id': sa.Uuid()})",
        ),
        (
            FenceKeyVersionOp("users", "token", "v1", schema="app"),
            "op.fence_key_version('users', 'token', 'v1', schema='app')",
        ),
        (
            FenceKeyVersionOp("users", "token", "v1", lock_timeout=5, retries=0).reverse(),
            "op.unfence_key_version('users', 'token', 'v1', lock_timeout=5, retries=0)",
        ),
    ],
)
def test_an_operation_renders_as_it_is_called(operation: Any, code: str) -> None:
    assert code in render_python_code(UpgradeOps([operation]))


def test_encryption_and_decryption_undo_each_other() -> None:
    encrypt = EncryptColumnOp(
        "users", "token", existing_type=sa.Text(), reader=str, writer=repr, through="other"
    )

    decrypt = encrypt.reverse()

    assert isinstance(decrypt, DecryptColumnOp)
    assert (decrypt.reader, decrypt.writer, decrypt.through) == (str, repr, "other")
    assert decrypt.reverse().to_diff_tuple() == encrypt.to_diff_tuple()


@pytest.mark.parametrize("options", [{"swap": False}, {"drop": False}])
def test_the_reverse_of_a_part_goes_all_the_way_back(options: dict[str, Any]) -> None:
    reverse = EncryptColumnOp("users", "token", existing_type=sa.Text(), **options).reverse()

    assert reverse.swap
    assert reverse.drop


def test_the_reverse_of_a_rebinding_exchanges_the_contexts() -> None:
    operation = RebindEncryptedColumnOp("users", "token", from_context="users.old")

    reverse = operation.reverse()

    assert (reverse.from_context, reverse.own_context) == ("users.token", "users.old")
    assert reverse.reverse().to_diff_tuple() == operation.to_diff_tuple()


def test_a_fence_and_its_end_undo_each_other() -> None:
    fence = FenceKeyVersionOp("users", "token", "v1", schema="app")

    unfence = fence.reverse()

    assert isinstance(unfence, UnfenceKeyVersionOp)
    assert unfence.to_diff_tuple() == ("unfence_key_version", "app", "users", "token", "v1")
    assert unfence.reverse().to_diff_tuple() == fence.to_diff_tuple()


OPERATIONS: list[Any] = [
    value
    for value in vars(lucent_migrations).values()
    if isinstance(value, type) and dataclasses.is_dataclass(value)
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: str(operation.name))
def test_each_operation_is_a_function_and_a_method_with_its_documentation(operation: Any) -> None:
    function = getattr(lucent_migrations, operation.name)

    parameters = inspect.signature(function).parameters
    fields = {field.name for field in dataclasses.fields(operation) if field.init}
    assert {*parameters} == fields | {"operations"}
    assert [*parameters][-1] == "operations"
    options = {name for name in parameters if not name.endswith(("_name", "version"))}
    assert {parameters[name].kind for name in options} == {inspect.Parameter.KEYWORD_ONLY}
    assert inspect.getdoc(function) == inspect.getdoc(operation)
    assert f"``op.{operation.name}()``" in (inspect.getdoc(function) or "")
    method = getattr(alembic.operations.Operations, operation.name)
    assert inspect.getdoc(method) == inspect.getdoc(operation)


@pytest.mark.parametrize(
    ("keywords", "named"), [({}, "existing_type"), ({"existing_type": sa.JSON(), "nul": 1}, "nul")]
)
def test_a_wrong_argument_is_named(keywords: dict[str, Any], named: str) -> None:
    with pytest.raises(TypeError, match=f"EncryptColumnOp.*'{named}'"):
        lucent_migrations.encrypt_column("users", "token", **keywords)


def test_what_alembic_check_shows_of_the_table_of_secrets() -> None:
    drop = DropLucentSecretsOp("vault", schema="app")
    assert drop.to_diff_tuple() == ("drop_lucent_secrets", "app", "vault")
    create = drop.reverse()
    assert isinstance(create, CreateLucentSecretsOp)
    assert create.to_diff_tuple() == ("create_lucent_secrets", "app", "vault")
