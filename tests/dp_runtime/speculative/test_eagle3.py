"""EAGLE-3 heads against a reference written from their description."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from dp_runtime.layers.moe import RankSharding
from dp_runtime.models.registry import build_model, read_model_config
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.speculative.draft import build_draft, read_draft_config
from dp_runtime.speculative.eagle3 import Eagle3
from dp_runtime.weights.dummy import MetaWeights
from dp_runtime.weights.loader import open_weights
from tests.checkpoints import eagle3_checkpoint, oracle, tiny_checkpoint
from tests.dp_runtime.drafts import DraftRank, change_tensors, on_one_rank, on_ranks
from tests.dp_runtime.paged import CPU, backend_over

HIDDEN, VOCAB, DRAFT_VOCAB = 64, 199, 61
STEPS = 3


def norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x: Tensor, theta: float = 500000.0) -> Tensor:
    """Rotary embedding of [heads, rows, head_dim] by complex numbers, positions from 0."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles)
    return torch.cat((turned.real, turned.imag), -1)


@dataclass(frozen=True)
class Reference:
    """A head in float32, over whole sequences and without a cache."""

    tensors: dict[str, Tensor]
    embedding: Tensor
    layer: str = "midlayer"
    heads: int = 2

    def project(self, features: Tensor) -> Tensor:
        return features @ self.tensors["fc.weight"].T

    def forward(self, tokens: list[int], hidden: Tensor) -> Tensor:
        """Before the norm; row t takes tokens[t], which follows its position, and hidden[t]."""
        t = {
            name.removeprefix(f"{self.layer}.").removesuffix(".weight"): tensor
            for name, tensor in self.tensors.items()
        }
        embeds = norm(self.embedding[tokens], t["input_layernorm"])
        x = torch.cat((embeds, norm(hidden, t["hidden_norm"])), -1)
        q, k, v = (
            (x @ t[f"self_attn.{name}_proj"].T).unflatten(-1, (-1, 24)).transpose(0, 1)
            for name in "qkv"
        )
        q, k = turn(q), turn(k).expand(self.heads, -1, -1)
        scores = (q @ k.transpose(1, 2)) / 24**0.5
        future = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
        attended = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = hidden + attended.transpose(0, 1).flatten(1) @ t["self_attn.o_proj"].T
        normed = norm(x, t["post_attention_layernorm"])
        inner = F.silu(normed @ t["mlp.gate_proj"].T) * (normed @ t["mlp.up_proj"].T)
        return x + inner @ t["mlp.down_proj"].T

    def logits(self, hidden: Tensor) -> Tensor:
        return norm(hidden, self.tensors["norm.weight"]) @ self.tensors["lm_head.weight"].T

    def chain(self, tokens: list[int], hidden: Tensor, rows: int) -> list[Tensor]:
        """What STEPS chained drafts behind the first `rows` rows give, each [hidden]."""
        hidden, found = hidden[:rows], []
        for step in range(STEPS + 1):
            found.append(self.forward(tokens[: rows + step], hidden)[-1])
            hidden = torch.cat((hidden, found[-1][None]))
        return found[1:]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("target"), num_experts=7, num_hidden_layers=6)


def reference(head: Path, target: Path, layer: str = "midlayer") -> Reference:
    tensors = load_file(head / "model.safetensors")
    embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    return Reference(tensors, tensors.get("embed_tokens.weight", embedding), layer)


@cache
def loaded(target: Path) -> Any:
    """NOTE: not in two threads at once: transformers changes module-wide state while it loads."""
    return oracle(target)


def features_of(target: Path, tokens: list[int], layers: tuple[int, ...]) -> Tensor:
    """The residual stream entering these layers, by transformers."""
    with torch.inference_mode():
        states = loaded(target)(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    return torch.cat([states[layer][0] for layer in layers], -1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count,), generator=generator).tolist()


def check(
    rank: DraftRank, own: Reference, target: Path, tokens: list[int], chunks: list[int]
) -> None:
    """Feed a sequence in chunks with chained drafts behind each, whose rows the next overwrites."""
    features = features_of(target, tokens, rank.config.aux_hidden_state_layers)
    hidden = own.project(features)
    expected = own.forward(tokens[1:], hidden[:-1])
    done = 0
    for count in chunks:
        new = tokens[done : done + count]
        out = rank.follow([new], [done], [tokens[done + 1 : done + count + 1]])
        close(out.aux_hidden_states, expected[done : done + count])
        close(rank.draft.logits(out.last), own.logits(expected[done : done + count]))
        done += count
        following = tokens[done + 1 : done + 1 + STEPS] if count else []
        wanted = own.chain(tokens[1:], hidden, done) if count else []
        before = out.aux_hidden_states[-1:]
        for step in range(STEPS):
            found = rank.run_draft([following[step : step + 1]], [done + step], before)
            before = found.aux_hidden_states
            if count:
                close(found.aux_hidden_states[0], wanted[step])
                close(rank.draft.logits(found.last)[0], own.logits(wanted[step]))


VARIANTS: dict[str, dict[str, Any]] = {
    "inputs of layers": {"layer_ids": (0, 3, 5)},
    "outputs of layers": {"layer_ids": (1, 2, 4)},
    "default layers": {"layer_ids": None},
    "two layers": {"layer_ids": (0, 4)},
    "layers.0": {"layer": "layers.0"},
    "an embedding of its own": {"own_embedding": True},
    "its target's vocabulary": {"draft_vocab_size": VOCAB},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_and_chained_drafts(name: str, target: Path, tmp_path: Path) -> None:
    head = eagle3_checkpoint(tmp_path, target, **VARIANTS[name])
    own = reference(head, target, VARIANTS[name].get("layer", "midlayer"))
    tokens = random_tokens(40, 1)

    def run(collective: RowCollective) -> tuple[int, ...]:
        rank = DraftRank(target, head, collective)
        check(rank, own, target, tokens, [9, 1, 22, 4])
        return rank.config.aux_hidden_state_layers

    layers = {"outputs of layers": (2, 3, 5), "default layers": (2, 3, 3)}
    (found,) = on_ranks(1, run)
    assert found == layers.get(name, VARIANTS[name].get("layer_ids", (0, 1, 1)))


def test_sequences_of_several_lengths_in_one_slot(target: Path, tmp_path: Path) -> None:
    head = eagle3_checkpoint(tmp_path, target)
    own = reference(head, target)
    texts = [random_tokens(count, count) for count in (31, 12, 20)]

    def run(collective: RowCollective) -> None:
        rank = DraftRank(target, head, collective, 3)
        done, wanted = [0, 0, 0], []
        for tokens in texts:
            hidden = own.project(features_of(target, tokens, rank.config.aux_hidden_state_layers))
            wanted.append(own.forward(tokens[1:], hidden[:-1]))
        for counts in ([5, 1, 0], [0, 10, 19], [25, 0, 0]):
            new = [text[at : at + count] for text, at, count in zip(texts, done, counts)]
            after = [text[at + 1 : at + 1 + count] for text, at, count in zip(texts, done, counts)]
            out = rank.follow(new, done, after)
            for rows, at, found in zip(wanted, done, out.aux_hidden_states.split(counts)):
                close(found, rows[at : at + len(found)])
            done = [at + count for at, count in zip(done, counts)]

    on_ranks(1, run)


@pytest.mark.parametrize("dp_size", [2, 3])
def test_ranks_with_different_rows(dp_size: int, target: Path, tmp_path: Path) -> None:
    head = eagle3_checkpoint(tmp_path, target)
    own = reference(head, target)
    chunks = [[8, 1, 5], [1, 20, 0], [0, 8, 9]]
    loaded(target)

    def run(collective: RowCollective) -> None:
        rank = DraftRank(target, head, collective)
        assert rank.draft.num_moe_layers == len(rank.draft.moe_stages) == 0
        assert rank.draft.with_stages(lambda stage: stage) is rank.draft
        check(rank, own, target, random_tokens(40, collective.dp_rank), chunks[collective.dp_rank])

    on_ranks(dp_size, run)


def test_sums_in_place_reach_nothing_of_the_caller_s(target: Path, tmp_path: Path) -> None:
    head = eagle3_checkpoint(tmp_path, target, layer_ids=(0, 3, 5))
    own, tokens = reference(head, target), random_tokens(20, 4)

    def use(rank: DraftRank) -> None:
        check(rank, own, target, tokens, [9, 4])
        hidden = torch.randn(2, HIDDEN)
        before = hidden.clone()
        rank.run_draft([[1, 2]], [0], hidden)
        assert torch.equal(hidden, before)

    on_one_rank(target, head, use)


def test_zero_rows(target: Path, tmp_path: Path) -> None:
    head = eagle3_checkpoint(tmp_path, target)

    def run(collective: RowCollective) -> tuple[Tensor, Tensor]:
        rank = DraftRank(target, head, collective)
        out = rank.follow([[]], [0], [[]])
        return out.aux_hidden_states, rank.draft.logits(out.last)

    for features, logits in on_ranks(2, run):
        assert features.shape == (0, HIDDEN)
        assert logits.shape == (0, DRAFT_VOCAB)


def test_tokens_of_the_target_s_vocabulary(target: Path, tmp_path: Path) -> None:
    head = eagle3_checkpoint(tmp_path, target)
    best = torch.arange(DRAFT_VOCAB)
    found = on_one_rank(target, head, lambda rank: rank.draft.token_ids(best))
    tensors = load_file(head / "model.safetensors")
    assert found.tolist() == tensors["t2d"].nonzero().flatten().tolist()
    assert not torch.equal(found, best)


def test_without_a_map_the_vocabulary_is_the_target_s(target: Path, tmp_path: Path) -> None:
    head = eagle3_checkpoint(tmp_path, target, draft_vocab_size=VOCAB)
    change_tensors(head, lambda tensors: tensors.pop("d2t"))
    best = torch.tensor([0, VOCAB - 1])
    assert torch.equal(on_one_rank(target, head, lambda rank: rank.draft.token_ids(best)), best)


def shares_embedding(rank: DraftRank) -> bool:
    assert isinstance(rank.draft, Eagle3)
    return rank.draft.embedding is rank.target.embedding


def test_the_embedding_is_the_target_s_unless_it_has_one(target: Path, tmp_path: Path) -> None:
    for own in (False, True):
        head = eagle3_checkpoint(tmp_path / str(own), target, own_embedding=own)
        shared = on_one_rank(target, head, shares_embedding)
        assert shared is not own


def test_dummy_weights_need_no_files(target: Path, tmp_path: Path) -> None:
    head = eagle3_checkpoint(tmp_path, target)
    (head / "model.safetensors").unlink()

    def use(rank: DraftRank) -> tuple[Tensor, Tensor]:
        logits = rank.draft.logits(rank.follow([[1, 2, 3]], [0], [[2, 3, 4]]).last)
        return logits, rank.draft.token_ids(logits.argmax(-1))

    logits, ids = on_one_rank(target, head, use, load_format="dummy")
    assert logits.shape == (3, DRAFT_VOCAB)
    assert logits.std() > 0
    assert torch.equal(ids, logits.argmax(-1))


@pytest.mark.parametrize("own_embedding", [False, True])
def test_what_is_read_is_counted_before(target: Path, tmp_path: Path, own_embedding: bool) -> None:
    head = eagle3_checkpoint(tmp_path, target, own_embedding=own_embedding)
    config = read_model_config(str(target))
    draft = read_draft_config(str(target), config, str(head))
    sharding = RankSharding("ep", 0, 1)
    backends = backend_over(config), backend_over(draft)
    read = []
    for counted in (False, True):
        sources = [
            MetaWeights(torch.float32, torch.device("cpu")) if counted
            else open_weights(directory, "safetensors", 0, torch.float32, CPU)
            for directory in (str(target), str(head))
        ]  # fmt: skip
        model = build_model(config, sources[0], sharding, backends[0])
        build_draft(draft, model, sources[1], sharding, backends[1], "torch")
        read.append(sources[1].bytes_read)
    tensors = load_file(head / "model.safetensors")
    assert read == [sum(t.nbytes for name, t in tensors.items() if name != "t2d")] * 2
