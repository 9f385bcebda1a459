"""Runs an experiment: every point as often as its plan says, each time on new ranks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

from dp_runtime.engine.async_engine import AsyncEngine
from dp_runtime.errors import one_line
from dp_runtime.experiments.experiment import Experiment
from dp_runtime.experiments.measurement.figures import figures_of
from dp_runtime.experiments.measurement.load_driver import LoadDriver
from dp_runtime.experiments.measurement.request_record import RequestRecord, answered
from dp_runtime.experiments.point import Run
from dp_runtime.experiments.results.run_directory import RunDirectory
from dp_runtime.metrics.progress_bar import ProgressBar
from dp_runtime.metrics.recording import Recording
from dp_runtime.metrics.status import RankState, at_rest

logger = logging.getLogger(__name__)

LOOK_EVERY_S, SETTLE_S = 0.02, 2.0


@dataclass(frozen=True)
class Outcome:
    """How many runs have ended, those of earlier calls included."""

    directory: Path
    runs: int
    failed: int


def run_experiment(
    experiment: Experiment, directory: Path, resume: bool = False, show_progress: bool = False
) -> Outcome:
    """Run all points and write their results; a run that fails is a row with its error.

    resume: go on with what the directory has. Ctrl-C leaves a directory that can be resumed.
    """
    results = RunDirectory(directory, experiment)
    with results.open(resume):
        _run_all(experiment, results, show_progress)
        rows = results.rows()
    return Outcome(directory, len(rows), sum(bool(row["error"]) for row in rows))


def _run_all(experiment: Experiment, results: RunDirectory, show_progress: bool) -> None:
    runs = [run for run in experiment.runs() if not results.is_done(run)]
    begun = monotonic()
    with ProgressBar(experiment.plan.name, len(runs), "run", show_progress) as progress:
        for number, run in enumerate(runs):
            progress.update(number, note=_note(run, number, len(runs), monotonic() - begun))
            _measure(experiment, results, run)
        progress.update(len(runs))


def _measure(experiment: Experiment, results: RunDirectory, run: Run) -> None:
    try:
        records, recording = _served(experiment, run)
        error = "" if answered(records) else f"no request was answered: {records[0].error}"
        no_step = bool(error) and not recording.steps
        figures = {} if no_step else figures_of(records, recording.steps, experiment.slo)
        results.add(run, figures, records, recording, error)
    except Exception as problem:  # of this point; the others go on
        text = one_line(f"{type(problem).__name__}: {problem}")
        logger.warning("%s failed: %s", run, text)
        results.add(run, {}, (), error=text)


def _served(experiment: Experiment, run: Run) -> tuple[list[RequestRecord], Recording]:
    engine = AsyncEngine(run.point.config)
    try:
        return asyncio.run(_serve(experiment, run, engine))
    finally:
        engine.close_now()


async def _serve(
    experiment: Experiment, run: Run, engine: AsyncEngine
) -> tuple[list[RequestRecord], Recording]:
    """Serve a run's load once the ranks are warm; returns its requests and its steps alone."""
    plan = experiment.plan
    driver = LoadDriver(engine, run.point.workload.conversations(run.point.config.dp_size))
    driver.check()
    async with limited(plan.time_limit_s):
        await driver.warm_up(plan.warm_up_requests)
        last_warm = max((rank.epoch, rank.last_step) for rank in await engine.health())
        start_s = monotonic()
        changing = asyncio.create_task(run.point.scenario.play(engine, start_s))
        records = await driver.serve(start_s)
        await changing
        await _rest(engine)
        whole = await engine.recording(driver.handles)
    warm_up = tuple(s for s in whole.steps if (s.epoch, s.step_id) <= last_warm)
    steps = tuple(s for s in whole.steps if (s.epoch, s.step_id) > last_warm)
    return records, replace(whole, steps=steps, warm_up=warm_up)


async def _rest(engine: AsyncEngine) -> None:
    """Wait until ranks that answer have finished the same steps, of which some tell later."""
    until = monotonic() + SETTLE_S
    while monotonic() < until:
        ranks = [rank for rank in await engine.health() if rank.state is not RankState.UNREACHABLE]
        if at_rest(ranks):
            return
        await asyncio.sleep(LOOK_EVERY_S)


@asynccontextmanager
async def limited(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise TimeoutError(f"requests and scenario took more than {seconds:g} s") from None


def _note(run: Run, done: int, total: int, elapsed_s: float) -> str:
    left = f", about {elapsed_s / done * (total - done):.0f} s left" if done else ""
    return f"{run}{left}"
