"""Build wheel and sdist twice from clean clones and compare them; look at what is in them.

The clones differ in path, time stamps, umask and time zone. Run it with the Python of ``.venv``;
it builds what is committed, whatever the working tree holds.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

NEEDED_BY_THE_TESTS = (
    ".ci/oldest.txt", "CHANGELOG.md", "LICENSE",
    "Makefile", "README.md", "alembic/env.py", "docs/tutorial.md", "pyproject.toml",
    "sqlalchemy_lucent/py.typed", "tests/conftest.py", "tests/vectors/rows.json",
)  # fmt: skip


def build(clone: Path, *, umask: int, zone: str, stamp: int) -> dict[str, Path]:
    """Return the files that ``make wheel`` makes in a clone, by name."""
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    for path in clone.rglob("*"):
        if path.is_file() and ".git" not in path.parts:
            os.utime(path, (stamp, stamp))
            path.chmod(path.stat().st_mode & ~umask)
    environ = {name: text for name, text in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    subprocess.run(
        # `-o`: the environment that runs this is the one to build with.
        ["make", "--silent", "-o", ".venv/.dev", "wheel", f"BIN={BIN}"],
        cwd=clone,
        env={**environ, "TZ": zone},
        umask=umask,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return {path.name: path for path in sorted((clone / "dist").iterdir())}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_contents(wheel: Path, sdist: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0].split("-")[0] for name in names}
    if tops != {"sqlalchemy_lucent"} or "sqlalchemy_lucent/py.typed" not in names:
        sys.exit(f"the wheel holds more or less than the package: {sorted(tops)}")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    missing = [name for name in NEEDED_BY_THE_TESTS if name not in packed]
    if missing:
        sys.exit(f"the sdist lacks {', '.join(missing)}")
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    foreign = packed - set(tracked) - {"PKG-INFO"}
    if foreign:
        sys.exit(f"the sdist holds what is not in the repository: {', '.join(sorted(foreign))}")


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        one = build(Path(directory, "one"), umask=0o022, zone="UTC", stamp=1_000_000_000)
        other = build(
            Path(directory, "a longer path", "other"),
            umask=0o077,
            zone="Asia/Kathmandu",
            stamp=1_500_000_001,
        )
        if list(one) != list(other):
            sys.exit(f"two builds made different files: {', '.join({*one, *other})}")
        sdist, wheel = sorted(one.values(), key=lambda path: path.suffix)
        check_contents(wheel, sdist)
        for name, path in one.items():
            if digest(path) != digest(other[name]):
                sys.exit(f"two builds of {name} from the same commit differ")
            print(f"{digest(path)}  {name}")


if __name__ == "__main__":
    main()
