"""``purge``: delete for good what was deleted, and what no secret has any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ._arguments import require_engine
from ._lifecycle import required_tables, run, time_of
from ._pagination import row_after
from ._upsert import key_columns, same_key
from ._versions import SecretHistory
from .events import AccessHandler, SecretAccess
from .exceptions import ConfigurationError
from .models import LucentSecret, LucentSecretMixin, utc_now
from .secret_key import SecretKey, stored_key

if TYPE_CHECKING:  # without greenlet, which only async programs need, it does not import
    from sqlalchemy.ext.asyncio import AsyncEngine

_BATCH: Final = 100


def purge(
    bind: sa.Engine,
    *,
    model: type[LucentSecretMixin] = LucentSecret,
    on_access: AccessHandler | None = None,
) -> int:
    """Delete for good each secret whose `purge_after` is over, and return how many.

    It also deletes the versions of secrets that a store without versions has deleted. It commits
    batch by batch; run it again after an error.

    :param bind: an engine.
    :param model: the mapped class of the secrets.
    :param on_access: called for each secret, see :mod:`sqlalchemy_lucent.events`. If it raises, the
        batch is undone.
    :raises ConfigurationError: `bind` is no engine, or the database has no tables of versions.
    """
    require_engine(bind, "purge()", "apurge()")
    return _Purge(bind, model, on_access).run()


async def apurge(
    bind: AsyncEngine,
    *,
    model: type[LucentSecretMixin] = LucentSecret,
    on_access: AccessHandler | None = None,
) -> int:
    """Do what :func:`purge` does, over an async engine. `on_access` is a plain function."""
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    if not isinstance(bind, AsyncEngine):
        raise ConfigurationError(f"apurge() takes an AsyncEngine, not {type(bind).__name__}")
    # AsyncEngine has no run_sync(). A session has, and connects to nothing by itself.
    async with AsyncSession(bind) as session:
        return await session.run_sync(
            lambda _: purge(bind.sync_engine, model=model, on_access=on_access)
        )


class _Purge:
    def __init__(
        self, engine: sa.Engine, model: type[LucentSecretMixin], on_access: AccessHandler | None
    ) -> None:
        self._engine = engine
        self._on_access = on_access
        table: Any = model.__table__  # type: ignore[attr-defined]
        self._table: sa.Table = table
        self._tables = required_tables(table)

    def run(self) -> int:
        states, versions = self._tables.states, self._tables.versions
        has_secret = sa.exists().where(same_key(self._table, states)).correlate(states)
        # A staged value may wait for its first promotion, without a secret.
        has_staged = (
            sa.exists()
            .where(same_key(versions, states), versions.c.stage == "staged")
            .correlate(states)
        )
        is_left = sa.and_(
            states.c.deleted_at.is_(None),
            ~has_secret,
            sa.or_(states.c.written_at.is_not(None), ~has_staged),
        )
        is_past = states.c.purge_at <= time_of(self._engine.dialect)
        return self._sweep(is_past) + self._sweep(is_left)

    def _sweep(self, condition: sa.ColumnElement[bool]) -> int:
        """Purge what fits, in key order, each batch in a transaction."""
        purged, after = 0, None
        while True:
            with Session(self._engine) as session, session.begin():
                keys = self._find(session, condition, after)
                purged += sum(self._purge(session, key) for key in keys)
            if len(keys) < _BATCH:
                return purged
            after = keys[-1]

    def _find(
        self, session: Session, condition: sa.ColumnElement[bool], after: SecretKey | None
    ) -> Sequence[SecretKey]:
        columns = key_columns(self._tables.states)
        statement = sa.select(*columns).where(condition).order_by(*columns).limit(_BATCH)
        if after is not None:
            last = [sa.literal(part) for part in after]
            statement = statement.where(row_after(columns, last, self._engine.dialect))
        found = run(session.connection().execute, self._tables, statement)
        return [stored_key(row) for row in found]

    def _purge(self, session: Session, key: SecretKey) -> bool:
        """Purge one secret if it is still to be purged; return whether it was."""
        dialect = self._engine.dialect
        history = SecretHistory(self._table, key, session.connection().execute, dialect)
        # It inserts nothing. This keeps InnoDB from locking the gap where the secret was.
        state = history.lock(to_insert=True)
        now = session.execute(sa.select(time_of(dialect))).scalar_one()
        is_past = state.purge_at is not None and state.purge_at <= now
        if state.deleted_at is not None and not is_past:
            return False  # deleted again meanwhile
        existed = is_past or (state.current is None and state.had_secret)
        if is_past:
            history.purge_deleted(state)
        if state.current is None and not history.all_versions():
            history.forget()
        elif is_past:
            history.save(state)
        if existed and self._on_access is not None:
            self._on_access(SecretAccess("purge", key, None, utc_now(), "ok"), session)
        return existed
