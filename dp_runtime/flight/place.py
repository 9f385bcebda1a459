"""Where a rank is in its step, and what it waits for."""

from __future__ import annotations

from typing import NamedTuple

from dp_runtime.flight.record import CollectiveFlight, RankFlight, StepFlight


class Wait(NamedTuple):
    """A rank that waits for others."""

    dp_rank: int
    epoch: int
    number: int  # of the step, or of the collective
    collective: str  # which; empty where it waits for records
    waited_us: int

    @property
    def key(self) -> tuple[bool, int, int]:
        return bool(self.collective), self.epoch, self.number

    @property
    def action(self) -> str:
        """What the others wait for another rank to do."""
        where = f"enter {self.collective}"
        return where if self.collective else f"post its record of step {self.number}"

    def met_by(self, rank: RankFlight) -> bool:
        """Tell whether a rank has come to where this one waits."""
        if not self.collective:
            posted = rank.last_posted
            return posted is not None and posted.key >= (self.epoch, self.number)
        entered = rank.last_collective
        number = -1 if entered is None else entered.number
        return (rank.epoch, number) >= (self.epoch, self.number)


def wait_of(rank: RankFlight, taken_us: int) -> Wait | None:
    until, posted, entered = rank.error_us or taken_us, rank.last_posted, rank.last_collective
    if rank.phase == "agree" and posted is not None and not posted.agreed_us:
        waited = until - posted.posted_us
        return Wait(rank.dp_rank, posted.epoch, posted.step_id, "", waited)
    if rank.phase == "pass" and entered is not None and not entered.left_us:
        what, waited = name_collective(rank, entered), until - entered.entered_us
        return Wait(rank.dp_rank, rank.epoch, entered.number, what, waited)
    return None


def duration(us: int) -> str:
    us = max(us, 0)
    return f"{us / 1e6:.1f} s" if us >= 100_000 else f"{us / 1e3:.1f} ms"


def name_collective(rank: RankFlight, one: CollectiveFlight) -> str:
    step = next((step for step in reversed(rank.steps) if one in step.collectives), None)
    layer = ""
    if step is not None and one.pass_index < len(step.passes):
        # Each MoE layer of a pass gathers, then reduces and scatters.
        layer = f" (MoE layer {(one.number - step.passes[one.pass_index].first_collective) // 2})"
    return f"{one.kind} #{one.number}{layer}"


def place_of(rank: RankFlight, taken_us: int) -> str:
    """Say where a rank is, and for how long."""
    if rank.phase == "starting":
        return "it has not begun a step"
    until = rank.error_us or taken_us
    step = next((s for s in reversed(rank.steps) if s.step_id == rank.phase_step), None)
    detail = _in_pass(rank, step) if rank.phase == "pass" and step else rank.phase
    return f"in step {rank.phase_step}: {detail}, for {duration(until - rank.since_us)}"


def _in_pass(rank: RankFlight, step: StepFlight) -> str:
    index = rank.phase_pass
    kind = step.passes[index].kind if 0 <= index < len(step.passes) else "?"
    where = f"pass {index} ({kind})"
    own = [one for one in step.collectives if one.pass_index == index]
    if not own:
        return where
    verb = "after" if own[-1].left_us else "in"
    return f"{where}, {verb} {name_collective(rank, own[-1])}"
