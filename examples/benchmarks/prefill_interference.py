"""One rank prefills long prompts in chunks: what the requests that others decode notice of it.

    python -m examples.benchmarks.prefill_interference --model DIR --device cuda --dp-size 2
    python -m examples.benchmarks.prefill_interference --device cpu --dp-size 2 --plot FILE.png

Rank 0 gets prompts one after another, every other rank decodes --decoders requests. `together` is
how the runtime does it: a chunk and the others' decodes are rows of one step. `idling` is what
engines do that prefill in steps of their own: no rank decodes in a step in which one prefills.
An inter-token time is the time between two consecutive emissions of one request, with a step of
rank 0's prefill between them; tokens that one verification emits arrive together.

Both are compared with rank 0's own step time, `busy`: the time between its steps in a run of the
same prompts in which the other ranks have no rows, so that it waits for nobody's attention or
dense layers. (They do run their experts on its rows: that is part of the step in every run.) This
holds on a CPU and on a GPU, where the host's phases are launches and a collective's kernel does not
tell a transfer from a wait. On a CPU the host's time without waits, of rank 0 in the same steps, is
reported beside it. Later chunks of a prompt attend to more and take longer, so p99 is compared with
p99. Exits with 1 if together any request got no token in a step in which rank 0 prefilled.

Without --model a small shape is used; weights are dummies. The model is loaded once, for the
largest chunk; smaller ones bound a step's rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np

from dp_runtime.parallel.prefill_budget import FLOOR_SHARE
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import add_flags, config_from, new_parser
from examples.benchmarks.harness.stepping import SteppedRank, run_ranks
from examples.benchmarks.interference import PREFILLING, Experiment, Gap, View
from examples.nvl4.shape import QWEN3_30B_A3B

SMALL = QWEN3_30B_A3B | {
    "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "bos_token_id": 0, "eos_token_id": 1,
    "num_nextn_predict_layers": 1,
}  # fmt: skip
WAYS = ("together", "idling", "alone")
IDS_A_RUN = 1000
Views = list[View]  # [rank]


def main() -> None:
    args = parse_args()
    print(machine.describe("torch"), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        if args.model is None:
            Path(directory, "config.json").write_text(json.dumps(SMALL))
        runs = measure_all(args, args.model or directory)
    if args.device == "cuda":
        from examples.benchmarks.harness.device_timing import describe_gpu

        print(describe_gpu())
    for chunk, views in runs.items():
        for way in ("together", "idling"):
            print(json.dumps(figures(args, chunk, way, views)), flush=True)
    if args.plot is not None:
        plot(args.plot, runs)
    silent = [chunk for chunk, views in runs.items() if min(shares(views["together"])) < 1]
    if silent:
        sys.exit(f"chunks of {silent}: a rank ran steps with prefill without a token for each")


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--model")
    add_flags(
        parser, "device", "moe_sharding", "moe_backend", "collective", "cuda_graphs",
        "speculative_num_steps", "max_step_ms", dp_size=2, overlap=None,
    )  # fmt: skip
    parser.add_argument("--chunks", type=int, nargs="+", default=[512, 1024, 4096])
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--decoders", type=int, default=32, help="requests of every other rank")
    parser.add_argument("--context", type=int, default=1024, help="their prompts")
    parser.add_argument("--plot", type=Path, help="an image, by matplotlib")
    args = parser.parse_args()
    if args.dp_size < 2:
        parser.error("--dp-size: one rank prefills and at least one decodes")
    if args.prompts < 2:
        parser.error("--prompts: two at least, for a time between steps")
    if args.decoders * (args.speculative_num_steps + 1) > min(args.chunks):
        parser.error("--chunks: a step holds one token, and its drafts, of every decoder at least")
    return args


def measure_all(args: argparse.Namespace, model: str) -> dict[int, dict[str, Views]]:
    """What every rank saw of every chunk size and way."""
    steps = args.speculative_num_steps
    experiment = Experiment(args.prompt, args.prompts, args.decoders, args.context, steps + 1)
    if args.max_step_ms is not None:
        experiment = replace(experiment, least_chunk=-(-max(args.chunks) // FLOOR_SHARE))
    longest = max(experiment.output_len(chunk) for chunk in args.chunks)
    config = config_from(
        args, model=model, load_format="dummy", launcher="local",
        max_num_requests=args.decoders, max_num_tokens=max(args.chunks),
        max_model_len=max(args.prompt + 1, args.context + longest),
    )  # fmt: skip
    print(config, flush=True)
    ranks = run_ranks(config, measure, experiment, args.chunks)
    return {
        chunk: {way: [views[chunk, way] for views in ranks] for way in WAYS}
        for chunk in args.chunks
    }


def measure(
    rank: SteppedRank, experiment: Experiment, chunks: Sequence[int]
) -> dict[tuple[int, str], View]:
    """Each way with each size, after a short run of each that is not counted."""
    views, first_id = {}, 0
    for chunk, way in product(chunks, WAYS):
        experiment.short().observe(rank, way, chunk, first_id)
        views[chunk, way] = experiment.observe(rank, way, chunk, first_id + IDS_A_RUN)
        first_id += 2 * IDS_A_RUN
    return views


def figures(
    args: argparse.Namespace, chunk: int, way: str, views: dict[str, Views]
) -> dict[str, object]:
    """The JSON line of a way."""
    seen = views[way]
    own, busy = seen[PREFILLING], quantiles_ms(views["alone"][PREFILLING].prefill_step_s())
    gaps = quantiles_ms([gap.seconds for gap in decoders_gaps(seen)])
    host = quantiles_ms([step.host_busy_s for step in own.steps if step.prefill_rows])
    on_cpu = {"host_busy_ms": host, "p99_over_host_busy": round(gaps["p99"] / host["p99"], 3)}
    return {
        "chunk": chunk,
        "way": way,
        "device": args.device,
        "dp_size": args.dp_size,
        "prompt": args.prompt,
        "decoders_a_rank": args.decoders,
        "speculative_num_steps": args.speculative_num_steps,
        "max_step_ms": args.max_step_ms,
        "prefill_steps": sum(step.prefill_rows > 0 for step in own.steps),
        "emitting_share": shares(seen),
        "tokens_an_emission": round(fmean(tokens_of_emissions(seen)), 3),
        "inter_token_ms": gaps,
        "busy_ms": busy,
        "p99_over_busy": round(gaps["p99"] / busy["p99"], 3),
        "p99_over_busy_p50": round(gaps["p99"] / busy["p50"], 3),
        "prompt_ms_p50": quantiles_ms(own.first_token_s)["p50"],
    } | (on_cpu if args.device == "cpu" else {})


def shares(views: Views) -> list[float]:
    """Of steps in which rank 0 prefills: where a rank emitted for all requests; [other rank]."""
    return [round(view.emitting_share(), 4) for view in views[PREFILLING + 1 :]]


def decoders_gaps(views: Views) -> list[Gap]:
    return [gap for view in views[PREFILLING + 1 :] for gap in view.gaps_with_prefill()]


def tokens_of_emissions(views: Views) -> list[int]:
    """Of every decoder in every step in which it got any."""
    return [
        count
        for view in views[PREFILLING + 1 :]
        for step in view.steps
        for count in step.tokens.values()
    ]


def quantiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    return {
        name: round(float(np.quantile(seconds, q)) * 1e3, 3)
        for name, q in (("p50", 0.5), ("p99", 0.99))
    }


def plot(file: Path, runs: dict[int, dict[str, Views]]) -> None:
    """Inter-token times of the first decoding rank over a run, both ways, a panel per chunk."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(runs), figsize=(4.5 * len(runs), 5), sharey=True, squeeze=False
    )
    for panel, (chunk, views) in zip(panels[0], runs.items()):
        for way, marker in (("together", "."), ("idling", "x")):
            view = views[way][PREFILLING + 1]
            gaps = view.gaps_with_prefill()
            times = quantiles_ms([gap.seconds for gap in gaps])
            label = f"{way}: p50 {times['p50']:.0f}, p99 {times['p99']:.0f} ms"
            start = min(step.at_s for step in view.steps if step.prefill_rows)
            at, ms = zip(*[(gap.at_s - start, gap.seconds * 1e3) for gap in gaps])
            panel.plot(at, ms, marker, label=label)
        busy = quantiles_ms(views["alone"][PREFILLING].prefill_step_s())["p99"]
        panel.axhline(busy, color="grey", linestyle="--", label=f"rank 0's step: p99 {busy:.0f} ms")
        panel.set(title=f"chunks of {chunk}", xlabel="seconds", yscale="log")
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize="small")
    panels[0][0].set_ylabel("inter-token time during prefill, ms")
    figure.tight_layout()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
