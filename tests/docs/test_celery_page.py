"""Make the project of ``docs/celery.md``, start its worker, and run its commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from sqlalchemy_lucent import generate_master_key
from sqlalchemy_lucent._environment import ENV_KEY, ENV_VARIABLES

from .pages import ROOT, blocks
from .shell import Terminal, reader_environment

PAGE = ROOT / "docs" / "celery.md"


@pytest.mark.slow
def test_the_worker_of_the_page_opens_what_the_task_names(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    environ = {name: value for name, value in os.environ.items() if name not in ENV_VARIABLES}
    environ[ENV_KEY] = generate_master_key()
    terminal = Terminal(project, tmp_path / "state", environ)
    worker: subprocess.Popen[bytes] | None = None
    ran = 0
    try:
        for block in blocks(PAGE):
            if block.file is not None:
                name, text = block.file
                (project / name).write_text(text)
            elif block.info == "console" and worker is None:
                worker = subprocess.Popen(
                    block.text.removeprefix("$ ").split(),
                    cwd=project,
                    env=reader_environment(environ),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            elif block.info == "console":
                ran += terminal.run(block.text)
    finally:
        if worker is not None:
            worker.terminate()
            worker.wait()
    assert ran == 2
