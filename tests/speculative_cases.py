"""Checkpoints with draft models, and the product of what they are served with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dp_runtime import Engine, EngineConfig
from tests import hybrid_checkpoints
from tests.checkpoints import add_mtp, eagle3_checkpoint, tiny_checkpoint
from tests.product_cases import DIMENSIONS, MIXTRAL, QWEN, Case, Group, Item


@dataclass(frozen=True)
class Drafted:
    """A checkpoint, and its draft model: an EAGLE-3 head, or with None the layer it has itself."""

    model: Path
    head: Path | None = None

    def fields(self, num_steps: int) -> dict[str, Any]:
        """Of an EngineConfig that speculates, or with 0 steps does not."""
        head = str(self.head) if self.head and num_steps else None
        return {"speculative_num_steps": num_steps, "speculative_draft_model": head}


def _mtp(room: Path, **overrides: Any) -> Drafted:
    return Drafted(add_mtp(tiny_checkpoint(room / "model", QWEN, **overrides)))


def _agreeing(room: Path) -> Drafted:
    return Drafted(agree_in_part(_mtp(room).model))


def _eagle3(architecture: str) -> Callable[[Path], Drafted]:
    def make(room: Path) -> Drafted:
        model = tiny_checkpoint(room / "model", architecture)
        return Drafted(model, eagle3_checkpoint(room / "head", model))

    return make


def _hybrid(architecture: str, agrees: bool, **overrides: Any) -> Callable[[Path], Drafted]:
    def make(room: Path) -> Drafted:
        model = hybrid_checkpoints.hybrid_checkpoint(room / "model", architecture, **overrides)
        hybrid_checkpoints.add_mtp(model)
        return Drafted(hybrid_checkpoints.agree_in_part(model) if agrees else model)

    return make


# All but "agreeing" and "hybrid" draft at random, so that hardly anything is accepted.
DRAFTED: dict[str, Callable[[Path], Drafted]] = {
    "mtp": _mtp,
    "mtp_tied": lambda room: _mtp(room, tie_word_embeddings=True, num_experts=5),
    "agreeing": _agreeing,
    "eagle3": _eagle3(QWEN),
    "eagle3_mixtral": _eagle3(MIXTRAL),
    "hybrid": _hybrid(hybrid_checkpoints.TEXT, agrees=True),
    "hybrid_next": _hybrid(hybrid_checkpoints.NEXT, agrees=False, num_experts=5),
    "hybrid_vision": _hybrid(hybrid_checkpoints.VISION, agrees=False, tie_word_embeddings=True),
}


def agree_in_part(model: Path) -> Path:
    """Make a random target and its random MTP layer of one mind about every second token.

    Both add little to the embedding of the last token, and have equal heads behind equal norms, so
    they mostly follow a table of successors; what they add, and the hidden state, still decides
    often enough, and the text does not repeat itself at once.
    """
    path = model / "model.safetensors"
    tensors: dict[str, Tensor] = load_file(path)
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] *= 0.05
    hidden = len(tensors["mtp.norm.weight"])
    tensors["mtp.norm.weight"] = tensors["model.norm.weight"].clone()
    tensors["mtp.pre_fc_norm_embedding.weight"] = torch.ones(hidden)
    own = 0.1 * tensors["mtp.fc.weight"][:, hidden:]
    tensors["mtp.fc.weight"] = torch.cat([torch.eye(hidden), own], 1)
    save_file(tensors, path)
    return model


@dataclass(frozen=True)
class SpeculativeCase(Case):
    """One point of the product; the checkpoint is one of DRAFTED."""

    checkpoint: str = "mtp"
    num_steps: int = 3
    adaptive: bool = False

    def __str__(self) -> str:
        steps = f"steps{self.num_steps}" + ("-adaptive" if self.adaptive else "")
        return f"{steps}-{super().__str__()}"

    @property
    def items(self) -> tuple[Item, ...]:
        """The first few of every rank: several forwards a step take their time."""
        first, ranks = [], Counter[int]()
        for item in super().items:
            ranks[item.dp_rank] += 1
            if ranks[item.dp_rank] <= 2 + item.dp_rank:
                first.append(item)
        return tuple(first)

    @property
    def max_drafts(self) -> int:
        return self.num_steps

    def config_of(self, drafted: Drafted, **others: Any) -> EngineConfig:
        fields = drafted.fields(self.num_steps) | {"speculative_adaptive": self.adaptive}
        return self.config(str(drafted.model), **fields, **others)


STEPS = tuple(range(1, 8))
SPECULATIVE_DIMENSIONS: dict[str, tuple[Any, ...]] = {
    **DIMENSIONS,
    "checkpoint": tuple(DRAFTED),
    "num_steps": STEPS,
    "adaptive": (False, True),
}

# Every value, and what shares the pages or the rows of a step in every combination.
SPECULATIVE_GROUPS: list[Group] = [
    *((name,) for name in SPECULATIVE_DIMENSIONS),
    ("num_steps", "few_pages"),
    ("num_steps", "overlap"),
    ("dp_size", "padding"),
    ("checkpoint", "overlap"),
    ("load", "few_pages"),
    ("page_size", "few_pages"),
    ("moe_sharding", "poison_padding"),
]

TRAINED = Drafted(Path(__file__).parents[1] / "examples/tiny_moe/checkpoint")  # its MTP layer too


def engine_of(drafted: Drafted, num_steps: int, dp_size: int = 2, **others: Any) -> Engine:
    """Ranks as threads that draft so many tokens, 0 for none."""
    fields: dict[str, Any] = {"launcher": "thread", "max_model_len": 128, "page_size": 16}
    fields |= {"max_num_requests": 8} | drafted.fields(num_steps) | others
    return Engine(EngineConfig(str(drafted.model), dp_size=dp_size, **fields))
