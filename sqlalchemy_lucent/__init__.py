"""Encrypted JSON for SQLAlchemy: sealed columns, scoped secrets, online key rotation."""

from .binding import bound_rows, row_bound
from .config import Lucent, LucentConfig, SecretsConfig
from .events import SecretAccess
from .exceptions import (
    ConfigurationError,
    ConflictError,
    DecryptionError,
    InvalidKeyError,
    KeyInUseError,
    LucentError,
    NotSealedError,
    PicklingRefusedError,
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
from .models import LucentBase, LucentSecret, LucentSecretMixin
from .repository import AsyncLucentSecrets, LucentSecrets, SecretInfo
from .rotation import (
    FailedRow,
    RotationProgress,
    RotationReport,
    StatusReport,
    StatusRow,
    VerifyReport,
    arotate,
    averify,
    retire_check,
    rotate,
    status,
    verify,
)
from .secret_key import SecretKey
from .types import Bound, EncryptedJSON, Sealed

__version__ = "0.1.0"

__all__ = [
    "AsyncLucentSecrets",
    "Bound",
    "ConfigurationError",
    "ConflictError",
    "DecryptionError",
    "EncryptedJSON",
    "FailedRow",
    "InvalidKeyError",
    "KeyInUseError",
    "Keyring",
    "Lucent",
    "LucentBase",
    "LucentConfig",
    "LucentError",
    "LucentSecret",
    "LucentSecretMixin",
    "LucentSecrets",
    "NotSealedError",
    "PicklingRefusedError",
    "RotationError",
    "RotationProgress",
    "RotationReport",
    "SchemaMismatchError",
    "Sealed",
    "SecretAccess",
    "SecretInfo",
    "SecretKey",
    "SecretNotFoundError",
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
    "arotate",
    "averify",
    "bound_rows",
    "default_keyring",
    "generate_master_key",
    "retire_check",
    "rotate",
    "row_bound",
    "set_default_keyring",
    "status",
    "verify",
]
