"""A small service whose tenants store integration credentials, to show the library at work.

``models`` is what is stored, ``keys`` the keyring and the rotation, ``app`` the pages. Start it
with ``make demo-web``.
"""
