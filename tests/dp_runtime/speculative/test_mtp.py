"""The MTP draft layer against the module that the tiny checkpoint's was trained as."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from dp_runtime.layers.moe import RankSharding
from dp_runtime.models.registry import build_model, read_model_config
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.speculative.draft import build_draft, read_draft_config
from dp_runtime.speculative.mtp import Mtp
from dp_runtime.weights.dummy import MetaWeights
from dp_runtime.weights.loader import open_weights
from examples.tiny_moe.model import TinyMoe, load_model
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.dp_runtime.drafts import DraftRank, on_ranks
from tests.dp_runtime.paged import CPU, backend_over

TINY = Path(__file__).parents[3] / "examples/tiny_moe"
CHECKPOINT = TINY / "checkpoint"
STEPS = 3  # chained drafts, behind the one of the target's own features
LENGTHS = (40, 61, 23)


@dataclass(frozen=True)
class Expected:
    """Of one text: what every row gives, and every chained draft from it; rows t, step j."""

    tokens: list[int]
    hidden: list[Tensor]  # of each step [rows, hidden]
    logits: list[Tensor]  # [rows, vocab]


@pytest.fixture(scope="module")
def oracle() -> TinyMoe:
    return load_model(CHECKPOINT)


@pytest.fixture(scope="module")
def texts(oracle: TinyMoe) -> list[Expected]:
    encoded = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode(
        (TINY / "held_out.txt").read_text()[:3000]
    )
    starts = (0, 100, 300)
    return [expected(oracle, encoded.ids[at : at + n]) for at, n in zip(starts, LENGTHS)]


def expected(oracle: TinyMoe, tokens: list[int]) -> Expected:
    ids, rows = torch.tensor([tokens]), len(tokens) - STEPS - 1
    with torch.inference_mode():
        trunk, _ = oracle(ids[:, :rows])
        embeds = oracle.model.embed_tokens(ids)
        shifted = [embeds[:, 1 + step : 1 + step + rows] for step in range(STEPS + 1)]
        outputs = [output[0] for output, _ in oracle.mtp.unroll(shifted, trunk)]
        logits = [oracle.mtp_logits(output) for output in outputs]
        return Expected(tokens, [oracle.mtp.norm(output) for output in outputs], logits)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)


def check_texts(rank: DraftRank, texts: list[Expected], chunks: list[list[int]]) -> None:
    """Feed texts in chunks, and after each draft chains whose rows the next chunk overwrites."""
    done = [0] * len(texts)
    for counts in chunks:
        spans = [range(start, start + count) for start, count in zip(done, counts)]
        new = [[text.tokens[t] for t in span] for text, span in zip(texts, spans)]
        following = [[text.tokens[t + 1] for t in span] for text, span in zip(texts, spans)]
        out = rank.follow(new, done, following)
        for text, span, own in zip(texts, spans, out.aux_hidden_states.split(counts)):
            close(own, text.hidden[0][span.start : span.stop])
            close(rank.draft.logits(own), text.logits[0][span.start : span.stop])
        assert out.last is out.aux_hidden_states
        done = [start + count for start, count in zip(done, counts)]
        live = [i for i, count in enumerate(counts) if count]
        ends = torch.tensor(counts).cumsum(0)[live] - 1
        chain_from(rank, texts, done, live, out.aux_hidden_states[ends])


def chain_from(
    rank: DraftRank, texts: list[Expected], done: list[int], live: list[int], hidden: Tensor
) -> None:
    """Chains of those texts that have just moved on."""
    for step in range(1, STEPS + 1):
        tokens: list[list[int]] = [[] for _ in texts]
        for i in live:
            tokens[i] = [texts[i].tokens[done[i] + step]]
        out = rank.run_draft(tokens, [count + step - 1 for count in done], hidden)
        hidden = out.aux_hidden_states
        for row, i in enumerate(live):
            close(hidden[row], texts[i].hidden[step][done[i] - 1])
            close(rank.draft.logits(hidden[row]), texts[i].logits[step][done[i] - 1])


ROWS = [length - STEPS - 1 for length in LENGTHS]
CHUNKS = {
    "whole": [ROWS],
    "ragged": [[9, 30, 1], [1, 1, 10], [ROWS[0] - 10, 0, 1], [0, ROWS[1] - 31, ROWS[2] - 12]],
}


@pytest.mark.parametrize("name", CHUNKS)
def test_rows_and_chained_drafts_are_the_trained_module_s(name: str, texts: list[Expected]) -> None:
    def run(collective: RowCollective) -> None:
        rank = DraftRank(CHECKPOINT, None, collective, len(texts))
        check_texts(rank, texts, CHUNKS[name])

    on_ranks(1, run)


def test_sums_in_place_reach_nothing_of_the_caller_s(texts: list[Expected]) -> None:
    def run(collective: RowCollective) -> None:
        rank = DraftRank(CHECKPOINT, None, collective, len(texts))
        check_texts(rank, texts, CHUNKS["ragged"][:2])
        hidden = torch.randn(2, 192)
        before = hidden.clone()
        rank.run_draft([[1, 2], [], []], [0, 0, 0], hidden)
        assert torch.equal(hidden, before)

    on_ranks(1, run)


@pytest.mark.parametrize("moe_sharding", ["ep", "tp"])
@pytest.mark.parametrize("dp_size", [2, 3])
def test_ranks_with_different_rows(dp_size: int, moe_sharding: str, texts: list[Expected]) -> None:
    """Each rank has a text of its own and feeds other chunks; the last has nothing at first."""
    chunks = [[12, 1, 5], [1, 20, 0], [0, 8, 9]]

    def run(collective: RowCollective) -> int:
        mine = collective.dp_rank
        rank = DraftRank(CHECKPOINT, None, collective, 1, moe_sharding=moe_sharding)
        assert rank.draft.num_moe_layers == len(rank.draft.moe_stages) == 1
        check_texts(rank, texts[mine : mine + 1], [[count] for count in chunks[mine]])
        return mine

    assert on_ranks(dp_size, run) == list(range(dp_size))


def test_zero_rows_on_all_ranks() -> None:
    def run(collective: RowCollective) -> tuple[Tensor, Tensor]:
        rank = DraftRank(CHECKPOINT, None, collective)
        out = rank.run_draft([[]], [0], torch.zeros(0, rank.draft.hidden_size))
        return out.aux_hidden_states, rank.draft.logits(out.last)

    for features, logits in on_ranks(2, run):
        assert features.shape == (0, 192)
        assert logits.shape == (0, 3072)


def test_embedding_and_head_are_the_target_s() -> None:
    def run(collective: RowCollective) -> None:
        rank = DraftRank(CHECKPOINT, None, collective)
        assert isinstance(rank.draft, Mtp)
        assert rank.draft.embedding is rank.target.embedding
        assert rank.draft.head is rank.target.head
        ids = torch.tensor([5, 0])
        assert torch.equal(rank.draft.token_ids(ids), ids)

    on_ranks(1, run)


@pytest.fixture
def random_mtp(tmp_path: Path) -> Path:
    return add_mtp(tiny_checkpoint(tmp_path, num_experts=7), seed=3)


def test_a_random_layer_is_the_same_on_any_number_of_ranks(random_mtp: Path) -> None:
    tokens = torch.randint(0, 199, (30,), generator=torch.Generator().manual_seed(1)).tolist()

    def run(collective: RowCollective) -> Tensor:
        rank = DraftRank(random_mtp, None, collective)
        mine = tokens if collective.dp_rank == 0 else tokens[:5]
        out = rank.follow([mine[:-1]], [0], [mine[1:]])
        return rank.draft.logits(out.last)

    (alone,) = on_ranks(1, run)
    assert alone.argmax(-1).unique().numel() > 5
    for rank, logits in enumerate(on_ranks(3, run)):
        torch.testing.assert_close(logits, alone if rank == 0 else alone[:4], atol=1e-4, rtol=1e-4)


def test_a_rank_reads_the_mtp_tensors_and_no_other(random_mtp: Path) -> None:
    config = read_model_config(str(random_mtp))
    draft = read_draft_config(str(random_mtp), config, None)
    assert draft.method == "mtp"
    assert (draft.num_layers, draft.aux_hidden_state_layers) == (1, ())
    sharding, own = RankSharding("ep", 0, 1), load_file(random_mtp / "model.safetensors")
    sources = (
        open_weights(str(random_mtp), "safetensors", 0, torch.float32, CPU),
        MetaWeights(torch.float32, torch.device("cpu")),
    )
    for source in sources:
        target = build_model(config, source, sharding, backend_over(config))
        before = source.bytes_read
        build_draft(draft, target, source, sharding, backend_over(draft), "torch")
        expected = sum(t.nbytes for name, t in own.items() if name.startswith("mtp."))
        assert source.bytes_read - before == expected


def test_dummy_weights(random_mtp: Path) -> None:
    def run(collective: RowCollective) -> Tensor:
        rank = DraftRank(random_mtp, None, collective, load_format="dummy")
        return rank.draft.logits(rank.follow([[1, 2, 3]], [0], [[2, 3, 4]]).last)

    (logits,) = on_ranks(1, run)
    assert logits.isfinite().all()
    assert logits.std() > 0


@pytest.mark.parametrize("count", [None, 0])
def test_a_target_without_an_mtp_layer(count: int | None, random_mtp: Path) -> None:
    path = random_mtp / "config.json"
    config = json.loads(path.read_text()) | {"num_nextn_predict_layers": count}
    path.write_text(json.dumps(config))
    target = read_model_config(str(random_mtp))
    with pytest.raises(ValueError, match="speculative_draft_model: None is not allowed") as caught:
        read_draft_config(str(random_mtp), target, None)
    assert "EAGLE-3" in str(caught.value)
    assert "\n" not in str(caught.value)
    path.write_text(json.dumps(config | {"mtp_num_hidden_layers": 2}))
    assert read_draft_config(str(random_mtp), target, None).num_layers == 1


def test_it_proposes_of_no_more_tokens_than_there_are(random_mtp: Path) -> None:
    target = read_model_config(str(random_mtp))
    size = target.vocab_size
    assert read_draft_config(str(random_mtp), target, None, size).vocab_size == size
    message = f"speculative_draft_vocab: {size + 1} is not allowed; at most the model's {size}"
    with pytest.raises(ValueError, match=message):
        read_draft_config(str(random_mtp), target, None, size + 1)


def test_another_architecture_has_no_mtp_layer(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "MixtralForCausalLM")
    config = json.loads((path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="none of Qwen3MoeForCausalLM, "):
        read_draft_config(str(path), read_model_config(str(path)), None)


def test_a_missing_tensor_is_named(random_mtp: Path) -> None:
    path = random_mtp / "config.json"
    plain = tiny_checkpoint(random_mtp / "plain", num_experts=7)
    (plain / "config.json").write_text(path.read_text())

    def run(collective: RowCollective) -> None:
        DraftRank(plain, None, collective)

    with pytest.raises(ValueError, match=r"tensor mtp\.\S+ is missing"):
        on_ranks(1, run)
