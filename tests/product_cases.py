"""The product of models, configurations and loads, and small sets of cases that cover it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dp_runtime import EngineConfig

QWEN, MIXTRAL = "Qwen3MoeForCausalLM", "MixtralForCausalLM"
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip

CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen": (QWEN, {}),
    "dense": (QWEN, {"num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "sparse_step": (QWEN, {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
    "tied": (QWEN, {"tie_word_embeddings": True, "num_experts": 5}),
    "experts2": (QWEN, {"num_experts": 2, "moe_intermediate_size": 44}),
    "experts7": (QWEN, {"num_experts": 7, "num_experts_per_tok": 3}),
    "bias": (QWEN, {"attention_bias": True, "num_key_value_heads": 4}),
    "raw_topk": (QWEN, {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    "yarn": (QWEN, {"rope_parameters": YARN, "max_position_embeddings": 1024}),
    "head_dim": (QWEN, {"head_dim": 24, "num_key_value_heads": 1}),
    "mixtral": (MIXTRAL, {}),
    "mixtral5": (MIXTRAL, {"num_local_experts": 5, "head_dim": 32, "tie_word_embeddings": True}),
}

DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "checkpoint": tuple(CHECKPOINTS),
    "dp_size": (1, 2, 3, 4),
    "moe_sharding": ("ep", "tp"),
    "padding": ("max_len", "ragged", "auto"),
    "poison_padding": (False, True),
    "overlap": (False, True),
    "load": ("one", "even", "uneven", "idle_ranks", "mixed"),
    "max_num_tokens": (16, 64, 2048),
    "few_pages": (False, True),
    "page_size": (4, 16, 64),
    "extra": ("none", "logprobs", "prompt_logprobs", "embeds", "aborts"),
}

# Requests per rank, by dp_size.
COUNTS: dict[str, dict[int, tuple[int, ...]]] = {
    "one": {n: (0,) * (n - 1) + (1,) for n in range(1, 5)},
    "even": {n: (3,) * n for n in range(1, 5)},
    "uneven": {n: (10, 12, 12, 12)[:n] for n in range(1, 5)},
    "idle_ranks": {1: (12,), 2: (0, 12), 3: (0, 12, 1), 4: (0, 12, 1, 0)},
}
# Two long prompts lead on every rank: both fit the few pages at first, their outputs do not.
LEADERS, OTHERS = (55, 50), (1, 9, 2, 33, 17, 3, 4, 16, 5, 8)
MIXED = (600, 1, 37, 300, 2, 130, 64, 5)


@dataclass(frozen=True)
class Item:
    """One request of a load, pinned to a rank."""

    dp_rank: int
    prompt: tuple[int, ...]
    max_tokens: int

    @property
    def max_len(self) -> int:
        return len(self.prompt) + self.max_tokens


@dataclass(frozen=True)
class Case:
    """One point of the product."""

    checkpoint: str = "qwen"
    dp_size: int = 1
    moe_sharding: str = "ep"
    padding: str = "max_len"
    poison_padding: bool = False
    overlap: bool = False
    load: str = "even"
    max_num_tokens: int = 64
    few_pages: bool = False
    page_size: int = 16
    extra: str = "none"

    def __str__(self) -> str:
        flags = ("poison_padding", "overlap", "few_pages")
        words = [
            f"dp{self.dp_size}", self.checkpoint, self.moe_sharding, self.padding, self.load,
            f"budget{self.max_num_tokens}", f"page{self.page_size}", self.extra,
        ]  # fmt: skip
        return "-".join(words + [flag for flag in flags if getattr(self, flag)])

    @property
    def items(self) -> tuple[Item, ...]:
        return tuple(load_items(self.load, self.dp_size))

    @property
    def preempts(self) -> bool:
        """Its pages are so few that some request has to be preempted."""
        return self.few_pages and self.load in ("even", "uneven", "idle_ranks")

    @property
    def max_drafts(self) -> int:
        """Tokens of a request that a step drafts, at most."""
        return 0

    def config(self, model: str, **others: Any) -> EngineConfig:
        same = ("dp_size", "moe_sharding", "padding", "poison_padding", "overlap", "page_size")
        values: dict[str, Any] = {name: getattr(self, name) for name in same}
        max_len = max(item.max_len for item in self.items)
        requests = min(8, self.max_num_tokens // (1 + self.max_drafts))
        values |= {"max_num_tokens": self.max_num_tokens, "max_num_requests": requests}
        values |= {"launcher": "thread", "max_model_len": max_len, **others}
        if self.few_pages:
            leaders = sum(-(-(length + 1) // self.page_size) for length in LEADERS)
            longest = -(-(max_len + self.max_drafts) // self.page_size)
            values["num_pages"] = 1 + (max(longest, leaders) if self.preempts else longest)
        return EngineConfig(model, **values)


def load_items(load: str, dp_size: int) -> Iterator[Item]:
    """The requests of a load; equal (rank, index, length) is an equal prompt in every case."""
    if load == "mixed":
        for index, length in enumerate(MIXED):
            yield Item(index % dp_size, random_prompt(length, f"mixed {index}"), 6)
        return
    for rank, count in enumerate(COUNTS[load][dp_size]):
        for index in range(count):
            leads = index < len(LEADERS)
            length = LEADERS[index] if leads else OTHERS[index - len(LEADERS)]
            outputs = 24 if leads else 4 + index % 5
            yield Item(rank, random_prompt(length, f"{rank} {index}"), outputs)


def random_prompt(length: int, seed: str) -> tuple[int, ...]:
    draw = random.Random(f"{length} {seed}")
    return tuple(draw.randrange(1, 199) for _ in range(length))


TRIES = 30
Group = tuple[str, ...]  # names of dimensions, all combinations of which must occur


def every(size: int, names: Sequence[str]) -> list[Group]:
    return list(itertools.combinations(names, size))


def combinations(
    dimensions: Mapping[str, Sequence[Any]], groups: Sequence[Group]
) -> dict[tuple[Group, tuple[Any, ...]], None]:
    """What must occur, in a fixed order."""
    return {
        (group, values): None
        for group in groups
        for values in itertools.product(*(dimensions[name] for name in group))
    }


def covered(row: Mapping[str, Any], groups: Sequence[Group]) -> set[tuple[Group, tuple[Any, ...]]]:
    return {(group, tuple(row[name] for name in group)) for group in groups}


def covering_rows(
    dimensions: Mapping[str, Sequence[Any]], groups: Sequence[Group], seed: int = 0
) -> list[dict[str, Any]]:
    """Few rows in which all combinations of every group occur; the same ones for a seed.

    Greedy: of some random rows that contain the first combination still missing, the one that
    contains the most of them.
    """
    draw = random.Random(seed)
    missing = combinations(dimensions, groups)
    rows: list[dict[str, Any]] = []
    while missing:
        group, values = next(iter(missing))
        candidates = [
            {name: draw.choice(choices) for name, choices in dimensions.items()}
            | dict(zip(group, values))
            for _ in range(TRIES)
        ]
        best = max(candidates, key=lambda row: sum(key in missing for key in covered(row, groups)))
        rows.append(best)
        for key in covered(best, groups):
            missing.pop(key, None)
    return rows


# Every pair of values; and every combination of what decides how rows are split and padded.
GROUPS = [
    *every(2, tuple(DIMENSIONS)),
    ("dp_size", "moe_sharding", "padding"),
    ("dp_size", "padding", "load"),
]
# And of how rows are moved, for which requests.
WIDE_GROUPS = [
    *GROUPS,
    ("checkpoint", "dp_size", "moe_sharding"),
    ("checkpoint", "load", "overlap"),
    ("checkpoint", "extra", "few_pages"),
    ("dp_size", "load", "extra"),
    ("dp_size", "overlap", "few_pages"),
]
