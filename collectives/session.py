"""The token by which this program's ranks and shared names are told from other programs'."""

from __future__ import annotations

import os
import secrets
from functools import cache

VARIABLE = "DP_RUNTIME_SESSION"


@cache
def session_token() -> str:
    """Return a few letters that a driver chooses, or inherits from VARIABLE, as its ranks do."""
    return os.environ.get(VARIABLE) or secrets.token_hex(4)
