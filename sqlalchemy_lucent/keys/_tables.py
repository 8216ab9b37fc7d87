"""The tables that the keys are used for: counted, fenced, and asked whether they need a version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from .._database.connection import ManagedConnection
from ..exceptions import KeyInUseError, LucentError, UnknownKeyVersionError
from ..keyring import Keyring
from ..rotation import (
    RotationReport,
    count_version,
    names_of,
    require_unused,
    rotate,
    status,
)
from ..rotation.targets import (
    Survey,
    Target,
    TargetTable,
    refuse_left_out,
    resolve_targets,
    survey,
)
from ._store import Store

if TYPE_CHECKING:
    from ..migrations.fence import Fence

Counts = dict[str, dict[str, int]]
"""By column and version, how many values there are."""

_T = TypeVar("_T")


class Tables:
    """The targets of a registry, as the database has them."""

    def __init__(self, store: Store, targets: Target | Iterable[Target] | None) -> None:
        self._store = store
        self._engine = store.engine
        self._targets = targets

    def work(
        self,
        what: str,
        work: Callable[[ManagedConnection, Sequence[TargetTable]], _T],
        *,
        exclude: Iterable[str] | None = None,
        read_only: bool = False,
    ) -> _T:
        """Do `work` with those of the targets that are tables.

        :param exclude: refuse other views, unless what they show is among the targets.
        """
        targets = resolve_targets(self._targets, self._engine)

        def on(database: ManagedConnection) -> _T:
            known: Survey = database.read(lambda connection: survey(connection, targets))
            if exclude is not None:
                database.read(lambda connection: refuse_left_out(connection, known, exclude))
            return work(database, known.tables)

        return self._store.work(what, on, read_only=read_only)

    def counts(self) -> Counts:
        """Count the values by column and version."""
        counts: Counts = {}
        for row in status(self._engine, self._targets).rows:
            versions = counts.setdefault(f"{row.table}.{row.column}", {})
            name = row.key_version or "not sealed"
            versions[name] = versions.get(name, 0) + row.count
        return counts

    def require_unneeded(self, version: str) -> None:
        """Refuse a process that lacks `version` while values are under it."""
        counts = self.work(
            f"the count of key version {version!r}",
            lambda database, tables: count_version(database, tables, version),
            read_only=True,
        )
        needing = ", ".join(f"{number} in {name}" for name, number in counts.items() if number)
        if needing:
            raise UnknownKeyVersionError(
                f"this process lacks key version {version!r}, which values need: {needing}. Add "
                "the key to its keyring"
            )

    # -- fences ------------------------------------------------------------------------------------

    def fenced(self, versions: Iterable[str]) -> dict[str, tuple[list[str], list[str]]]:
        """Return, by version, the names of the columns that refuse it, and of those that do not."""
        from ..migrations.fence import Fence  # loads Alembic

        def look(
            connection: sa.Connection, tables: Sequence[TargetTable]
        ) -> dict[str, tuple[list[str], list[str]]]:
            found: dict[str, tuple[list[str], list[str]]] = {each: ([], []) for each in versions}
            inspector = sa.inspect(connection)
            for table in tables:
                for version, (refusing, others) in found.items():
                    fenced = Fence(table, version).find(inspector)
                    for column in table.columns:
                        names = refusing if column.name in fenced else others
                        names.append(f"{table.name}.{column.name}")
            return found

        return self.work(
            "the look at fences",
            lambda database, tables: database.read(lambda connection: look(connection, tables)),
            read_only=True,
        )

    def fence(
        self,
        version: str,
        exclude: Iterable[str],
        keyring: Keyring | None,
        *,
        lock_timeout: float,
        retries: int,
    ) -> None:
        """Have every table refuse `version`, or none that did not before.

        :param keyring: re-encrypt under its primary what is under `version`.
        :raises KeyInUseError: values are under it.
        """
        names = names_of("exclude", exclude)
        # A fence refuses any update of a row whose value it refuses, so look before it is there.
        counts = keyring is None or self._rotate(keyring).failed_count > 0
        lock = {"lock_timeout": lock_timeout, "retries": retries}
        fences = self._fences(version, names, counts=counts, **lock)
        added: list[Fence] = []
        try:
            for fence in fences:
                if not fence.exists(self._engine):
                    added.append(fence)
                    fence.add(self._engine, counts=False)
            if keyring is not None:
                self._rotate(keyring)  # what was committed until the fence was there
            for fence in fences:
                fence.validate(self._engine)
        except LucentError as error:
            fault = error
        else:
            return
        for fence in added:
            with suppress(LucentError):  # check() names what is left
                fence.drop(self._engine)
        if isinstance(fault, KeyInUseError) and keyring is None:
            fault = KeyInUseError(
                f"{fault}. A process still seals under it: with rotate=True, what it commits until "
                "the fence is there is re-encrypted"
            )
        raise fault

    def _rotate(self, keyring: Keyring) -> RotationReport:
        return rotate(self._engine, self._targets, keyring=keyring)

    def unfence(self, version: str) -> None:
        """Have every table take `version` again."""
        for fence in self._fences(version):
            fence.drop(self._engine)

    def _fences(
        self,
        version: str,
        exclude: Iterable[str] | None = None,
        *,
        counts: bool = False,
        **lock: Any,
    ) -> list[Fence]:
        """Return the fence of each table; with `counts`, only if no value is under `version`."""
        from ..migrations.fence import Fence  # loads Alembic

        def look(
            database: ManagedConnection, tables: Sequence[TargetTable]
        ) -> Sequence[TargetTable]:
            if counts:
                require_unused(database, tables, version)
            return tables

        what = f"the look at fences against key version {version!r}"
        found = self.work(what, look, exclude=exclude, read_only=True)
        return [Fence(table, version, **lock) for table in found]
