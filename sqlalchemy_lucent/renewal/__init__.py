"""Renewals: secrets that expire are renewed by one process for all, and no answer is lost."""

from ._renewals import AsyncRenewals, Renewals
from ._steps import RenewalAttempt

__all__ = ["AsyncRenewals", "RenewalAttempt", "Renewals"]
