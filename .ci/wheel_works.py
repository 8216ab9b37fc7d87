"""Seal, store and read a value with nothing installed but the wheel."""

import sqlalchemy as sa

import sqlalchemy_lucent as lucent

assert "site-packages" in lucent.__file__, lucent.__file__
lucent.set_default_keyring(lucent.Keyring({"v1": lucent.generate_master_key()}))
table = sa.Table("t", sa.MetaData(), sa.Column("value", lucent.EncryptedJSON))
engine = sa.create_engine("sqlite://")
with engine.begin() as connection:
    table.metadata.create_all(connection)
    connection.execute(table.insert().values(value={"works": True}))
    assert connection.scalar(sa.select(table.c.value)) == {"works": True}
print(f"sqlalchemy-lucent {lucent.__version__} works from its wheel")
