"""The files of ``docs/containers.md`` put a keyring where the package finds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from sqlalchemy_lucent import Keyring, generate_master_key
from sqlalchemy_lucent._cli.commands import app
from sqlalchemy_lucent._cli.database import URL_VARIABLE
from sqlalchemy_lucent._environment import ENV_VARIABLES

from .pages import ROOT, blocks

PAGE = ROOT / "docs" / "containers.md"


def document(name: str) -> Any:
    """Return the YAML block of the page that begins with its file's name."""
    (text,) = (b.text for b in blocks(PAGE) if b.info == "yaml" and b.text.startswith(f"# {name}"))
    return yaml.safe_load(text)


def mounted(root: Path, path: str, content: str) -> Path:
    """Write `content` where a container with its root at `root` would see `path`."""
    file = root / path.removeprefix("/")
    file.parent.mkdir(parents=True)
    file.write_text(content)
    return file


@pytest.fixture
def keys() -> str:
    return f"v2:{generate_master_key()},v1:{generate_master_key()}\n"


def test_compose_mounts_the_file_that_the_variable_names(tmp_path: Path, keys: str) -> None:
    compose = document("compose.yaml")
    ((variable, path),) = compose["services"]["app"]["environment"].items()
    (secret,) = compose["services"]["app"]["secrets"]
    assert secret in compose["secrets"]
    assert path == f"/run/secrets/{secret}"
    assert variable in ENV_VARIABLES
    file = mounted(tmp_path, path, keys)
    assert Keyring.from_env({variable: str(file)}).versions == ("v2", "v1")


def test_kubernetes_mounts_the_file_that_the_variable_names(tmp_path: Path, keys: str) -> None:
    pod = document("deployment.yaml")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (variable,) = container["env"]
    (mount,) = container["volumeMounts"]
    (volume,) = pod["volumes"]
    assert mount["name"] == volume["name"]
    assert mount["readOnly"] is True
    (command,) = (b.text for b in blocks(PAGE) if b.text.startswith("$ kubectl"))
    *_, name, from_file = command.split()
    assert name == volume["secret"]["secretName"]
    key = from_file.removeprefix("--from-file=").partition("=")[0]
    assert variable["value"] == f"{mount['mountPath']}/{key}"
    assert variable["name"] in ENV_VARIABLES
    file = mounted(tmp_path, variable["value"], keys)
    assert Keyring.from_env({variable["name"]: str(file)}).primary == "v2"


def test_the_job_runs_rotators_that_find_the_keys_and_the_database(tmp_path: Path) -> None:
    spec = document("rotate.yaml")["spec"]
    assert spec["completions"] == spec["parallelism"] > 1
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    program, command, *options = container["command"]
    assert program == "lucent"
    with pytest.raises(SystemExit, match="0"):
        typer.main.get_command(app).main([command, *options, "--help"], prog_name=program)
    keys_file, database = container["env"]
    assert keys_file["name"] in ENV_VARIABLES
    assert database["name"] == URL_VARIABLE
    assert keys_file["value"].startswith(container["volumeMounts"][0]["mountPath"] + "/")
