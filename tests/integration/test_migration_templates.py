"""The environments that ``alembic init`` makes, with the three lines that a user adds.

Each is taken through creation, autogenerate, a rotation, a second one, and back down, by the
``alembic`` command as a process.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import alembic
import pytest
from sqlalchemy import (
    URL,
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    insert,
    make_url,
)

from sqlalchemy_lucent import (
    Bound,
    EncryptedJSON,
    Keyring,
    set_default_keyring,
    status,
    verify,
)
from sqlalchemy_lucent.types import RowPart
from tests.command import exit_code, request_run
from tests.conftest import KEY_1, KEY_2
from tests.databases import SYNC_DRIVERS
from tests.docs.pages import ROOT, blocks

pytestmark = pytest.mark.slow

TAKES_COMPARATORS = tuple(map(int, alembic.__version__.split(".")[:2])) >= (1, 18)
"""Before 1.18, Alembic takes no comparators of others, so that rotations are written by hand."""

SHIPPED = {path.name for path in (Path(alembic.__file__).parent / "templates").iterdir()}
"""The templates of this Alembic; ``pyproject_async`` came after 1.16."""

KEYS = {"v1": KEY_1, "v2": KEY_2, "v3": bytes(range(64, 96))}

MODELS = """
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlalchemy_lucent import EncryptedJSON, LucentSecretMixin, row_bound


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[dict] = mapped_column(EncryptedJSON)


class Account(Base):
    __tablename__ = "accounts"
    email: Mapped[str] = mapped_column(String(50), primary_key=True)
    token: Mapped[dict] = row_bound("email")


class Secret(LucentSecretMixin, Base):
    __tablename__ = "app_secrets"
"""

USERS = Table(
    "users", MetaData(), Column("id", Integer, primary_key=True), Column("token", EncryptedJSON)
)

IMPORTS = """from alembic import context
import sqlalchemy_lucent.migrations as lucent_migrations
from models import Base
"""

ROTATIONS = [
    "op.rotate_encrypted_column('users', 'token')",
    "op.rotate_encrypted_column('accounts', 'token', bound_to=('email',))",
]

OPTIONS = """
            render_item=lucent_migrations.render_item,
            autogenerate_plugins=["alembic.autogenerate.*", "sqlalchemy_lucent.*"],
            transaction_per_migration=True,
"""


class Project:
    """A user's project in a folder of its own."""

    def __init__(self, folder: Path, template: str, url: URL) -> None:
        self.folder = folder
        self.url = url
        self.primary = "v1"
        """The newest key version that the project has; older ones stay at hand."""
        self.alembic("init", "--template", template, "migrations")
        (folder / "models.py").write_text(MODELS)
        env = folder / "migrations" / "env.py"
        text = env.read_text()
        text = text.replace("from alembic import context\n", IMPORTS)
        text = text.replace("target_metadata = None", "target_metadata = Base.metadata")
        text = re.sub(
            r"target_metadata=target_metadata(\.get\(name\))?",
            lambda found: found.group() + "," + OPTIONS,
            text,
        )
        # The template has a comma of its own in some places.
        env.write_text(re.sub(r",(\s*),", r",\1", text))
        ini = folder / "alembic.ini"
        rendered = url.render_as_string(hide_password=False).replace("%", "%%")
        ini.write_text(
            re.sub(r"(?m)^sqlalchemy\.url = .*$", f"sqlalchemy.url = {rendered}", ini.read_text())
        )

    def alembic(self, *arguments: str, fails: bool = False) -> str:
        names = list(KEYS)[: list(KEYS).index(self.primary) + 1]
        environ = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "LUCENT_SECRETS_KEYS": ",".join(f"{n}:{KEYS[n].hex()}" for n in reversed(names)),
        }
        with tempfile.TemporaryFile() as output, Path(os.devnull).open("rb") as nothing:
            streams = (nothing.fileno(), output.fileno(), output.fileno())
            code = exit_code(request_run("alembic", arguments, self.folder, environ, streams))
            output.seek(0)
            text = output.read().decode()
        assert (code != 0) == fails, text
        return text

    def database(self, number: int) -> str:
        """Return the URL of one of several databases."""
        return f"sqlite:///{self.folder}/{number}.db"

    def newest_revision(self) -> Path:
        versions = (self.folder / "migrations" / "versions").glob("*.py")
        return max(versions, key=lambda path: path.stat().st_mtime_ns)

    def write_rotation(self, message: str) -> None:
        """Have a rotation of everything written, by Alembic where it can."""
        if TAKES_COMPARATORS:
            assert "rotate_encrypted_column" in self.alembic("check", fails=True)
            self.alembic("revision", "--autogenerate", "-m", message)
            return
        self.alembic("revision", "-m", message)
        revision = self.newest_revision()
        upgrade = "\n    ".join(["def upgrade() -> None:", *ROTATIONS])
        code = revision.read_text().replace("def upgrade() -> None:", upgrade, 1)
        revision.write_text(code)


def sync_engine(url: URL) -> Engine:
    return create_engine(url.set(drivername=SYNC_DRIVERS[url.get_backend_name()]))


def take_through_its_life(project: Project) -> None:
    metadata = MetaData()
    users = USERS.to_metadata(metadata)
    accounts = Table(
        "accounts",
        metadata,
        Column("email", String(50), primary_key=True),
        Column("token", EncryptedJSON(bound_to=["email"])),
    )

    project.alembic("revision", "--autogenerate", "-m", "create")
    project.alembic("upgrade", "head")
    project.alembic("check")

    set_default_keyring(Keyring({"v1": KEY_1}))
    engine = sync_engine(project.url)
    row: tuple[RowPart, ...] = ("a@example.com",)
    with engine.begin() as connection:
        connection.execute(insert(users), [{"id": n, "token": {"n": n}} for n in range(1, 1_500)])
        connection.execute(
            insert(accounts).values(email=row[0], token=Bound({"account": True}, row=row))
        )

    for version in ("v2", "v3"):
        project.primary = version
        project.write_rotation(f"rotate to {version}")
        code = project.newest_revision().read_text()
        for rotation in ROTATIONS:
            assert rotation in code
        assert "app_secrets" not in code
        assert not any(key.hex() in code for key in KEYS.values())
        output = project.alembic("upgrade", "head")
        assert "re-encrypted 1499 values of users.token" in output
        project.alembic("check")

        assert {row.key_version for row in status(engine, metadata).rows} == {version}
        report = verify(engine, metadata, keyring=Keyring({version: KEYS[version]}))
        assert report.ok
        assert report.opened == 1_500

    project.alembic("downgrade", "-1")
    project.alembic("upgrade", "head")
    project.alembic("downgrade", "base")
    engine.dispose()


# The templates `generic` and `async` are below, on SQLite and elsewhere.
@pytest.mark.parametrize(
    "template, driver",
    [
        (template, driver)
        for template, driver in (("pyproject", "sqlite"), ("pyproject_async", "sqlite+aiosqlite"))
        if template in SHIPPED
    ],
)
def test_the_templates_with_a_pyproject(tmp_path: Path, template: str, driver: str) -> None:
    url = make_url(f"{driver}:///{tmp_path}/app.db")
    take_through_its_life(Project(tmp_path, template, url))


def test_the_generic_template_on_each_database(tmp_path: Path, engine: Engine) -> None:
    take_through_its_life(Project(tmp_path, "generic", engine.url))


def test_the_async_template_on_each_driver(tmp_path: Path, async_url: URL) -> None:
    take_through_its_life(Project(tmp_path, "async", async_url))


@pytest.fixture
def multidb(tmp_path: Path) -> Project:
    """The template over two databases, each with a table of one row under v1 and a rotation."""
    project = Project(tmp_path, "multidb", make_url("sqlite://"))
    ini = tmp_path / "alembic.ini"
    text = ini.read_text()
    for number in (2, 1):
        section = f"[engine{number}]\n"
        text = text.replace(section, f"{section}sqlalchemy.url = {project.database(number)}\n")
    ini.write_text(re.sub(r"(?m)^sqlalchemy\.url = (driver:|sqlite://$).*\n?", "", text))
    (tmp_path / "migrations" / "versions" / "1.py").write_text(
        "from alembic import op\n"
        "revision, down_revision = '1', None\n"
        "def upgrade(engine_name):\n"
        "    op.rotate_encrypted_column('users', 'token')\n"
    )
    set_default_keyring(Keyring({"v1": KEY_1}))
    for number in (1, 2):
        engine = create_engine(project.database(number))
        USERS.metadata.create_all(engine)
        with engine.begin() as connection:
            connection.execute(insert(USERS).values(id=1, token={"n": number}))
        engine.dispose()
    project.primary = "v2"
    return project


def versions(project: Project) -> list[str | None]:
    found = []
    for number in (1, 2):
        engine = create_engine(project.database(number))
        found += [row.key_version for row in status(engine, USERS).rows]
        engine.dispose()
    return found


def test_the_multidb_template_is_told_why_it_is_refused(multidb: Project) -> None:
    output = multidb.alembic("upgrade", "head", fails=True)

    assert "begun outside of Alembic" in output
    assert versions(multidb) == ["v1", "v1"]


def function_of_the_page(page: str, caption: str) -> str:
    (function,) = (
        block.text.partition("\n\n")[2]
        for block in blocks(ROOT / "docs" / page)
        if block.text.startswith(f":caption: {caption}\n")
    )
    return function


def test_the_multidb_template_with_the_function_of_the_documentation(multidb: Project) -> None:
    env = multidb.folder / "migrations" / "env.py"
    before, _, after = env.read_text().partition("def run_migrations_online() -> None:")
    end = after[after.index("\nif context.is_offline_mode():") :]
    env.write_text(before + function_of_the_page("reference.md", "run_migrations_online.py") + end)

    multidb.alembic("upgrade", "head")

    assert versions(multidb) == ["v2", "v2"]


def test_the_async_template_with_the_function_of_the_documentation(tmp_path: Path) -> None:
    project = Project(tmp_path, "async", make_url(f"sqlite+aiosqlite:///{tmp_path}/app.db"))
    env = tmp_path / "migrations" / "env.py"
    before, _, after = env.read_text().partition("def do_run_migrations(")
    end = after[after.index("\nasync def run_async_migrations") :]
    env.write_text(before + function_of_the_page("alembic.md", "do_run_migrations.py") + end)
    set_default_keyring(Keyring({"v1": KEY_1}))
    engine = create_engine(f"sqlite:///{tmp_path}/app.db")
    USERS.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(USERS).values(id=1, token={"n": 1}))
    (tmp_path / "migrations" / "versions" / "1.py").write_text(
        "from alembic import op\n"
        "revision, down_revision = '1', None\n"
        "def upgrade():\n"
        "    op.rotate_encrypted_column('users', 'token')\n"
    )
    project.primary = "v2"

    project.alembic("upgrade", "head")

    assert [row.key_version for row in status(engine, USERS).rows] == ["v2"]
    engine.dispose()
