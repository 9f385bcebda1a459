"""OutputOrder: which output of a request comes next, for states that follow its outputs."""

from __future__ import annotations


class OutputOrder:
    """Sees to it that every output of a request is sampled once, and in order."""

    def __init__(self, num_outputs: int) -> None:
        self._next = range(num_outputs, num_outputs + 1)  # of which one may be sampled next

    def advance(self, request_id: int, index: int, num_rows: int) -> None:
        """Expect output `index` and, in num_rows - 1 further rows, drafted ones after it."""
        low, high = self._next[0], self._next[-1]
        known = f"{low}" if low == high else f"{low}..{high}"
        assert low <= index <= high, (
            f"request {request_id} has {known} outputs, on which its next token depends, "
            f"and samples output {index}"
        )
        self._next = range(index + 1, index + num_rows + 1)
