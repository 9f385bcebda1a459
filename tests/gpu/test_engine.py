"""The whole runtime on GPU ranks with a random model, against transformers in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dp_runtime import Engine, EngineConfig, RequestOutput, SamplingParams
from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.attention.trtllm.measured import MeasuredTiles
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.gpu.peers import ALL_EXPERTS, FEW_POSITIONS, compare
from tests.serving import check_pages_free

TINY_MODEL = Path(__file__).parents[2] / "examples" / "tiny_moe" / "checkpoint"
LENGTHS = (1, 5, 17, 63, 64, 65, 130, 300, 12, 9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_checkpoint(
        tmp_path_factory.mktemp("gpu"), hidden_size=256, num_attention_heads=16,
        num_key_value_heads=2, head_dim=128, moe_intermediate_size=64, **ALL_EXPERTS,
    )  # fmt: skip
    return add_mtp(model)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 199, (n,), generator=generator).tolist() for n in LENGTHS]


def serve(model: Path, **changes: Any) -> list[RequestOutput]:
    config = EngineConfig(
        str(model), launcher="local", max_model_len=512, num_pages=200,
        **dict[str, Any](device="cuda") | changes,
    )  # fmt: skip
    with Engine(config) as engine:
        params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=0)
        outputs = engine.generate(prompts(), params)
        check_pages_free(engine)
    return outputs


# Prompts are read while other ranks decode.
IN_CHUNKS: dict[str, Any] = {"max_num_tokens": 48, "max_num_requests": 8, "overlap": True}
CASES = [
    ("trtllm", 1, {}),
    ("flashinfer", 1, {}),
    ("torch_ref", 1, {}),
    ("trtllm", 2, {"overlap": True, "poison_padding": True}),
    ("trtllm", 2, {"moe_sharding": "tp", "padding": "ragged"}),
    ("trtllm", 2, {"collective": "torch_distributed", "overlap": True}),
    ("trtllm", 2, {"moe_backend": "torch", "cuda_graphs": False}),
    ("trtllm", 1, {"speculative_num_steps": 3}),
    ("trtllm", 1, {"speculative_num_steps": 3, "cuda_graphs": False}),
    ("trtllm", 2, {"speculative_num_steps": 3, "poison_padding": True}),
    ("trtllm", 2, {"speculative_num_steps": 3, "collective": "torch_distributed"}),
    ("flashinfer", 1, {"speculative_num_steps": 3}),
    ("trtllm", 2, IN_CHUNKS | {"poison_padding": True}),
    ("trtllm", 4, IN_CHUNKS | {"poison_padding": True}),
    ("trtllm", 4, IN_CHUNKS | {"speculative_num_steps": 3}),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("backend", "dp_size", "changes"), CASES)
def test_bf16_is_as_near_to_float32_as_transformers_is(
    checkpoint: Path, backend: str, dp_size: int, changes: dict[str, Any]
) -> None:
    if torch.cuda.device_count() < dp_size:
        pytest.skip(f"{dp_size} GPUs are needed, {torch.cuda.device_count()} are here")
    outputs = serve(checkpoint, attention_backend=backend, dp_size=dp_size, **changes)
    compare(checkpoint, outputs)[1].check(f"{backend}, {dp_size} ranks", FEW_POSITIONS)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dp_rank", [0, 1])
def test_a_rank_without_rows_runs_its_experts_for_the_others_eagerly(
    checkpoint: Path, dp_rank: int
) -> None:
    """It is far ahead of them, and waits."""
    config = EngineConfig(
        str(checkpoint), launcher="local", device="cuda", dp_size=2, max_model_len=512,
        num_pages=200, attention_backend="trtllm", cuda_graphs=False,
        ranks_per_gpu=1 if torch.cuda.device_count() > 1 else 2,
    )  # fmt: skip
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=0)
    with Engine(config) as engine:
        outputs = [engine.generate([prompt], params, [dp_rank])[0] for prompt in prompts()]
    compare(checkpoint, outputs)[1].check(f"all on rank {dp_rank}, eager", FEW_POSITIONS)


@pytest.fixture(scope="module")
def wide_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups of heads as 397B has: any number of its decodes is served by shares of keys."""
    spec = AttentionSpec(16, 1, 256, 64, torch.bfloat16, torch.bfloat16)
    assert all(MeasuredTiles.of(spec)(1, requests) for requests in (1, len(LENGTHS), 256))
    model = tiny_checkpoint(
        tmp_path_factory.mktemp("wide"), hidden_size=256, num_attention_heads=16,
        num_key_value_heads=1, head_dim=256, moe_intermediate_size=64, **ALL_EXPERTS,
    )  # fmt: skip
    return add_mtp(model)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("changes", [{}, {"cuda_graphs": False}, {"speculative_num_steps": 3}])
def test_decodes_by_shares_are_as_near_too(wide_heads: Path, changes: dict[str, Any]) -> None:
    outputs = serve(wide_heads, attention_backend="split", **changes)
    compare(wide_heads, outputs)[1].check(f"split, {changes}", FEW_POSITIONS)


def mixed_params(number: int) -> SamplingParams:
    """Greedy, drawn, penalised and biased requests, with log probabilities or without."""
    kinds: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"temperature": 0.7, "seed": number},
        {"temperature": 0.0, "logprobs": 2, "presence_penalty": 0.5},
        {"temperature": 0.7, "seed": number, "top_k": 5, "logit_bias": {7: 1.0}, "min_tokens": 3},
        {"temperature": 0.0, "prompt_logprobs": 1},
    )
    return SamplingParams(max_tokens=4, ignore_eos=True, **kinds[number % len(kinds)])


@pytest.mark.timeout(300)
def test_graphs_give_the_logits_of_eager_steps(checkpoint: Path) -> None:
    """Their rounding differs, so a tie may fall otherwise; logits of other rows would be noise."""
    lines = [prompt[: 1 + n % 40] for n, prompt in enumerate(4 * prompts()) if len(prompt) > 4]
    params = [mixed_params(number) for number in range(len(lines))]
    tokens = []
    for graphs in (True, False):
        config = EngineConfig(
            str(checkpoint), launcher="local", device="cuda", max_model_len=512, num_pages=200,
            cuda_graphs=graphs, attention_backend="trtllm",
        )  # fmt: skip
        with Engine(config) as engine:
            tokens.append([output.token_ids for output in engine.generate(lines, params)])
    pairs = [pair for one, other in zip(*tokens) for pair in zip(one[1:], other[1:], strict=True)]
    assert sum(one == other for one, other in pairs) > 0.5 * len(pairs)


@pytest.mark.timeout(300)
def test_a_useful_draft_is_accepted_as_often_from_graphs_as_eagerly_overlapped_or_not() -> None:
    """A wrong draft never shows as wrong text, only as few accepted tokens."""
    lines = [f"The {word} of the" for word in ("name", "value", "list", "type", "result", "use")]
    accepted, texts = [], []
    for graphs, overlap in ((True, True), (False, True), (True, False)):
        config = EngineConfig(
            str(TINY_MODEL), launcher="local", device="cuda", max_model_len=512, overlap=overlap,
            cuda_graphs=graphs, attention_backend="trtllm", speculative_num_steps=3,
        )  # fmt: skip
        with Engine(config) as engine:
            params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
            outputs = engine.generate(4 * lines, params)
            accepted.append(engine.report().tokens_per_verification)
            texts.append([output.token_ids for output in outputs])
    assert min(accepted) > 1.6
    assert max(accepted) < 1.1 * min(accepted)
    assert sum(one == other for one, other in zip(texts[0], texts[2])) > 0.8 * len(texts[0])
