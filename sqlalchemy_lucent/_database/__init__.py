"""The database beside its values: connections, errors, relations, and what a user may see."""
