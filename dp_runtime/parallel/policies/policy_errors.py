"""What a policy of the user's own raises, as an error that names the policy and the line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from dp_runtime.errors import PolicyFailed


@contextmanager
def policy_errors(field: str, policy: object) -> Iterator[None]:
    """Raise PolicyFailed, which names a setting, for what is raised within, even sys.exit()."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a library is no Exception
        raise PolicyFailed(_told(field, policy, error)) from error


def _told(field: str, policy: object, error: BaseException) -> str:
    kind = type(policy)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    calls = [one for one in traceback.extract_tb(error.__traceback__) if one.filename == file]
    if not calls and isinstance(error, ValueError):
        return str(error)  # of a check of what the policy said
    places = [f"line {one.lineno} in {one.name}" for one in calls]
    where = f" ({', '.join([str(file), *places])})" if places else ""
    return f"{field}: {kind.__name__}: {type(error).__name__}: {error}{where}"
