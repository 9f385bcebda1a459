"""Ray's texts as one line that names the cause."""

from __future__ import annotations

import pytest

from workers.ray_cluster.errors import MAX_CAUSE, cause_in

IMPORT = """The actor died because of an error raised in its creation task, \
\x1b[36mray::Rank_1.__init__()\x1b[39m (pid=7, ip=10.0.0.1, actor_id=9a, repr=<x>)
Traceback (most recent call last):
  File "/a/b.py", line 3, in __init__
    import torch
ModuleNotFoundError: No module named 'torch'"""
CHAINED = """\x1b[36mray::Rank_1.__init__()\x1b[39m (pid=7)
Traceback (most recent call last):
  File "/a/b.py", line 3, in f
    int("x")
ValueError: invalid literal for int() with base 10: 'x'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/a/b.py", line 5, in g
    raise RuntimeError("outer") from error
RuntimeError: outer"""
NESTED = """\x1b[36mray::Rank.__init__()\x1b[39m
RuntimeError: The actor with name Rank failed to import on the worker. This may be because needed \
library dependencies are not installed in the worker environment:

Traceback (most recent call last):
  File "/ray/function_manager.py", line 1, in load
    actor_class = pickle.loads(pickled_class)
ModuleNotFoundError: No module named 'workers'
"""
KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: Rank_1
\tactor_id: 9a
\tpid: 7
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR \
Some common causes include: (1) the process was killed by the OOM killer, (2) ray stop"""
DURING = CHAINED.replace(
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (IMPORT, "ModuleNotFoundError: No module named 'torch'"),
        (CHAINED, "ValueError: invalid literal for int() with base 10: 'x'"),
        (DURING, "ValueError: invalid literal for int() with base 10: 'x'"),
        (NESTED, "ModuleNotFoundError: No module named 'workers'"),
        (
            KILLED,
            "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR",
        ),
        ("\x1b[31mVersion mismatch:\n  Ray: 2.1\x1b[0m", "Version mismatch: Ray: 2.1"),
        (IMPORT.replace("No module", "No\x1b[0m module"), "ModuleNotFoundError: No module named "
         "'torch'"),
    ],
)  # fmt: skip
def test_the_innermost_cause_is_one_line(text: str, cause: str) -> None:
    assert cause_in(text) == cause


def test_a_cause_has_a_bound() -> None:
    assert len(cause_in("x" * 10_000)) == MAX_CAUSE
