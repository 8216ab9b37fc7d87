"""The errors that this package raises, in one tree, and how they are raised without showing keys.

::

    LucentError (sqlalchemy.exc.DontWrapMixin, Exception)
      ConfigurationError            no keyring, bad environment, no context
      InvalidKeyError (ValueError)  a master key, version or secret key that breaks a rule
      SerializationError (TypeError, ValueError)
      SchemaMismatchError           a stored document that its schema refuses
      UnsupportedOperationError (sqlalchemy.exc.InvalidRequestError)
      PicklingRefusedError (TypeError)
      DecryptionError
        NotSealedError              not our bytes
        UnknownKeyVersionError      sealed under a version that the keyring lacks
        RetiredKeyError             sealed under a version older than the keyring's oldest
        WrongKeyError               same version name, another key (fingerprints differ)
        TamperedError               right key, but not the bytes, column or row that were sealed
      SecretNotFoundError (LookupError)
      ConflictError                 compare-and-swap lost
      RotationError
        KeyInUseError               a key that rows still need
        KeyStateError               a step that a key's state or its holders do not allow yet
      RenewalError                  a renewal that did not get or store a new value
        RenewalTimeoutError         who renews an expired value was not done in time
        NeedsReauthorizationError   the provider's grant is gone

Every class derives from :class:`sqlalchemy.exc.DontWrapMixin`. SQLAlchemy wraps other exceptions
that are raised while it binds parameters in a ``StatementError`` whose message prints the row's
parameters, which are plaintext.

No message holds a key, a plaintext or part of one. For the same reason, errors are raised outside
the ``except`` block of their cause: a chained ``JSONDecodeError`` or ``UnicodeEncodeError`` carries
the whole document.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, ParamSpec, TypeVar, cast

from sqlalchemy import exc as sa_exc

_P = ParamSpec("_P")
_T = TypeVar("_T")


class LucentError(sa_exc.DontWrapMixin, Exception):
    """Base of every error that this package raises."""


class ConfigurationError(LucentError):
    """The keyring, the environment or a column is not set up. The message says what to set."""


class InvalidKeyError(LucentError, ValueError):
    """A master key, a key version or a part of a secret key breaks a rule."""


class SerializationError(LucentError, TypeError, ValueError):
    """A value that JSON would not give back equal.

    The message gives the path of the fault and the type found there, never the value. Names are
    data, so a path has a member's position: ``$.{1st}[2].{3rd}``.
    """


class SchemaMismatchError(LucentError):
    """A stored document does not fit the type that the caller asked for."""


class UnsupportedOperationError(LucentError, sa_exc.InvalidRequestError):
    """A SQL operation that has no meaning on ciphertext, or would need the plaintext."""


class PicklingRefusedError(LucentError, TypeError):
    """An object that holds keys was about to be pickled."""


class DecryptionError(LucentError):
    """A stored value does not open. The subclass says why."""


class NotSealedError(DecryptionError):
    """The stored value is not one that this package sealed (plaintext or foreign bytes)."""


class UnknownKeyVersionError(DecryptionError):
    """The value is sealed under a key version that the keyring lacks."""


class RetiredKeyError(DecryptionError):
    """The value is sealed under a key version older than the keyring's ``oldest``."""


class WrongKeyError(DecryptionError):
    """The keyring has the version, but another key under its name (fingerprints differ)."""


class TamperedError(DecryptionError):
    """The key is right, but the bytes, the column or the row are not those that were sealed."""


class SecretNotFoundError(LucentError, LookupError):
    """No secret is stored under the key."""


class ConflictError(LucentError):
    """A compare-and-swap lost: another writer changed the row first."""


class RotationError(LucentError):
    """A rotation could not start or did not finish. The message says what is left."""


class KeyInUseError(RotationError):
    """Stored rows still need a key version."""


class KeyStateError(RotationError):
    """A key's state, or a process that lacks it, does not allow this step. Nothing was changed."""


class RenewalError(LucentError):
    """A secret was not renewed. The stored value is what it was."""


class RenewalTimeoutError(RenewalError):
    """A value has expired, and another process did not renew it in time."""


class NeedsReauthorizationError(RenewalError):
    """The grant behind a secret is gone: its owner has to log in again.

    A refresh function raises it as well, to say so.
    """


def hide_locals(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Make `function` raise the package's errors without the frames that hold its arguments.

    A traceback keeps the local variables of every frame that an error passed through, and error
    reporters send them: not only a key that is refused, but also valid ones. So the error's
    traceback is started over, in a frame that has dropped its arguments.
    """

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except LucentError as error:
            fault = error.with_traceback(None)
        del args, kwargs
        raise fault

    @wraps(function)
    async def call_async(*args: _P.args, **kwargs: _P.kwargs) -> Any:
        try:
            return await cast("Awaitable[Any]", function(*args, **kwargs))
        except LucentError as error:
            fault = error.with_traceback(None)
        del args, kwargs
        raise fault

    return cast("Callable[_P, _T]", call_async) if iscoroutinefunction(function) else call
