"""What a database is asked, beside values: connections, errors, relations, what a user may see."""
