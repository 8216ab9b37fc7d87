"""Removes values of a row from errors of the database, before the application sees them.

PostgreSQL shows the row that a constraint refuses, and a document that it cannot parse. SQLAlchemy
shows the parameters. Either may be a plaintext that bypassed :class:`EncryptedJSON`, which may be
why the statement failed.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any, Final

from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, StatementError
from sqlalchemy.sql.elements import TextClause

_HIDDEN: Final = "parameters hidden: an EncryptedJSON value may be among them, unsealed"


def hide_values(context: ExceptionContext) -> None:
    """Remove values that may be unsealed from an error. A listener for ``handle_error``."""
    error = context.sqlalchemy_exception
    # Another column's bind processor, a default or a missing parameter may fail before
    # EncryptedJSON has seen a value, and SQLAlchemy prints the row's parameters with the error.
    hide = context.execution_context is None
    if isinstance(error, DBAPIError):
        hide = _hide_row(context, error) or hide
    if hide and isinstance(error, StatementError) and error.params:
        error.params = None
        error.add_detail(_HIDDEN)


def _hide_row(context: ExceptionContext, error: DBAPIError) -> bool:
    """Remove what the database says about values from its error. Return whether to hide the
    parameters as well, because one of them may be the refused value.
    """
    driver = context.original_exception
    is_refused = _refuses_a_value(driver)
    if context.dialect.name == "postgresql" and is_refused:
        shown = str(driver)
        part: BaseException | None = driver
        while part is not None:
            _hide_fields(part)
            part = part.__cause__ or part.__context__
        error.args = tuple(
            arg.replace(shown, str(driver)) if isinstance(arg, str) else arg for arg in error.args
        )
    compiled = getattr(context.execution_context, "compiled", None)
    is_text = compiled is None or isinstance(compiled.statement, TextClause)
    return (is_refused and sqlstate(driver) != _NOT_NULL) or (
        is_text and isinstance(error, (IntegrityError, DataError))
    )


# PostgreSQL, appendix A: data exception, a CHECK, a view's check option, another type.
_NOT_NULL: Final = "23502"
_SQLSTATES: Final = ("22", _NOT_NULL, "23514", "44", "42804")
# A CHECK (MariaDB, MySQL), invalid JSON, a value that its column does not accept.
_MYSQL_CODES: Final = frozenset({4025, 3819, 4038, 3140, 3141, 1366})


def sqlstate(driver: BaseException) -> Any:
    """Return the SQLSTATE of an error of a PostgreSQL driver, or ``None``."""
    return getattr(driver, "sqlstate", None) or getattr(driver, "pgcode", None)


def _refuses_a_value(driver: BaseException) -> bool:
    state = sqlstate(driver)
    if isinstance(state, str) and state.startswith(_SQLSTATES):
        return True
    first = driver.args[0] if driver.args else None
    return (
        (isinstance(first, int) and first in _MYSQL_CODES)
        or (isinstance(first, str) and _ASYNCPG_ARGUMENT.search(first) is not None)
        or getattr(driver, "sqlite_errorname", None) == "SQLITE_CONSTRAINT_CHECK"
    )


# asyncpg refuses such an argument before it sends anything.
_ASYNCPG_ARGUMENT: Final = re.compile(r"(invalid input for query argument \$\d+).*", re.DOTALL)


def _hide_fields(error: BaseException) -> None:
    diag = getattr(error, "diag", None)
    primary = getattr(diag, "message_primary", None)
    if primary is not None:  # psycopg reads the fields from the state that it pickles
        error.args = (primary, *error.args[1:])
        with suppress(Exception):
            state: Any = error.__reduce__()[2]
            kept = {n: v for n, v in state["_info"].items() if int(n) not in _VALUE_FIELDS}
            error.__setstate__({"_info": {**dict.fromkeys(_VALUE_FIELDS), **kept}})
    for name in ("detail", "context", "internal_query"):  # asyncpg
        if isinstance(getattr(error, name, None), str):
            with suppress(AttributeError):
                setattr(error, name, None)
    if error.args and isinstance(error.args[0], str):
        message = _ASYNCPG_ARGUMENT.sub(r"\1", error.args[0].partition("\nDETAIL:")[0])
        error.args = (message, *error.args[1:])


# libpq: PG_DIAG_MESSAGE_DETAIL, PG_DIAG_CONTEXT, PG_DIAG_INTERNAL_QUERY.
_VALUE_FIELDS: Final = frozenset({ord("D"), ord("W"), ord("q")})
