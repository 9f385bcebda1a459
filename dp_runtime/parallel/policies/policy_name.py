"""PolicyName: a policy of the user's own, FILE.py:CLASS, with the file's text."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dp_runtime.core.plain_values import plain_str
from dp_runtime.errors import not_allowed, one_line, require

SUFFIX = ".py:"


class PolicyName(str):
    """Names a class, and brings the text of its file, which the driver has read once.

    NOTE: ranks run this text, wherever they are, so they can not have another one.
    """

    text: str

    @classmethod
    def read(cls, field: str, value: str, method: str) -> PolicyName:
        """Read the file and look for the class; ValueError says what is wrong with it."""
        name = cls(value)
        try:
            name.text = Path(name.file).read_text(encoding="utf-8")
        except OSError as error:
            raise not_allowed(field, value, f"a file that exists ({error.strerror})") from None
        except UnicodeDecodeError:
            raise not_allowed(field, value, "a file in UTF-8") from None
        found = name._class_in(field)
        has = callable(getattr(found, method, None))
        require(has, field, value, f"a class with a method {method}")
        name.make(field)
        return name

    @property
    def file(self) -> str:
        return self.rpartition(":")[0]

    @property
    def class_name(self) -> str:
        return self.rpartition(":")[2]

    def make(self, field: str) -> Any:
        """Return a new object of the class, which is made without arguments."""
        try:
            return self._class_in(field)()
        except (Exception, SystemExit) as error:
            what = one_line(f"{type(error).__name__}: {error}")
            raise not_allowed(
                field, str(self), f"a class made without arguments; {what}"
            ) from error

    def _class_in(self, field: str) -> type:
        module = self._module(field)
        classes = {n: v for n, v in vars(module).items() if isinstance(v, type)}
        own = [name for name, found in classes.items() if found.__module__ == module.__name__]
        allowed = f"a class of the file, which has {', '.join(own) or 'none'}"
        require(self.class_name in own, field, str(self), allowed)
        return classes[self.class_name]

    def _module(self, field: str) -> ModuleType:
        """Run the text once in a process, whichever of its classes are wanted."""
        digest = hashlib.sha256(f"{self.file}\n{self.text}".encode()).hexdigest()
        name = f"dp_runtime_policy_{digest[:16]}"
        if name in sys.modules:
            return sys.modules[name]
        module = sys.modules[name] = ModuleType(name)
        module.__file__ = self.file
        try:
            exec(compile(self.text, self.file, "exec"), vars(module))
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            what = one_line(f"{type(error).__name__}: {error}")
            raise not_allowed(field, str(self), f"a file that runs; {what}") from error
        return module


def policy(field: str, method: str, choices: Sequence[str] = ()) -> dict[str, Any]:
    """Describe a setting that names one of the choices, or FILE.py:CLASS with such a method."""

    def read(value: object) -> str | None:
        if type(value) is PolicyName:  # other objects may say that they are one
            return value
        text = plain_str(value)
        if text is not None and SUFFIX in text:
            return PolicyName.read(field, text, method)
        return text if text in choices else None

    own = f"FILE.py:CLASS with a method {method}"
    known = f"one of {', '.join(choices)}, or " if choices else ""
    return {"read": read, "allowed": known + own}
