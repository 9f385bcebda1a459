"""One rank's model and its sequences, fed token by token or in chunks."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dp_runtime.attention.torch_ref import TorchRefBackend
from dp_runtime.core.attention_metadata import PageGeometry, Place
from dp_runtime.core.batch import StateSlots
from dp_runtime.core.cache_spec import LayerCaches
from dp_runtime.core.recurrent_metadata import RecurrentMetadata
from dp_runtime.layers.moe import RankSharding
from dp_runtime.models.causal_lm import PassInputs, PassPlan, RowEmbeds
from dp_runtime.models.registry import build_model, read_model_config
from dp_runtime.parallel.padding import PaddingMode, PaddingPlan
from dp_runtime.parallel.row_exchange import PaddedExchange
from dp_runtime.weights.loader import open_weights
from tests.dp_runtime.paged import CPU, metadata_of, paged_batch, random_page_table, spec_of
from tests.dp_runtime.thread_ranks import ThreadCollective, run_ranks

PAGE_SIZE, CAPACITY = 8, 208
SPARE_SLOTS = 3


class Rank:
    """One rank's model and its sequences, each with pages of its own."""

    def __init__(
        self, path: Path, collective: ThreadCollective, moe_sharding: str = "ep",
        num_sequences: int = 1, poison: bool = True, load_format: str = "safetensors",
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        config = read_model_config(str(path))
        self.collective, self.poison = collective, poison
        rng = np.random.default_rng(collective.dp_rank)
        self.table, self.num_pages = random_page_table([CAPACITY] * num_sequences, PAGE_SIZE, rng)
        self.slots = 1 + rng.permutation(num_sequences + SPARE_SLOTS)[:num_sequences]
        self.num_slots, pages = (
            1 + num_sequences + SPARE_SLOTS,
            PageGeometry(self.num_pages, PAGE_SIZE),
        )
        specs = config.cache_specs(PAGE_SIZE, dtype, dtype)
        self.caches = LayerCaches.allocate(specs, pages, self.num_slots, CPU)
        pools = [pool for pool in self.caches.pools if pool is not None]
        for tensor in (*pools, *(x for state in self.caches.states for x in state)):
            tensor.fill_(torch.nan)
        self.model = build_model(
            config,
            open_weights(str(path), load_format, 0, dtype, CPU),
            RankSharding(moe_sharding, collective.dp_rank, collective.dp_size),
            TorchRefBackend(spec_of(pools[0], config.num_heads), self.caches.pools),
            states=self.caches.states,
        )
        self.lengths = [0] * num_sequences

    def end(self, sequence: int) -> None:
        """Let another sequence begin in the pages and the slot of this one, as they are."""
        self.lengths[sequence] = 0

    def step(
        self, new: list[list[int]], real_rows: tuple[int, ...] | None = None,
        mode: PaddingMode = PaddingMode.MAX_LEN, embeds: tuple[list[int], Tensor] | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Feed new tokens of every sequence (perhaps none) and return the logits of their rows."""
        live = [i for i, tokens in enumerate(new) if tokens]
        is_fresh = np.array([self.lengths[i] == 0 for i in live], bool)
        for i in live:
            self.lengths[i] += len(new[i])
        lengths = [(len(new[i]), self.lengths[i]) for i in live]
        tokens = [token for i in live for token in new[i]]
        batch = replace(
            paged_batch(lengths, self.table[live], PAGE_SIZE, tokens),
            states=StateSlots(self.slots[live], is_fresh),
        )
        plan = PaddingPlan.for_mode(mode, real_rows or (len(tokens),))
        hidden = self.model.forward(
            PassInputs(
                torch.tensor(tokens, dtype=torch.int64),
                torch.from_numpy(batch.positions.copy()),
                embeds=embeds and RowEmbeds(torch.tensor(embeds[0]), embeds[1]),
            ),
            PassPlan(
                self.model.backend.plan(metadata_of(batch, self.num_pages, PAGE_SIZE)),
                RecurrentMetadata.build(batch, self.num_slots, Place(0, 0, "target"), CPU),
            ),
            PaddedExchange(plan, self.collective.row_collective, self.poison),
        ).last
        logits = self.model.logits(hidden)
        split = logits.split([len(tokens) for tokens in new])
        return list(split)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def check_bfloat16(path: Path, oracle: Any, tokens: list[int]) -> None:
    """Check that a model is as near to float32 as transformers' own bfloat16 is."""
    prompt = torch.tensor([tokens])
    with torch.inference_mode():
        wide = oracle(prompt).logits[0]
        narrow = copy.deepcopy(oracle).to(torch.bfloat16)(prompt).logits[0].float()

    def run(collective: ThreadCollective) -> Tensor:
        return Rank(path, collective, dtype=torch.bfloat16).step([tokens])[0]

    found = run_ranks(1, run)[0]
    # In the median: routing near-ties move single rows.
    assert (found - wide).abs().median() < 1.5 * (narrow - wide).abs().median()


def check_dummy_weights(path: Path, tokens: list[int]) -> None:
    """Check that dummy weights are the same model on any number of ranks."""

    def run(collective: ThreadCollective) -> Tensor:
        sharding = "tp" if collective.dp_size == 2 else "ep"
        worker = Rank(path, collective, sharding, load_format="dummy")
        return worker.step([tokens], (len(tokens),) * collective.dp_size)[0]

    alone = run_ranks(1, run)[0]
    assert alone.std() > 0
    for dp_size in (2, 3):
        for logits in run_ranks(dp_size, run):
            torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)
