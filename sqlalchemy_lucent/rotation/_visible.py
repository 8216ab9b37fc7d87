"""Row-level security: refuse a table of which this user does not see every row.

What is hidden would be counted as done, and stay as it is.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, text

from ..exceptions import RotationError

# A view shows what its tables show to its owner or to this user: a policy of theirs may hide rows.
_HIDES: Final = text("""
WITH RECURSIVE beneath (relation) AS (
    SELECT CAST(to_regclass(:name) AS oid)
    UNION
    SELECT depends.refobjid FROM beneath
    JOIN pg_rewrite AS rule ON rule.ev_class = beneath.relation
    JOIN pg_depend AS depends ON depends.objid = rule.oid
    WHERE depends.classid = CAST('pg_rewrite' AS regclass)
    AND depends.refclassid = CAST('pg_class' AS regclass)
)
SELECT coalesce(bool_or(
    CASE WHEN class.oid = to_regclass(:name) THEN row_security_active(class.oid)
    ELSE class.relrowsecurity END
), false)
FROM beneath JOIN pg_class AS class ON class.oid = beneath.relation
""")


def refuse_hidden_rows(connection: Connection, name: str, schema: str | None) -> None:
    """Do nothing, unless PostgreSQL shows this user some rows of a table only.

    :raises RotationError: a policy of row-level security applies to this user, or may apply beneath
        a view.
    """
    if connection.dialect.name != "postgresql":
        return
    # As statements name it: a name may have been declared with quote=False.
    quote = connection.dialect.identifier_preparer.quote
    qualified = ".".join(quote(part) for part in (schema, name) if part is not None)
    if connection.scalar(_HIDES, {"name": qualified}):
        raise RotationError(
            f"row-level security may hide rows of {name} from this user, and what is hidden would "
            "not be converted or counted. Connect as a role with BYPASSRLS, or as the table's "
            "owner without FORCE ROW LEVEL SECURITY; and name the table itself, not a view of it"
        )
