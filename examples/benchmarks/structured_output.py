"""What structured output costs: a token of an engine, and the parts of a mask alone.

    python -m examples.benchmarks.structured_output [--requests 1 16] [--tokens 96]

Engine: one rank, the tiny trained model, so many requests at once, greedy, each of as many tokens;
the time of a step, compiling included, with and without a form that their texts must have: CPU
time of a rank that is a thread, or with `--device cuda` time as it passes. The floor is the same
load without one. Mask: one matcher after each token of a text that it allows, drawn at random,
over the tiny model's vocabulary and over one of 152,000 tokens, made of words of Python's library.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dp_runtime import Engine, EngineConfig, SamplingParams, StructuredOutputs
from dp_runtime.structured.grammar_compiler import GrammarCompiler
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import add_flags, new_parser

TINY_MODEL = Path(__file__).parents[1] / "tiny_moe" / "checkpoint"
VOCAB = 151_936
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMS = {
    "choice": StructuredOutputs(choice=[f"option {n} of all" for n in range(100)]),
    "regex": StructuredOutputs(regex=r"[A-Za-z ,.]{400,}"),
    "JSON schema": StructuredOutputs(json={"type": "array", "items": PERSON, "minItems": 100}),
    "any JSON": StructuredOutputs(json_object=True),
}
ENDLESS = ("regex", "JSON schema")  # whose texts are longer than any request here


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    print(machine.describe("torch", "llguidance"))
    for count in options.requests:
        measure_engine(count, options.tokens, options.device)
    text = (TINY_MODEL / "tokenizer.json").read_text()
    measure_masks("tiny model's", text, 3072)
    measure_masks("made of words", large_vocabulary(), VOCAB)


def measure_engine(count: int, tokens: int, device: str, rounds: int = 9) -> None:
    """Rounds in turns, so that what else the machine does meets all of them."""
    on_cpu = device == "cpu"
    launcher, clock = ("thread", process_time) if on_cpu else ("local", perf_counter)
    config = EngineConfig(str(TINY_MODEL), launcher=launcher, device=device, torch_threads=1)
    plain = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    loads = {"no form": plain}
    loads |= {name: replace(plain, structured_outputs=FORMS[name]) for name in ENDLESS}
    seconds: dict[str, list[float]] = {name: [] for name in loads}
    with Engine(config) as engine:
        for _ in range(rounds + 1):
            for name, params in loads.items():
                started = clock()
                outputs = engine.generate(["Once upon a time"] * count, params)
                seconds[name].append((clock() - started) / tokens)
                assert all(len(output.token_ids) == tokens for output in outputs)
    for name, times in seconds.items():
        figure = "cpu_ms_per_step" if on_cpu else "ms_per_step"
        row = {"requests": count, "form": name, figure: round(median(times[1:]) * 1e3, 3)}
        print(json.dumps(row))


def measure_masks(name: str, tokenizer_json: str, vocab_size: int) -> None:
    compiler = GrammarCompiler(tokenizer_json, vocab_size, (0,))
    read_s = timed(lambda: compiler.vocabulary)
    print(json.dumps({"vocabulary": name, "tokens": vocab_size, "read_ms": round(read_s * 1e3)}))
    for kind, wanted in FORMS.items():
        compile_s = median(timed(lambda: compiler.matcher(wanted)) for _ in range(5))  # noqa: B023
        masks, advances = mask_times(compiler, wanted)
        row = {
            "vocabulary": name, "form": kind, "compile_ms": round(compile_s * 1e3, 2),
            "mask_us_median": round(median(masks) * 1e6), "mask_us_mean": round(mean(masks) * 1e6),
            "mask_us_max": round(max(masks) * 1e6), "advance_us": round(mean(advances) * 1e6, 1),
        }  # fmt: skip
        print(json.dumps(row))


def mask_times(
    compiler: GrammarCompiler, wanted: StructuredOutputs, length: int = 200
) -> tuple[list[float], list[float]]:
    """Seconds of each mask and of each token taken, over texts drawn at random."""
    draws, masks, advances = np.random.default_rng(0), list[float](), list[float]()
    words = np.zeros(-(-compiler.vocabulary.vocab_size // 32), np.int32)
    matcher = compiler.matcher(wanted)
    while len(masks) < length:
        into = words.ctypes.data, words.nbytes
        masks.append(timed(lambda: matcher.unsafe_compute_mask_ptr(*into)))  # noqa: B023
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        token = int(draws.choice(allowed))
        advances.append(timed(lambda: matcher.consume_token(token)))  # noqa: B023
        if matcher.is_stopped():
            matcher = compiler.matcher(wanted)
    return masks, advances


def timed(work: Callable[[], Any]) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started


def large_vocabulary() -> str:
    """A byte-level tokenizer.json whose tokens are words, numbers and signs of programs."""
    counts = Counter[str]()
    for path in sorted(Path(json.__file__).parents[1].rglob("*.py")):
        text = path.read_text(errors="ignore")
        counts.update(
            re.findall(r" ?[A-Za-z]{1,20}| ?\d{1,3}| ?[^\sA-Za-z0-9]{1,8}|\s{1,16}", text)
        )
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {"<|endoftext|>": 0}
    for letter in sorted(pieces.alphabet()):
        vocabulary[letter] = len(vocabulary)
    for word, _ in counts.most_common():
        ((spelling, _),) = pieces.pre_tokenize_str(word)
        if len(vocabulary) < VOCAB:
            vocabulary.setdefault(spelling, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    assert len(vocabulary) == VOCAB, f"only {len(vocabulary):,} words"
    return str(tokenizer.to_str())


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(parser, device="cpu")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=96)
    return parser.parse_args()


if __name__ == "__main__":
    main()
