"""Policies by path: what is read, what travels, and what is wrong with a file."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from dp_runtime import EngineConfig
from dp_runtime.parallel.policies.policy_name import PolicyName

TEXT = """
from dataclasses import dataclass

@dataclass
class Own:
    calls: int = 0
    def choose(self, ranks, demand):
        self.calls += 1
        return max(ranks)

class Needs:
    def __init__(self, number): ...
    def choose(self, ranks, demand): ...

class Exits:
    def __init__(self): raise SystemExit(5)
    def choose(self, ranks, demand): ...

class Empty: ...
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(TEXT)
    return path


def test_a_config_brings_the_text_of_a_policy_wherever_it_goes(file: Path) -> None:
    config = EngineConfig("m", routing=f"{file}:Own")
    file.write_text("raise SystemError('read once')")
    for other in (config, config.copied(), replace(config, dp_size=2)):
        name = pickle.loads(pickle.dumps(other)).routing
        assert isinstance(name, PolicyName)
        assert (name.file, name.class_name, name.text) == (str(file), "Own", TEXT)
        one, another = name.make("routing"), name.make("routing")
        assert one.choose({0: None, 3: None}, 1) == 3
        assert (one.calls, another.calls) == (1, 0)
        assert type(one) is type(another)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}/no.py:Own", r"^routing: '/.*no.py:Own' is not allowed; a file that exists \(No such"),
        ("{}/own.py:Other", "; a class of the file, which has Own, Needs, Exits, Empty$"),
        ("{}/own.py:dataclass", "; a class of the file, which has"),
        ("{}/own.py:Empty", "; a class with a method choose$"),
        ("{}/own.py:Needs", "; a class made without arguments; TypeError: .*'number'"),
        ("{}/bad.py:Own", r"; a file that runs; SyntaxError: .*\(bad.py, line 1\)"),
        ("{}/raises.py:Own", "; a file that runs; ZeroDivisionError"),
        ("{}/exits.py:Own", "; a file that runs; SystemExit: 4$"),
        ("{}/own.py:Exits", "; a class made without arguments; SystemExit: 5$"),
        ("{}/own.txt:Own", "; one of round_robin, least_tokens, least_padded_cost, .*FILE.py:CLA"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_at_once(file: Path, name: str, message: str) -> None:
    (file.parent / "bad.py").write_text("class Own(:")
    (file.parent / "raises.py").write_text("1 / 0")
    (file.parent / "exits.py").write_text("raise SystemExit(4)")
    with pytest.raises(ValueError, match=message):
        EngineConfig("m", routing=name.format(file.parent))


def test_a_policy_stands_in_place_of_the_built_in_one() -> None:
    own = "examples/experiments/my_policy.py:"
    with pytest.raises(ValueError, match=r"^prefill_budget: .* None with max_step_ms"):
        EngineConfig("m", prefill_budget=f"{own}ThirtyTwo", max_step_ms=5)
    with pytest.raises(ValueError, match=r"^speculative_draft_length: .* nothing without specul"):
        EngineConfig("m", speculative_draft_length=f"{own}OneMoreOrLess")
    fields = {"speculative_num_steps": 3, "speculative_draft_length": f"{own}OneMoreOrLess"}
    assert len(EngineConfig("m", **fields).programs) == 3  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="None with speculative_adaptive"):
        EngineConfig("m", speculative_adaptive=True, **fields)  # type: ignore[arg-type]
