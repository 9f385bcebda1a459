"""Output tokens per second on CPU ranks, beside transformers' batched `generate`.

    python -m examples.benchmarks.throughput_cpu [--model DIR] [--rounds 3]

One load for all: 64 prompts of random tokens, lengths log-uniform 16..512, outputs log-uniform
16..128, greedy, seed 0. transformers gets the prompts sorted by length, in its best of the batch
sizes 8, 16 and 32, and only the tokens that were asked for count. Every contender uses the same
number of torch threads in all. The floor is the time to multiply the weights that the load needs
at the speed of one large matrix product on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.cli.workload import Workload
from dp_runtime.metrics.report import Report
from dp_runtime.metrics.trace import StepTrace
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.registry import read_model_config
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser

TINY_MODEL = Path(__file__).parents[1] / "tiny_moe" / "checkpoint"
Load = tuple[list[list[int]], list[SamplingParams]]


def main() -> None:
    options = _options()
    threads = options.threads
    torch.set_num_threads(threads)
    print(machine.describe("torch", "transformers", "ray"), f"; {threads} torch threads in all")
    config = read_model_config(str(options.model))
    load = Workload().make(config.vocab_size)
    tokens = sum(params.known_max_tokens for params in load[1])
    rows = sum(map(len, load[0])) + tokens
    floor_s = rows * flops_per_row(config) / matmul_flops()
    print(
        f"load: {len(load[0])} requests, {rows - tokens} prompt and {tokens} output tokens; ",
        end="",
    )
    print(f"floor {floor_s:.2f} s of matrix products = {tokens / floor_s:.0f} tok/s")
    peer = max(transformers_rate(options.model, load, batch) for batch in (8, 16, 32))
    print(
        f"transformers, best batch size: {peer:.0f} tok/s, "
        f"{floor_s * peer / tokens:.2f} of the floor"
    )
    for dp_size in (1, 2, 4):
        rates, report, steps = runtime_rates(options, dp_size, load)
        rate = median(rates)
        print(
            f"dp_size {dp_size}: {rate:.0f} tok/s (median of {sorted(map(int, rates))}), "
            f"{rate / peer:.2f}x transformers, {floor_s * rate / tokens:.2f} of the floor; "
            f"waste {report.padding_waste:.3f}, balance {report.row_balance:.3f}, "
            f"board and agreement median {median(step.agree_s for step in steps) * 1e6:.0f} us"
        )
        print(json.dumps({"dp_size": dp_size, "tok_s": rate, "transformers_tok_s": peer}))


def runtime_rates(
    options: argparse.Namespace, dp_size: int, load: Load
) -> tuple[list[float], Report, tuple[StepTrace, ...]]:
    """Tokens per second of every round, after one that is not counted."""
    config = EngineConfig(
        str(options.model), dp_size=dp_size, launcher=options.launcher, device="cpu",
        torch_threads=max(1, options.threads // dp_size), padding=options.padding,
    )  # fmt: skip
    rates = []
    with Engine(config) as engine:
        for _ in range(options.rounds + 1):
            start = perf_counter()
            outputs = engine.generate(*load)
            rates.append(sum(len(out.token_ids) for out in outputs) / (perf_counter() - start))
        return rates[1:], engine.report(), engine.step_trace()


def transformers_rate(model: Path, load: Load, batch_size: int) -> float:
    """Useful tokens per second of static batches, sorted by prompt length, padded on the left."""
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    order = sorted(range(len(load[0])), key=lambda index: len(load[0][index]))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    useful = 0
    start = perf_counter()
    for batch in batches:
        longest = max(len(load[0][index]) for index in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            prompt = load[0][index]
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        new = max(load[1][index].known_max_tokens for index in batch)
        with torch.inference_mode():
            peer.generate(
                ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        useful += sum(load[1][index].known_max_tokens for index in batch)
    rate = useful / (perf_counter() - start)
    print(f"  transformers, batches of {batch_size}: {rate:.0f} tok/s")
    return rate


def flops_per_row(config: ModelConfig) -> float:
    """Multiplications and additions of the weights that one token uses, attention scores apart."""
    hidden, heads = config.hidden_size, config.num_heads + config.num_kv_heads
    attention = 2 * heads * config.head_dim * hidden
    expert = 3 * config.moe_intermediate_size * hidden * config.num_experts_per_tok
    layer = attention + expert + config.num_experts * hidden
    return 2.0 * (config.num_layers * layer + config.vocab_size * hidden)


def matmul_flops() -> float:
    """Floating point operations per second of a 1024 x 1024 x 1024 float32 product."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    times = []
    for _ in range(10):
        start = perf_counter()
        torch.mm(a, b)
        times.append(perf_counter() - start)
    return 2 * 1024**3 / median(times)


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--model", type=Path, default=TINY_MODEL)
    parser.add_argument("--launcher", default="local", choices=("local", "ray"))
    parser.add_argument("--padding", default="max_len", choices=("max_len", "ragged", "auto"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
