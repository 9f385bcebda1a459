"""A soak: 1,730 heavy-tailed requests, 512 in flight, on four ranks that are never alike.

    python -m examples.soak                                         # the tiny model
    python -m examples.soak --shape qwen3-30b-a3b --padding ragged  # dummy weights, for GPUs
    python -m examples.soak --ranks-per-gpu 2                       # four ranks on two GPUs

Half of the requests are pinned, most of them to the first ranks; the last rank gets nothing for
the first 50 steps; pages are scarce, so that requests are preempted; one request is aborted in
mid-flight; every twentieth prompt brings embeddings. The exit status is 1, with the reasons, if a
request is lost or ends with another number of tokens than its own, or if a page is lost. At the
end some greedy requests run again, each alone and on another rank: on CPU ranks, in float32, their
tokens must be the same; on a GPU those that differ are counted.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep

import numpy as np
import torch

from dp_runtime import Engine, EngineConfig, RequestHandle
from dp_runtime.cli.flags import add_flags
from dp_runtime.core.settings import settings_of
from dp_runtime.metrics.progress_bar import ProgressBar
from dp_runtime.metrics.report import Report
from dp_runtime.models.registry import read_model_config
from examples.nvl4.shape import SHAPES, write_shape
from examples.soak_checks import (
    POLL_S,
    QUIET_STEPS,
    Served,
    find_faults,
    longest_quiet,
    run_again,
    wait_for_pages,
)
from examples.soak_load import LoadShape, SoakRequest, make_load, scarce_pages

TINY_MODEL = Path(__file__).parent / "tiny_moe" / "checkpoint"
LOOK_S = 0.1


class ClosedLoop:
    """Keeps a number of requests in flight until all are served.

    The last rank gets none until it has been quiet for QUIET_STEPS steps in which others worked.
    """

    def __init__(self, engine: Engine, requests: Sequence[SoakRequest], shape: LoadShape) -> None:
        self._engine = engine
        self._shape = shape
        self._waiting = deque(requests)
        self._live: dict[int, RequestHandle] = {}
        self._served = Served()
        self._quiet_rank: int | None = shape.dp_size - 1
        self._next_look = 0.0

    def run(self, timeout_s: float) -> Served:
        """Serve everything; TimeoutError if that takes longer."""
        deadline = monotonic() + timeout_s
        with ProgressBar("soak", self._shape.num_requests, "request") as progress:
            while self._waiting or self._live:
                self._submit()
                sleep(POLL_S)
                self._abort()
                self._collect()
                self._look()
                progress.update(len(self._served.outputs))
                if monotonic() > deadline:
                    raise TimeoutError(f"{len(self._live)} requests unfinished after {timeout_s} s")
        return self._served

    def _submit(self) -> None:
        while self._waiting and len(self._live) < self._shape.in_flight:
            request = self._waiting.popleft()
            rank = self._served.sent_to[request.index] = self._rank(request)
            self._live[request.index] = self._engine.submit(request.prompt, request.params, rank)
        self._served.max_in_flight = max(self._served.max_in_flight, len(self._live))

    def _rank(self, request: SoakRequest) -> int | None:
        """Where the request wants to go, unless that might be the quiet rank."""
        if self._quiet_rank is None or request.dp_rank not in (None, self._quiet_rank):
            return request.dp_rank
        return request.index % self._quiet_rank

    def _abort(self) -> None:
        handle = self._live.get(self._shape.doomed)
        if handle is not None and handle.token_ids:
            handle.abort()

    def _collect(self) -> None:
        for index in [index for index, handle in self._live.items() if handle.done]:
            handle = self._live.pop(index)
            self._served.outputs[index] = handle.result()
            self._served.streamed[index] = tuple(t for delta in handle for t in delta.token_ids)

    def _look(self) -> None:
        """Let the quiet rank have requests once it has been quiet for long enough."""
        if self._quiet_rank is None or monotonic() < self._next_look:
            return
        self._next_look = monotonic() + LOOK_S
        if self._engine.report().idle_steps[self._quiet_rank] >= QUIET_STEPS:
            self._served.quiet_steps = longest_quiet(self._engine.step_trace(), self._quiet_rank)
            self._quiet_rank = None


@dataclass(frozen=True)
class Outcome:
    """What a soak found."""

    report: Report
    faults: list[str]
    repeated: int
    differences: list[str]  # between a request and its repetition

    def __str__(self) -> str:
        lines = [str(self.report)]
        lines += [f"{self.repeated} repeated alone, {len(self.differences)} with other tokens"]
        lines += [f"  {difference}" for difference in self.differences]
        lines += [f"FAULT: {fault}" for fault in self.faults] or ["no faults"]
        return "\n".join(lines)


def soak(
    config: EngineConfig, shape: LoadShape, plenty: float, repeat: int, timeout_s: float
) -> Outcome:
    """Run a soak; `plenty` is the part of the load's pages that a rank has."""
    model = read_model_config(config.model)
    requests = make_load(shape, model.vocab_size, model.hidden_size)
    pages = scarce_pages(requests, shape, config.page_size, plenty)
    print(describe(requests, shape, pages), file=sys.stderr)
    config = replace(config, num_pages=pages, max_model_len=shape.max_model_len)
    with Engine(config, show_progress=True) as engine:
        served = ClosedLoop(engine, requests, shape).run(timeout_s)
        ranks, report = wait_for_pages(engine), engine.report()
        faults = find_faults(requests, shape, served, report, ranks)
        differences = [] if faults else run_again(engine, requests, served, shape, repeat)
    if on_cpu(config):
        faults += [f"{difference} differs when repeated alone" for difference in differences]
    return Outcome(report, faults, 0 if faults else repeat, differences)


def on_cpu(config: EngineConfig) -> bool:
    """Ranks run in float32 on a CPU, where equal requests get equal tokens."""
    return config.device == "cpu" or not torch.cuda.device_count()


def describe(requests: Sequence[SoakRequest], shape: LoadShape, pages: int) -> str:
    """The load in two lines."""
    lengths = [
        (f"{np.median(values):.0f}", f"{np.percentile(values, 99):.0f}", max(values), sum(values))
        for values in (
            [len(request.prompt.token_ids) for request in requests],
            [request.params.known_max_tokens for request in requests],
        )
    ]
    prompts, outputs = ("median {}, p99 {}, longest {}, in all {}".format(*one) for one in lengths)
    pinned = [sum(r.dp_rank == rank for r in requests) for rank in range(shape.dp_size)]
    return (
        f"{len(requests)} requests, {shape.in_flight} in flight; pinned to ranks: {pinned}; "
        f"{pages} pages a rank\nprompt tokens: {prompts}; output tokens: {outputs}"
    )


def main() -> int:
    options = _options()
    shape = LoadShape(**{name: getattr(options, name) for name in SHAPE_FLAGS})
    with TemporaryDirectory() as directory:
        model, load_format = options.model, "safetensors"
        if options.shape is not None:
            mtp_layers = int(options.speculative_num_steps > 0)
            size = {"mtp_layers": mtp_layers, "num_layers": options.num_layers}
            model = write_shape(Path(directory), options.shape, **size)
            load_format = "dummy"
        engine = {name: getattr(options, name) for name in ENGINE_FLAGS}
        config = EngineConfig(str(model), load_format=load_format, **engine)
        outcome = soak(config, shape, options.plenty, options.verify, options.timeout_s)
    print(outcome)
    return 1 if outcome.faults else 0


SHAPE_FLAGS = {
    "num_requests": "--requests", "in_flight": "--in-flight", "dp_size": "--dp-size",
    "prompt_len": "--prompt-len", "max_prompt_len": "--max-prompt-len",
    "output_len": "--output-len", "max_output_len": "--max-output-len", "seed": "--seed",
}  # fmt: skip
ENGINE_FLAGS = (
    "dp_size", "ranks_per_gpu", "device", "launcher", "ray_address", "attention_backend",
    "padding", "moe_sharding", "overlap", "poison_padding", "page_size", "max_num_requests",
    "max_num_tokens", "start_timeout_s", "cuda_graphs", "speculative_num_steps",
    "speculative_draft_model", "speculative_adaptive", "speculative_forced_tokens",
)  # fmt: skip
OTHER_DEFAULTS = {"launcher": "local", "max_num_requests": 256, "start_timeout_s": 900.0}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--model", type=Path, default=TINY_MODEL, help="Hugging Face directory")
    where.add_argument("--shape", choices=sorted(SHAPES), help="dummy weights of this shape")
    parser.add_argument("--num-layers", type=int, help="of the shape, if not all")
    for item in fields(LoadShape):
        if item.name in SHAPE_FLAGS:
            parser.add_argument(
                SHAPE_FLAGS[item.name], dest=item.name, type=int, default=item.default,
                help="median length" if item.name in ("prompt_len", "output_len") else None,
            )  # fmt: skip
    names = set(ENGINE_FLAGS) - set(SHAPE_FLAGS)
    add_flags(parser, EngineConfig, names, OTHER_DEFAULTS)
    own = {item.name: item.default for item in settings_of(EngineConfig) if item.name in names}
    parser.set_defaults(**own | OTHER_DEFAULTS)
    parser.add_argument("--plenty", type=float, default=0.6, help="part of the pages it has")
    parser.add_argument("--verify", type=int, default=16, help="requests to repeat alone")
    parser.add_argument("--timeout-s", type=float, default=3600.0)
    options = parser.parse_args()
    if options.num_layers is not None and options.shape is None:
        parser.error("--num-layers: of a --shape; a model has its own")
    if options.dp_size < 2:
        parser.error("--dp-size: at least 2, for one rank is to be quiet while others work")
    return options


if __name__ == "__main__":
    sys.exit(main())
