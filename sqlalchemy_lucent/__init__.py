"""Encrypted JSON for SQLAlchemy: sealed columns, scoped secrets, online key rotation.

A column needs neither the ORM nor the rotation. What needs them is imported at its first use
(PEP 562), so that a process starts fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .exceptions import (
    ConfigurationError,
    ConflictError,
    DecryptionError,
    InvalidKeyError,
    KeyInUseError,
    KeyStateError,
    LucentError,
    NeedsReauthorizationError,
    NotSealedError,
    PicklingRefusedError,
    RenewalError,
    RenewalTimeoutError,
    RetiredKeyError,
    RotationError,
    SchemaMismatchError,
    SecretNotFoundError,
    SerializationError,
    TamperedError,
    UnknownKeyVersionError,
    UnsupportedOperationError,
    WrongKeyError,
)
from .keyring import Keyring, default_keyring, generate_master_key, set_default_keyring
from .types import Bound, EncryptedJSON, Sealed

if TYPE_CHECKING:
    from ._lifecycle import SecretVersion
    from ._purge import apurge, purge
    from .binding import bound_rows, row_bound
    from .config import Lucent, LucentConfig, SecretsConfig
    from .events import SecretAccess
    from .key_source import KeySource, KeySourceHealth
    from .keys import (
        Announcement,
        AsyncAnnouncement,
        AsyncKeyRegistry,
        FollowingKeyring,
        KeyCheck,
        KeyHolder,
        KeyReceipt,
        KeyRegistry,
        LeakedValue,
        LeakReport,
        Readiness,
        ReceiptFault,
        ReceiptsReport,
        RegisteredKey,
    )
    from .models import LucentBase, LucentSecret, LucentSecretMixin, with_lifecycle
    from .renewal import AsyncRenewals, RenewalAttempt, Renewals
    from .repository import AsyncLucentSecrets, LucentSecrets, SecretInfo
    from .rotation import (
        FailedRow,
        RotationProgress,
        RotationReport,
        StatusReport,
        StatusRow,
        VerifyReport,
        aretire_check,
        arotate,
        astatus,
        averify,
        retire_check,
        rotate,
        status,
        verify,
    )
    from .secret_key import SecretKey

__version__ = "0.1.0"

__all__ = [
    "Announcement",
    "AsyncAnnouncement",
    "AsyncKeyRegistry",
    "AsyncLucentSecrets",
    "AsyncRenewals",
    "Bound",
    "ConfigurationError",
    "ConflictError",
    "DecryptionError",
    "EncryptedJSON",
    "FailedRow",
    "FollowingKeyring",
    "InvalidKeyError",
    "KeyCheck",
    "KeyHolder",
    "KeyInUseError",
    "KeyReceipt",
    "KeyRegistry",
    "KeySource",
    "KeySourceHealth",
    "KeyStateError",
    "Keyring",
    "LeakReport",
    "LeakedValue",
    "Lucent",
    "LucentBase",
    "LucentConfig",
    "LucentError",
    "LucentSecret",
    "LucentSecretMixin",
    "LucentSecrets",
    "NeedsReauthorizationError",
    "NotSealedError",
    "PicklingRefusedError",
    "Readiness",
    "ReceiptFault",
    "ReceiptsReport",
    "RegisteredKey",
    "RenewalAttempt",
    "RenewalError",
    "RenewalTimeoutError",
    "Renewals",
    "RetiredKeyError",
    "RotationError",
    "RotationProgress",
    "RotationReport",
    "SchemaMismatchError",
    "Sealed",
    "SecretAccess",
    "SecretInfo",
    "SecretKey",
    "SecretNotFoundError",
    "SecretVersion",
    "SecretsConfig",
    "SerializationError",
    "StatusReport",
    "StatusRow",
    "TamperedError",
    "UnknownKeyVersionError",
    "UnsupportedOperationError",
    "VerifyReport",
    "WrongKeyError",
    "__version__",
    "apurge",
    "aretire_check",
    "arotate",
    "astatus",
    "averify",
    "bound_rows",
    "default_keyring",
    "generate_master_key",
    "purge",
    "retire_check",
    "rotate",
    "row_bound",
    "set_default_keyring",
    "status",
    "verify",
    "with_lifecycle",
]

_AT_FIRST_USE = {
    name: module
    for module, names in {
        "binding": "bound_rows row_bound",
        "config": "Lucent LucentConfig SecretsConfig",
        "events": "SecretAccess",
        "keys": "Announcement AsyncAnnouncement AsyncKeyRegistry FollowingKeyring KeyCheck "
        "KeyHolder KeyReceipt KeyRegistry LeakReport LeakedValue Readiness ReceiptFault "
        "ReceiptsReport RegisteredKey",
        "key_source": "KeySource KeySourceHealth",
        "_lifecycle": "SecretVersion",
        "_purge": "apurge purge",
        "models": "LucentBase LucentSecret LucentSecretMixin with_lifecycle",
        "renewal": "AsyncRenewals RenewalAttempt Renewals",
        "repository": "AsyncLucentSecrets LucentSecrets SecretInfo",
        "rotation": "FailedRow RotationProgress RotationReport StatusReport StatusRow VerifyReport "
        "aretire_check arotate astatus averify retire_check rotate status verify",
        "secret_key": "SecretKey",
    }.items()
    for name in names.split()
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Hidden from type checkers, which would accept any name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _AT_FIRST_USE:
            value = getattr(import_module(f".{_AT_FIRST_USE[name]}", __name__), name)
            globals()[name] = value  # so that this function is called once for each name
            return value
        if name in _AT_FIRST_USE.values():
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
