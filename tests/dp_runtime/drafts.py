"""One rank's target and draft model over page pools of their own with the same page ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from collectives.in_process import InProcessGroup
from dp_runtime.attention.torch_ref import TorchRefBackend
from dp_runtime.layers.moe import RankSharding
from dp_runtime.models.causal_lm import Hidden, PassInputs, PassPlan
from dp_runtime.models.registry import build_model, read_model_config
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.padding import PaddingMode, PaddingPlan
from dp_runtime.parallel.row_exchange import PaddedExchange
from dp_runtime.speculative.draft import build_draft, read_draft_config
from dp_runtime.weights.loader import open_weights
from tests.dp_runtime.paged import CPU, metadata_of, paged_batch, random_page_table, spec_of

PAGE_SIZE, CAPACITY = 8, 96


def no_hidden() -> Tensor:
    return torch.zeros(0, 0)


def on_ranks(dp_size: int, run: Callable[[RowCollective], Any]) -> list[Any]:
    """What `run` returns on every rank; an error of one frees the others."""
    group = InProcessGroup(dp_size, 30.0)

    def guarded(dp_rank: int) -> Any:
        collective = group.collective(dp_rank)
        try:
            with torch.inference_mode():
                return run(collective)
        except BaseException as error:
            collective.abort(repr(error))
            raise

    with ThreadPoolExecutor(dp_size) as pool:
        return list(pool.map(guarded, range(dp_size)))


class DraftRank:
    """Runs rows of several sequences, whose lengths the caller knows."""

    def __init__(
        self, path: Path, draft: Path | None, collective: RowCollective, num_sequences: int = 1,
        load_format: str = "safetensors", moe_sharding: str = "ep",
    ) -> None:  # fmt: skip
        self.collective = collective
        target = read_model_config(str(path))
        self.config = read_draft_config(str(path), target, str(draft) if draft else None)
        rng = np.random.default_rng(collective.dp_rank)
        self.table, self.num_pages = random_page_table([CAPACITY] * num_sequences, PAGE_SIZE, rng)
        sharding = RankSharding(moe_sharding, collective.dp_rank, collective.dp_size)

        def backends(layers: int, heads: int, kv_heads: int, head_dim: int) -> Any:
            shape = (self.num_pages, 2, kv_heads, PAGE_SIZE, head_dim)
            pools = [torch.full(shape, torch.nan) for _ in range(layers)]
            return TorchRefBackend(spec_of(pools[0], heads), pools)

        def weights(directory: str) -> Any:
            return open_weights(directory, load_format, 0, torch.float32, CPU)

        self.target = build_model(
            target, weights(str(path)), sharding,
            backends(target.num_layers, target.num_heads, target.num_kv_heads, target.head_dim),
        ).with_aux_hidden_states(self.config.aux_hidden_state_layers)  # fmt: skip
        own = self.config
        self.draft = build_draft(
            own, self.target, weights(own.directory), sharding,
            backends(own.num_layers, own.num_heads, own.num_kv_heads, own.head_dim), "torch",
        )  # fmt: skip

    def run_target(self, tokens: Sequence[list[int]], before: Sequence[int]) -> Hidden:
        """New tokens of every sequence (perhaps none), of which `before` have been fed."""
        return self._run(self.target, tokens, before, no_hidden())

    def run_draft(
        self, following: Sequence[list[int]], before: Sequence[int], hidden: Tensor
    ) -> Hidden:
        """The same of draft rows: `following` are the tokens after each row's position."""
        return self._run(self.draft, following, before, hidden)

    def _run(
        self, model: Any, tokens: Sequence[list[int]], before: Sequence[int], hidden: Tensor
    ) -> Hidden:
        live = [i for i, new in enumerate(tokens) if new]
        lengths = [(len(tokens[i]), before[i] + len(tokens[i])) for i in live]
        flat = [token for i in live for token in tokens[i]]
        batch = paged_batch(lengths, self.table[live], PAGE_SIZE, flat)
        counts = [row[0] for row in self.collective.all_gather_ints((len(flat),))]
        plan = PaddingPlan.for_mode(PaddingMode.MAX_LEN, tuple(counts))
        inputs = PassInputs(
            torch.tensor(flat, dtype=torch.int64),
            torch.from_numpy(batch.positions.copy()),
            hidden,
        )
        exchange = PaddedExchange(plan, self.collective, poison=True)
        metadata = metadata_of(batch, self.num_pages, PAGE_SIZE)
        return model.forward(inputs, PassPlan(model.backend.plan(metadata)), exchange)

    def follow(
        self, new: Sequence[list[int]], before: Sequence[int], following: Sequence[list[int]]
    ) -> Hidden:
        """Feed new tokens to the target, and their rows to the draft: what the draft returns."""
        features = self.draft.project(self.run_target(new, before).aux_hidden_states)
        return self.run_draft(following, before, features)


def on_one_rank(target: Path, head: Path, use: Callable[[DraftRank], Any], **fields: Any) -> Any:
    """What `use` returns of a target and its head on the only rank."""
    return on_ranks(1, lambda collective: use(DraftRank(target, head, collective, **fields)))[0]


def change_tensors(head: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change what model.safetensors has."""
    tensors = load_file(head / "model.safetensors")
    change(tensors)
    save_file(tensors, head / "model.safetensors")
