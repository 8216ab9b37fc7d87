"""The tables that the keys are used for: counted, fenced, and asked whether they need a version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from .._database.connection import ManagedConnection
from ..exceptions import LucentError, UnknownKeyVersionError
from ..rotation import count_version, require_unused, status
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
                named = (exclude,) if isinstance(exclude, str) else tuple(exclude)
                database.read(lambda connection: refuse_left_out(connection, known, named))
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

    def unfenced(self, version: str) -> list[str]:
        """Return the names of the tables that do not refuse `version`."""
        fences = self._fences(version)
        return [fence.target.name for fence in fences if not fence.exists(self._engine)]

    def fence(self, version: str, exclude: Iterable[str]) -> None:
        """Have every table refuse `version`, or none that did not before.

        :raises KeyInUseError: values are under it.
        """
        fences = self._fences(version, exclude)
        added: list[Fence] = []
        fault: LucentError | None = None
        try:
            for fence in fences:
                if not fence.exists(self._engine):
                    added.append(fence)
                    fence.add(self._engine)
            for fence in fences:
                fence.validate(self._engine)
        except LucentError as error:
            fault = error
        if fault is None:
            return
        for fence in added:
            with suppress(LucentError):  # check() names what is left
                fence.drop(self._engine)
        raise fault

    def unfence(self, version: str) -> None:
        """Have every table take `version` again."""
        for fence in self._fences(version):
            fence.drop(self._engine)

    def _fences(self, version: str, exclude: Iterable[str] | None = None) -> list[Fence]:
        """Return the fence of each table; with `exclude`, only if no value is under `version`."""
        from ..migrations.fence import Fence  # loads Alembic

        def look(
            database: ManagedConnection, tables: Sequence[TargetTable]
        ) -> Sequence[TargetTable]:
            if exclude is not None:
                require_unused(database, tables, version)
            return tables

        what = f"the look at fences against key version {version!r}"
        found = self.work(what, look, exclude=exclude, read_only=True)
        return [Fence(table, version) for table in found]
