"""The policies of examples/experiments/my_policy.py, in engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.errors import PolicyFailed
from tests.checkpoints import add_mtp, tiny_checkpoint

OWN = "examples/experiments/my_policy.py"
PROMPTS = [[number + 1] * (40 + number) for number in range(6)]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
FIELDS: dict[str, Any] = {
    "padding": f"{OWN}:Eights",
    "routing": f"{OWN}:FewestRequests",
    "prefill_budget": f"{OWN}:ThirtyTwo",
    "speculative_num_steps": 3,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(add_mtp(tiny_checkpoint(tmp_path_factory.mktemp("own"))))


def config(model: str, launcher: str = "thread", **fields: Any) -> EngineConfig:
    more: dict[str, Any] = {"max_model_len": 128, "step_timeout_s": 20.0} | fields
    return EngineConfig(model, dp_size=2, device="cpu", launcher=launcher, **more)


def test_every_kind_does_what_it_says_and_changes_no_token(model: str, tmp_path: Path) -> None:
    file = tmp_path / "drafts.py"
    file.write_text("class Two:\n def draft_length(self, totals):\n  return 2")
    fields = FIELDS | {"speculative_draft_length": f"{file}:Two"}
    with Engine(config(model)) as engine:
        expected = [output.token_ids for output in engine.generate(PROMPTS, GREEDY)]
    with Engine(config(model, **fields)) as engine:
        outputs = engine.generate(PROMPTS, GREEDY)
        steps = engine.step_trace()
    assert [output.token_ids for output in outputs] == expected
    assert [output.dp_rank for output in outputs] == [0, 1] * 3
    rows = [each for step in steps for each in step.passes if any(each.real_rows)]
    assert all(each.gathered_rows[0] % 8 == 0 for each in rows)
    assert all(each.gathered_rows[0] - each.max_rows < 8 for each in rows)
    prompts = [step.prompt_tokens for step in steps if step.output_tokens]
    assert max(prompts[4:]) <= 32
    assert {step.num_drafts for step in steps} <= {1, 2}
    assert steps[-1].num_drafts == 2, "after a first step of one"


@pytest.mark.slow
def test_ranks_that_are_processes_have_the_same_text(model: str, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(Path(OWN).read_text())
    fields = {"padding": f"{file}:Eights", "max_recoveries": 5}
    made = config(model, "local", **fields, inject="rank=1,step=5,kind=kill")
    file.unlink()
    with Engine(made) as engine:
        outputs = engine.generate(PROMPTS, GREEDY)
        steps = [step for step in engine.step_trace() if step.epoch == 1]
    assert [len(output.token_ids) for output in outputs] == [12] * 6
    rows = [each for step in steps for each in step.passes if any(each.real_rows)]
    assert rows
    assert all(each.gathered_rows[1] % 8 == 0 for each in rows)


@pytest.mark.parametrize("launcher", ["thread", pytest.param("local", marks=pytest.mark.slow)])
def test_a_policy_that_fails_ends_the_engine_with_its_own_error(
    model: str, tmp_path: Path, launcher: str
) -> None:
    """No rank is replaced for it: another one would have the same policy."""
    file = tmp_path / "own.py"
    file.write_text(
        "import sys\nclass Own:\n def prefill_budget(self, load):\n"
        "  if load.num_sampling:\n   sys.exit()"
    )
    with Engine(config(model, launcher, prefill_budget=f"{file}:Own")) as engine:
        with pytest.raises(PolicyFailed, match=r"^rank \d: prefill_budget: Own: SystemExit:  \(/"):
            engine.generate(PROMPTS, GREEDY)
        assert {rank.epoch for rank in engine.health()} == {0}


def test_a_policy_that_says_nonsense_is_named(model: str, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("class Own:\n def gathered_rows(self, real_rows):\n  return real_rows[:1]")
    with (
        Engine(config(model, padding=f"{file}:Own", max_recoveries=9)) as engine,
        pytest.raises(PolicyFailed, match=r"padding: gathered_rows: .*a number for each rank"),
    ):
        engine.generate(PROMPTS, GREEDY)
