"""Records and the agreement that is folded from them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_runtime.core.step_program import MAX_DRAFTS, MAX_PASSES, SERVING_PROGRAMS, Pass, Program
from dp_runtime.errors import RankDisagreement
from dp_runtime.parallel.agreement import RECORD_WORDS, FaultBits, StepRecord, StepTotals, agree
from dp_runtime.parallel.buckets import GraphBuckets
from dp_runtime.parallel.execution_plan import ExecutionMode, ExecutionPolicy
from dp_runtime.parallel.prefill_budget import StepLoad

SPECULATIVE = Program((Pass.DRAFT, Pass.DRAFT, Pass.TARGET, Pass.DRAFT_EXTEND))
PROGRAMS = (*SERVING_PROGRAMS, SPECULATIVE)
GRAPHS = ExecutionPolicy(
    graphs={
        (pass_kind, program.query_len(pass_kind)): GraphBuckets(5000, program.query_len(pass_kind))
        for program in PROGRAMS
        for pass_kind in program.passes
    }
)
count = st.integers(0, 2**40)


@st.composite
def step_records(draw: st.DrawFn) -> list[StepRecord]:
    epoch, step_id = draw(count), draw(count)
    program_id = draw(st.integers(0, len(PROGRAMS) - 1))
    passes = len(PROGRAMS[program_id].passes)
    rows = st.tuples(*[st.integers(0, 5000)] * passes)
    return [
        StepRecord(
            epoch, step_id, program_id, draw(rows), draw(count), draw(count), draw(count),
            draw(st.integers(0, 2**passes - 1)),
            draw(st.sampled_from([FaultBits.NONE, FaultBits.STOP])), draw(count), draw(count),
            draw(count), draw(count), draw(st.integers(0, 1)),
        )
        for _ in range(draw(st.integers(1, 8)))
    ]  # fmt: skip


@given(step_records())
def test_a_record_survives_its_words(records: list[StepRecord]) -> None:
    for record in records:
        words = record.to_words()
        assert len(words) == RECORD_WORDS
        assert StepRecord.from_words(words) == record


@given(step_records())
def test_the_agreement_is_the_same_pure_value_on_all_ranks(records: list[StepRecord]) -> None:
    agreements = [agree(list(records), PROGRAMS, execution=GRAPHS) for _ in records]
    assert all(agreement == agreements[0] for agreement in agreements)
    first = agreements[0]
    assert hash(first) == hash(agreements[-1])
    assert first.dp_size == len(records)
    for index, rows in enumerate(first.real_rows):
        assert rows == tuple(record.real_rows[index] for record in records)
    assert first.idle == (sum(map(sum, first.real_rows)) == 0)
    assert first.stop == any(record.fault_bits for record in records)
    assert first.queued_tokens == tuple(record.queued_tokens for record in records)
    assert first.next_prefill_budget is None, "nobody asked for one"
    assert records[first.slowest].waited_us == min(record.waited_us for record in records)
    for index, plan in enumerate(first.plans):
        votes = [record.graph_votes & 1 << index for record in records]
        replayed = plan.mode is ExecutionMode.GRAPH
        assert replayed == (all(votes) and any(first.real_rows[index])), "no rows: no graph"
        is_target = first.program.passes[index] is Pass.TARGET
        replays = is_target and any(record.replays_routing for record in records)
        assert plan.replays_routing == replays, "one rank's rows do, so all ranks gather"
        assert plan.query_len == first.program.query_len(first.program.passes[index])


@given(step_records(), st.randoms(use_true_random=False))
def test_totals_do_not_depend_on_the_order_of_ranks(
    records: list[StepRecord], rng: random.Random
) -> None:
    shuffled = list(records)
    rng.shuffle(shuffled)

    def policy(totals: StepTotals) -> int:
        return (totals.drafts_accepted + totals.drafts_proposed) % len(PROGRAMS)

    def budget(load: StepLoad) -> int:
        assert load.prefill_rows == max(record.prefill_rows for record in records)
        assert load.num_sampling == sum(record.num_sampling for record in records)
        assert load.step_us == max(record.step_us for record in records)
        return sum(load)

    one = agree(records, PROGRAMS, policy, GRAPHS, budget=budget)
    other = agree(shuffled, PROGRAMS, policy, GRAPHS, budget=budget)
    assert one.next_program_id == other.next_program_id
    assert one.next_prefill_budget == other.next_prefill_budget is not None


@pytest.mark.parametrize("field", ["epoch", "step_id", "program_id"])
@pytest.mark.parametrize("odd", [0, 1, 3])
def test_a_record_that_differs_is_named_with_all_ranks(field: str, odd: int) -> None:
    records = [StepRecord(1, 7, 0, (rank,)) for rank in range(4)]
    values = {"epoch": 1, "step_id": 7, "program_id": 0, field: 2}
    records[odd] = StepRecord(values["epoch"], values["step_id"], values["program_id"], (9,))
    with pytest.raises(RankDisagreement) as error:
        agree(records, PROGRAMS)
    lines = str(error.value).splitlines()
    assert len(lines) == 2 + len(records)
    assert lines[1].split() == ["rank", "epoch", "step_id", "program_id", "real_rows"]
    assert lines[2 + odd].split()[0] == str(odd)


def test_an_unknown_program_is_a_disagreement() -> None:
    with pytest.raises(RankDisagreement, match="no program 9"):
        agree([StepRecord(0, 0, 9, (1,))] * 2, PROGRAMS)


def test_a_record_with_the_wrong_number_of_passes_is_a_disagreement() -> None:
    with pytest.raises(RankDisagreement, match="4 passes"):
        agree([StepRecord(0, 0, 1, (1, 2, 3, 4)), StepRecord(0, 0, 1, (1,))], PROGRAMS)


def test_a_program_has_one_target_and_few_passes() -> None:
    with pytest.raises(AssertionError, match="one target"):
        Program((Pass.DRAFT,))
    with pytest.raises(AssertionError, match="at most"):
        Program((Pass.TARGET, *[Pass.DRAFT] * MAX_PASSES))
    with pytest.raises(AssertionError, match="draft_extend after"):
        Program((Pass.DRAFT, Pass.TARGET))


@pytest.mark.parametrize("num_drafts", range(1, MAX_DRAFTS + 1))
def test_a_speculative_program_verifies_all_that_it_drafts(num_drafts: int) -> None:
    program = Program.speculative(num_drafts)
    assert len(program.passes) == num_drafts + 1
    assert program.num_drafts == num_drafts
    assert program.query_len(Pass.DRAFT) == 1
    assert program.query_len(Pass.TARGET) == program.query_len(Pass.DRAFT_EXTEND) == num_drafts + 1
    assert SERVING_PROGRAMS[0].num_drafts == 0
    assert SERVING_PROGRAMS[0].query_len(Pass.TARGET) == 1
