"""Values of kinds that users bring: what looks like Python's types and behaves otherwise."""

from __future__ import annotations

from collections import UserList
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from fractions import Fraction
from functools import cache
from types import MappingProxyType
from typing import Any, NoReturn
from unittest.mock import Mock

import numpy as np
import torch


class Rage(Exception):
    """Raised by every method of hostile objects; no message of ours may depend on it."""


def _rage(*arguments: object, **named: object) -> NoReturn:
    raise Rage("first line\nsecond line" + "x" * 10_000)


METHODS = (
    "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __hash__ __iter__ __len__ __bool__ __getitem__ "
    "__contains__ __repr__ __str__ __int__ __index__ __float__ __format__ __add__ __radd__ "
    "__abs__ __neg__ __reduce__ __reduce_ex__ __getstate__ __array__ __copy__ __deepcopy__ "
    "keys items values copy tolist item strip encode"
)
HOSTILE: dict[str, Any] = dict.fromkeys(METHODS.split(), _rage)
HostileObject = type("HostileObject", (), HOSTILE)
HostileInt = type("HostileInt", (int,), HOSTILE)
HostileFloat = type("HostileFloat", (float,), HOSTILE)
HostileStr = type("HostileStr", (str,), HOSTILE)
HostileList = type("HostileList", (list,), HOSTILE)
HostileTuple = type("HostileTuple", (tuple,), HOSTILE)
HostileDict = type("HostileDict", (dict,), HOSTILE)
HostileMapping = type("HostileMapping", (Mapping,), HOSTILE)
HostileSequence = type("HostileSequence", (Sequence,), HOSTILE)
HostileRepr = type("HostileRepr", (), {"__repr__": lambda self: "a\n\x1b[31mb" * 100_000})


class LyingClass:
    __class__: Any = property(_rage)


class Endless(Sequence[int]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        return 1


class RaisesHalfway(Mapping[int, float]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, key: int) -> float:
        return 1.0

    def __iter__(self) -> Iterator[int]:
        yield 1
        raise RuntimeError("dictionary changed size during iteration")


class Number(IntEnum):
    TWO = 2


class Device(StrEnum):
    CPU = "cpu"


class Plain(Enum):
    TWO = 2


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def nested_dict(depth: int) -> dict[Any, Any]:
    value: dict[Any, Any] = {}
    for _ in range(depth):
        value = {1: value}
    return value


@cache
def junk() -> dict[str, Any]:
    """Values that no field takes as a number, a text or a list of those."""
    return {
        "object": object(), "hostile object": HostileObject(), "lying class": LyingClass(),
        "hostile repr": HostileRepr(), "hostile mapping": HostileMapping(),
        "hostile sequence": HostileSequence(), "mock": Mock(spec=int),
        "generator": (i for i in (1, 2)), "decimal": Decimal("2"), "complex": 2 + 0j,
        "enum": Plain.TWO, "enum class": Number, "type": int, "function": nested, "ellipsis": ...,
        "bytes": b"\x01\x02", "bytearray": bytearray(b"\x01"), "memoryview": memoryview(b"\x01"),
        "nested": nested(100_000), "nested dict": nested_dict(100_000),
        "datetime": np.datetime64(5, "ns"), "timedelta": np.timedelta64(5, "ns"),
        "structured": np.zeros(2, [("a", "i4")]), "meta tensor": torch.zeros(2, device="meta"),
        "infinity": float("inf"), "nan": float("nan"), "numpy nan": np.float32("nan"),
        "huge": 10**19, "very huge": -(10**5000), "halfway": RaisesHalfway(),
        "two dimensions": np.ones((2, 2), np.int64),
        "huge array": np.broadcast_to(np.int64(1), (1 << 40,)),
    }  # fmt: skip


TWOS: tuple[Any, ...] = (
    2, np.uint8(2), np.int8(2), np.int16(2), np.uint16(2), np.int32(2), np.uint64(2), np.int64(2),
    np.array(2), np.array(2, np.uint8), torch.tensor(2), torch.tensor(2, dtype=torch.uint8),
    Number.TWO, HostileInt(2),
)  # fmt: skip
FLOAT_TWOS: tuple[Any, ...] = (
    *TWOS, 2.0, np.float16(2), np.float32(2), np.float64(2), np.longdouble(2), np.array(2.0),
    torch.tensor(2.0), torch.tensor(2.0, dtype=torch.bfloat16), Fraction(2), HostileFloat(2),
)  # fmt: skip
INT_LISTS: tuple[Any, ...] = (
    [1, 2], (1, 2), range(1, 3), UserList([1, 2]), HostileList([1, 2]), HostileTuple([1, 2]),
    [np.uint8(1), np.int64(2)], [HostileInt(1), Number.TWO], [torch.tensor(1), np.array(2)],
    *(np.array([1, 2], dtype) for dtype in "bBhHiIqQ"), np.array([1, 2], ">i4"),
    np.array([1, 2], object),
    np.array([2, 1])[::-1], np.array([1, 7, 2])[::2],
    torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([1, 7, 2])[::2],
)  # fmt: skip
MAPPINGS: tuple[Any, ...] = (
    {2: 2.0}, MappingProxyType({2: 2.0}), HostileDict({2: 2.0}), {np.uint8(2): np.float32(2)},
    {Number.TWO: Fraction(2)}, {2: np.array(2)},
)  # fmt: skip
