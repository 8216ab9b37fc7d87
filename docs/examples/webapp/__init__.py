"""A small service whose tenants store integration credentials.

``models`` defines what is stored, ``keys`` the keyring and the rotation, ``app`` the pages. Start
it with ``make demo-web``.
"""
