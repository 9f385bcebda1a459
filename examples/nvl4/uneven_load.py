"""Prints prompts for `launch.py generate` that are pinned to ranks, a number of its own for each.

python examples/nvl4/uneven_load.py --model DIR --requests 40 64 48 8 > load.jsonl

Lengths are log-uniform; every request gets exactly its max_tokens. With more ranks than numbers
these repeat.
"""

from __future__ import annotations

import argparse
import json
from itertools import cycle, islice

from dp_runtime.cli.workload import Workload
from dp_runtime.models.registry import read_model_config


def main() -> None:
    options = _options()
    counts = list(islice(cycle(options.requests), options.dp_size))
    ranks = [rank for rank, count in enumerate(counts) for _ in range(count)]
    lengths = tuple(options.input_len), tuple(options.output_len)
    workload = Workload(len(ranks), *lengths, options.seed)
    vocab_size = read_model_config(options.model).vocab_size
    for rank, prompt, params in zip(ranks, *workload.make(vocab_size), strict=True):
        line = {"prompt_token_ids": prompt, "max_tokens": params.max_tokens, "dp_rank": rank}
        print(json.dumps(line | {"temperature": 0.0, "ignore_eos": True}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="directory with a config.json")
    parser.add_argument("--dp-size", type=int, default=4)
    parser.add_argument("--requests", type=int, nargs="+", default=[40, 64, 48, 8])
    parser.add_argument("--input-len", type=int, nargs=2, default=[128, 1024])
    parser.add_argument("--output-len", type=int, nargs=2, default=[32, 256])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
