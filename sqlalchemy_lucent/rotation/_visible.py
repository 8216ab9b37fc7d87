"""Row-level security: refuse a table of which this user does not see every row.

What is hidden would be counted as done, and stay as it is.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, text

from ..exceptions import RotationError

_HIDES: Final = text(
    "SELECT row_security_active(to_regclass(coalesce(quote_ident(CAST(:schema AS text)) || '.', '')"
    " || quote_ident(CAST(:name AS text))))"
)


def refuse_hidden_rows(connection: Connection, name: str, schema: str | None) -> None:
    """Do nothing, unless PostgreSQL shows this user some rows of a table only.

    :raises RotationError: a policy of row-level security applies to this user.
    """
    if connection.dialect.name != "postgresql":
        return
    if connection.scalar(_HIDES, {"name": name, "schema": schema}):
        raise RotationError(
            f"row-level security may hide rows of table {name} from this user, and what is hidden "
            "would not be converted or counted. Connect as a role with BYPASSRLS, or as the "
            "table's owner without FORCE ROW LEVEL SECURITY"
        )
