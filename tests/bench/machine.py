"""What the figures were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sqlite3
from pathlib import Path

from sqlalchemy import create_engine, text

from tests.bench.servers import bench_database

PACKAGES = (
    "sqlalchemy-lucent",
    "SQLAlchemy",
    "cryptography",
    "orjson",
    "msgspec",
    "ormsgpack",
    "psycopg",
    "asyncpg",
    "PyMySQL",
    "asyncmy",
    "SQLAlchemy-Utils",
    "advanced-alchemy",
    "sqlalchemy-encrypted-field",
)


def description() -> dict[str, str]:
    """Return names and values: the machine, then the versions."""
    return {
        "Processor": _first(r"^model name\s*: (.*)$", "/proc/cpuinfo") or platform.processor(),
        "Cores": str(os.cpu_count()),
        "Memory": _memory(),
        "System": _first(r'^PRETTY_NAME="(.*)"$', "/etc/os-release") or platform.platform(),
        "Kernel": f"{platform.system()} {platform.release()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "SQLite": sqlite3.sqlite_version,
        "PostgreSQL": _server("postgresql"),
        "MariaDB or MySQL": _server("mysql"),
    } | {name: importlib.metadata.version(name) for name in PACKAGES}


def _first(pattern: str, file: str) -> str | None:
    path = Path(file)
    found = re.search(pattern, path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1].strip() if found else None


def _memory() -> str:
    kibibytes = _first(r"^MemTotal: *(\d+) kB$", "/proc/meminfo")
    return f"{int(kibibytes) / 2**20:.0f} GiB" if kibibytes else "unknown"


def _server(kind: str) -> str:
    what = "SHOW server_version" if kind == "postgresql" else "SELECT version()"
    with bench_database(kind) as url:
        engine = create_engine(url)
        with engine.connect() as connection:
            version = str(connection.execute(text(what)).scalar_one())
        engine.dispose()
    return version
