"""Wrong use of the command ``lucent``: one sentence, the right exit code, no secret."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from sqlalchemy_lucent import Keyring, LucentBase, LucentSecrets
from tests.command import ROOT, Lucent
from tests.conftest import KEY_1, KEY_2, Databases
from tests.integration.workers import fill, keys

PASSWORD = "pa55w0rd-never-shown"
PLAINTEXT = "sk_live_never_shown"
SECRET_KEY = "tenant:t1:stripe:apiKey"
LEDGER = ("--metadata", "tests.integration.workers:metadata")


@pytest.fixture(scope="module")
def lucent(tmp_path_factory: pytest.TempPathFactory) -> Lucent:
    """The command in a directory with a database that holds a secret under v1."""
    directory = tmp_path_factory.mktemp("bad_input")
    engine = create_engine(f"sqlite:///{directory}/app.db")
    LucentBase.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        secrets = LucentSecrets(session, keyring=Keyring({"v1": KEY_1}))
        secrets.set(SECRET_KEY, PLAINTEXT)
    engine.dispose()
    (directory / "empty.db").touch()
    (directory / "not_a_database.db").write_text("no")
    (directory / "broken.py").write_text(f"token = {PLAINTEXT!r}\nraise ValueError(token)\n")
    (directory / "exits.py").write_text("raise SystemExit(0)\n")
    (directory / "incomplete.py").write_text("import a_module_that_is_not_there\n")
    (directory / "models.py").write_text("number = 1\n")
    (directory / "value.json").write_text(f'{{"a": "{PLAINTEXT}",}}')
    (directory / "latin.txt").write_bytes(b"\xff")
    return Lucent(directory, "sqlite:///app.db", keys("v2"))


# Arguments, what the environment has instead of the usual, exit code, sentence.
TABLE: dict[str, tuple[list[str], dict[str, str | None], int, str]] = {
    "no such command": (["rotat"], {}, 2, "No such command 'rotat'"),
    "nearly a command": (["statu"], {}, 2, "? Try 'lucent --help'"),
    "no such option": (["rotate", "--fast"], {}, 2, "No such option"),
    "a word for a number": (["rotate", "--batch-size", "many"], {}, 2, "for '--batch-size'"),
    "a number too small": (["rotate", "--workers", "0"], {}, 2, "for '--workers'"),
    "an argument missing": (["get"], {}, 2, "Missing argument 'KEY'"),
    "an argument too many": (
        ["set", SECRET_KEY, PLAINTEXT], {}, 2, "a secret's value is never one"
    ),
    "a key of three parts": (["get", "a:b:c"], {}, 2, "scope:ownerId:provider:name"),
    "a part without those before": (["list", "--owner", "t1"], {}, 2, "--owner goes with --scope"),
    "a provider without an owner": (
        ["list", "--scope", "tenant", "--provider", "p"], {}, 2, "--provider goes with"
    ),
    "no such secret": (["get", "a:b:c:d"], {}, 1, "no secret is stored under a:b:c:d"),
    "none to delete": (["delete", "a:b:c:d"], {}, 1, "no secret is stored under a:b:c:d"),
    "no version": (["retire-check", "v 1"], {}, 2, "takes a key version"),
    "no version at all": (["retire-check", ""], {}, 2, "retire-check takes a key version"),
    "rows need it": (["retire-check", "v1"], {}, 1, "1 in lucent_secrets.payload"),
    "no key": (["rotate"], {"LUCENT_SECRETS_KEYS": None}, 2, "no keyring is configured"),
    "no key to look": (["keys"], {"LUCENT_SECRETS_KEYS": None}, 2, "no keyring is configured"),
    "a key cut short": (
        ["rotate"], {"LUCENT_SECRETS_KEYS": f"v1:{KEY_1.hex()[:-1]}"}, 2, "has 63 characters"
    ),
    "a key file that is not there": (
        ["verify"],
        {"LUCENT_SECRETS_KEYS": None, "LUCENT_SECRETS_KEY_FILE": "nowhere"},
        2,
        "No such file",
    ),
    "the key of a value": (
        ["get", SECRET_KEY], {"LUCENT_SECRETS_KEYS": f"v2:{KEY_2.hex()}"}, 1, "key version 'v1'"
    ),
    "values that do not open": (
        ["verify"], {"LUCENT_SECRETS_KEYS": f"v2:{KEY_2.hex()}"}, 1, ""
    ),
    "no models": (
        ["status"],
        {"DATABASE_URL": "sqlite:///empty.db"},
        2,
        "or name your models with --metadata or LUCENT_METADATA",
    ),
    "no database": (["status"], {"DATABASE_URL": None}, 2, "no database is named"),
    "no URL": (["status"], {"DATABASE_URL": f"postgres:{PASSWORD}"}, 2, "is not a database URL"),
    "a password where the port is": (
        ["status"],
        {"DATABASE_URL": f"postgresql://host:{PASSWORD}/db"},
        2,
        "is not a database URL",
    ),
    "a password with an @": (
        ["status"], {"DATABASE_URL": f"postgresql://u:p@{PASSWORD}@host/db"}, 2, "write it as %40"
    ),
    "a password with an @ and a slash": (
        ["status"], {"DATABASE_URL": f"postgresql://u:p@h/{PASSWORD}@host/x"}, 2, "write it as %40"
    ),
    "a user with a slash": (
        ["status"], {"DATABASE_URL": f"postgresql://u/x:{PASSWORD}@host/x"}, 2, "%2F"
    ),
    "a password with an @ and a question mark": (
        ["status"], {"DATABASE_URL": f"mysql://u:p@h/x?{PASSWORD}@host/x"}, 2, "write it as %40"
    ),
    "a password that is a part of any message": (
        ["status"],
        {"DATABASE_URL": "postgresql+psycopg://u:p@127.0.0.1:1/db"},
        2,
        "127.0.0.1:1/db: OperationalError; its message is not shown",
    ),
    "a password among the options": (
        ["status"],
        {"DATABASE_URL": "postgresql+psycopg://127.0.0.1:1/db?password=connect"},
        2,
        "127.0.0.1:1/db: OperationalError; its message is not shown",
    ),
    "another kind of database": (
        ["status"], {"DATABASE_URL": f"oracle://u:{PASSWORD}@host/db"}, 2, "these are: sqlite"
    ),
    "a driver that is not there": (
        ["status"], {"DATABASE_URL": f"mysql+nodriver://u:{PASSWORD}@h/db"}, 2, "mysql+nodriver"
    ),
    "an option that no driver has": (
        ["status"],
        {"DATABASE_URL": f"mysql+pymysql://u:{PASSWORD}@127.0.0.1:1/db?colour=red"},
        2,
        "has an option that mysql+pymysql does not take",
    ),
    "nobody listens (PostgreSQL)": (
        ["status"],
        {"DATABASE_URL": f"postgresql+psycopg://u:{PASSWORD}@127.0.0.1:1/db"},
        2,
        "cannot connect to postgresql at 127.0.0.1:1/db",
    ),
    "nobody listens (MySQL)": (
        ["rotate"],
        {"DATABASE_URL": f"mysql+pymysql://u:{PASSWORD}@127.0.0.1:1/db"},
        2,
        "cannot connect to mysql at 127.0.0.1:1/db",
    ),
    "nobody listens (doctor)": (
        ["doctor"],
        {"DATABASE_URL": f"postgresql+psycopg://u:{PASSWORD}@127.0.0.1:1/db"},
        2,
        "cannot connect to postgresql at 127.0.0.1:1/db",
    ),
    "a file that is not there": (
        ["status"], {"DATABASE_URL": "sqlite:///typo.db"}, 2, "no SQLite database at typo.db"
    ),
    "a file that is no database": (
        ["status"], {"DATABASE_URL": "sqlite:///not_a_database.db"}, 2, "file is not a database"
    ),
    "a table that is not there": (["rotate", *LEDGER], {}, 2, "table ledger is not in"),
    "no such table in the models": (
        ["rotate", "--table", "user"], {}, 2, "there are lucent_secret_versions.payload, "
    ),
    "metadata of another form": (["status", "--metadata", "app.Base"], {}, 2, "package.module:B"),
    "metadata that is a path": (
        ["status", "--metadata", "./shop/models.py:Base"], {}, 2, ": write shop.models:Base"
    ),
    "metadata that is not there": (
        ["status", "--metadata", "nowhere:Base"], {}, 2, "No module named 'nowhere'"
    ),
    "metadata that needs another module": (
        ["status", "--metadata", "incomplete:Base"], {}, 2, "'a_module_that_is_not_there'"
    ),
    "metadata without the name": (
        ["status", "--metadata", "models:Base"], {}, 2, "module models has no Base"
    ),
    "metadata that is none": (
        ["status", "--metadata", "models:number"], {}, 2, "not int"
    ),
    "metadata that fails": (
        ["status", "--metadata", "broken:Base"], {}, 2, "importing it raised ValueError at"
    ),
    "metadata that exits": (
        ["status", "--metadata", "exits:Base"], {}, 2, "importing it raised SystemExit at"
    ),
    "no model of secrets": (
        ["list", "--metadata", "models:number"], {}, 2, "no model of scoped secrets"
    ),
    "a value that is no JSON": (
        ["set", SECRET_KEY, "--file", "value.json"], {}, 2, "not JSON (line 1, column"
    ),
    "a value that is no text": (["set", SECRET_KEY, "--file", "latin.txt"], {}, 2, "not UTF-8"),
    "a value that is not there": (
        ["set", SECRET_KEY, "--file", "nowhere"], {}, 2, "cannot be read: No such file"
    ),
    "nobody to ask": (["delete", SECRET_KEY], {}, 2, "add --yes"),
    "a version without --env": (["keygen", "--key-version", "v2"], {}, 2, "goes with --env"),
}  # fmt: skip


def secrets_in(output: str) -> list[str]:
    """Return what must not be in any output, and is."""
    hidden = [PASSWORD, PLAINTEXT]
    for key in (KEY_1, KEY_2):
        hidden += [key.hex()[:-1], base64.b64encode(key).decode().rstrip("=")]
        hidden += [base64.urlsafe_b64encode(key).decode().rstrip("="), repr(key)[2:-1]]
    return [text for text in hidden if text in output]


@pytest.mark.parametrize("case", list(TABLE))
def test_wrong_use_gets_one_sentence_and_its_exit_code(lucent: Lucent, case: str) -> None:
    arguments, environment, code, sentence = TABLE[case]
    # A variable that is not to be there at all is taken out by the shell.
    absent = [name for name, value in environment.items() if value is None]
    given = {name: value for name, value in environment.items() if value is not None}
    here = Lucent(
        lucent.directory,
        None if "DATABASE_URL" in absent else lucent.url,
        None if "LUCENT_SECRETS_KEYS" in absent else lucent.keys,
    )
    done = here(*arguments, env=given)
    assert done.code == code, done
    if sentence:
        (line,) = done.err.splitlines()
        assert line.startswith("lucent: ")
        assert sentence in line
    assert "Traceback" not in done.err
    assert not secrets_in(done.out + done.err)


def test_a_wrong_password_is_not_repeated(databases: Databases, lucent: Lucent) -> None:
    url = databases.url("mysql").set(password=PASSWORD)
    done = Lucent(lucent.directory, url, lucent.keys)("status")
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"lucent: cannot connect to mysql at .*: Access denied .*\n", done.err)
    assert not secrets_in(done.err)


def test_a_sentence_fits_a_narrow_terminal(lucent: Lucent) -> None:
    shown = lucent.on_terminal("rotate", "--fast", columns=40)
    assert shown.code == 2
    assert shown.text.startswith("lucent: No such option")


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(lucent: Lucent, module: str) -> None:
    program = (
        f"import sys; sys.modules[{module!r}] = None; from sqlalchemy_lucent.cli import main; "
        "sys.exit(main(['status']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=lucent.environ(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"lucent: {module} is not installed")
    assert "pip install typer rich" in done.stderr


def test_without_a_synchronous_driver_it_says_what_to_install(lucent: Lucent) -> None:
    program = (
        "import sys; sys.modules['psycopg'] = sys.modules['psycopg2'] = None\n"
        "from importlib import util; found = util.find_spec\n"
        "util.find_spec = lambda name: None if name.startswith('psycopg') else found(name)\n"
        "from sqlalchemy_lucent.cli import main; sys.exit(main(['status']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=lucent.environ({"DATABASE_URL": f"postgresql+asyncpg://u:{PASSWORD}@h/db"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "lucent: asyncpg is async, and the command needs a synchronous driver for postgresql, such "
        "as psycopg: pip install 'psycopg[binary]'\n"
    )


def test_a_closed_pipe_is_quiet(lucent: Lucent, tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/app.db")
    LucentBase.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        LucentSecrets(session).set_many({f"tenant:t{n:05}:p:n": n for n in range(3000)})
    engine.dispose()
    here = Lucent(tmp_path, "sqlite:///app.db", lucent.keys)
    process = here.start("list")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("tenant:t00000:p:n\t")
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (141, "")

    # Also where the output is so short that it would be flushed at the end alone.
    for arguments in (["keys"], ["--help"]):
        short = here.start(*arguments)
        assert short.stdout is not None
        short.stdout.close()
        short.stdout = None
        _, errors = short.communicate(timeout=60)
        assert errors == ""
        assert short.returncode != 0


def with_trigger(tmp_path: Path, does: str) -> Lucent:
    engine = create_engine(f"sqlite:///{tmp_path}/app.db")
    fill(engine, 10)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TRIGGER t BEFORE UPDATE ON ledger BEGIN {does}; END"))
    engine.dispose()
    return Lucent(tmp_path, "sqlite:///app.db", keys("v2"))


def test_a_rotation_that_the_database_ends_leaves_rows(tmp_path: Path) -> None:
    lucent = with_trigger(tmp_path, "DELETE FROM nowhere")
    done = lucent("rotate", *LEDGER)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("lucent: the database ended the rotation: OperationalError: no such")


def test_rows_that_the_database_refuses_are_named(tmp_path: Path) -> None:
    lucent = with_trigger(tmp_path, "SELECT RAISE(ABORT, 'no') WHERE OLD.id = 3")
    done = lucent("rotate", *LEDGER)
    head, said, *rows = done.out.splitlines()
    assert (done.code, head) == (1, "18 values re-encrypted; the primary is v2")
    assert said == "2 values did not open or were refused by the database, left unchanged:"
    assert [row.split("\t")[::4] for row in rows] == [
        ["ledger.free", "IntegrityError"],
        ["ledger.bound", "IntegrityError"],
    ]


# -- nothing leaks ---------------------------------------------------------------------------------


def command_lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """Give what others see of a process's arguments, again and again until it ends."""
    while process.poll() is None:
        try:
            yield Path(f"/proc/{process.pid}/cmdline").read_bytes().decode()
        except OSError:
            return
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="there is no /proc here")
def test_no_output_and_no_command_line_holds_a_key_or_a_plaintext(
    lucent: Lucent, tmp_path: Path
) -> None:
    (tmp_path / "app.db").write_bytes((lucent.directory / "app.db").read_bytes())
    here = Lucent(tmp_path, "sqlite:///app.db", keys("v2"))
    seen: list[str] = []
    for arguments in (
        ["list"], ["status"], ["verify"], ["doctor"], ["keys"], ["keygen", "--env"],
        ["get", SECRET_KEY], ["delete", SECRET_KEY],
    ):  # fmt: skip
        seen += here(*arguments)[1:]
    for arguments, value in (
        (["set", "tenant:t1:stripe:other"], f'"{PLAINTEXT}"'),
        (["set", SECRET_KEY], PLAINTEXT),  # it is no JSON, and is refused
        (["rotate", "--json"], ""),
    ):
        process = here.start(*arguments)
        assert process.stdin is not None
        process.stdin.write(value)
        process.stdin.close()
        process.stdin = None
        watched = set(command_lines(process))
        assert any("sqlalchemy_lucent" in line for line in watched)
        seen += [*watched, *process.communicate(timeout=60)]
    everything = "\n".join(seen)
    assert "tenant:t1:stripe:other" in everything
    assert not secrets_in(everything)


def test_an_error_that_nobody_expected_shows_no_message(lucent: Lucent) -> None:
    program = (
        "import sys, sqlalchemy_lucent.repository as r\n"
        f"def fails(*args, **options): raise OSError({PLAINTEXT!r})\n"
        "r.LucentSecrets.require = fails\n"
        f"from sqlalchemy_lucent.cli import main; sys.exit(main(['get', {SECRET_KEY!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=lucent.directory,
        env=lucent.environ(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lucent: unexpected OSError at <string>:2; its message is not")
    assert not secrets_in(done.stderr)


def test_the_command_is_installed_under_its_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"] == {"lucent": "sqlalchemy_lucent.cli:main"}
