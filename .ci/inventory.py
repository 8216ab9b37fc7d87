"""Write the software bill of materials of a wheel, and check the licences of what it needs.

``python .ci/inventory.py dist/*.whl`` installs the wheel alone and with all extras, each in an
environment of its own, and writes a CycloneDX file for each beside the wheel.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def allowed(*files: str) -> str:
    lines = [line for name in files for line in (ROOT / ".ci" / name).read_text().splitlines()]
    return ";".join(line for line in lines if line and not line.startswith("#"))


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def take_stock(wheel: Path, extra: str, licences: str, bill: Path) -> None:
    version = wheel.name.split("-")[1]
    with tempfile.TemporaryDirectory() as directory:
        # Without pip, so that nothing is in it but what the wheel brings.
        run(sys.executable, "-m", "venv", "--without-pip", directory)
        python = Path(directory, "bin/python")
        run(
            *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
            *("--disable-pip-version-check", f"{wheel.resolve()}{extra}"),
        )
        run(
            *(BIN / "cyclonedx-py", "environment", "--pyproject", ROOT / "pyproject.toml"),
            *("--mc-type", "library", "--output-reproducible", "--output-file", bill, python),
        )
        run(
            *(BIN / "pip-licenses", f"--python={python}", "--from=mixed"),
            *("--ignore-packages", "sqlalchemy-lucent", "--allow-only", licences),
        )
    # The version is dynamic in pyproject.toml, so cyclonedx-py does not know it.
    document = json.loads(bill.read_text("utf-8"))
    document["metadata"]["component"]["version"] = version
    bill.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    print(f"{bill.name}: {len(document['components'])} components, each of an allowed licence")


def main() -> None:
    wheel = Path(sys.argv[1])
    stem = wheel.name.split("-py3")[0]
    try:
        take_stock(wheel, "", allowed("licences.txt"), wheel.with_name(f"{stem}.cdx.json"))
        take_stock(
            wheel,
            "[all]",
            allowed("licences.txt", "licences-extras.txt"),
            wheel.with_name(f"{stem}-all.cdx.json"),
        )
    except subprocess.CalledProcessError as error:
        sys.exit(f"{Path(error.cmd[0]).name} failed; its message stands above")


if __name__ == "__main__":
    main()
