"""The whole runtime on GPU ranks, against transformers in float32."""

from pathlib import Path

import pytest
import torch

from dp_runtime import Engine, EngineConfig, SamplingParams
from tests.checkpoints import oracle, tiny_checkpoint

LENGTHS = (1, 5, 17, 63, 64, 65, 130, 300, 12, 9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("gpu"), hidden_size=256, num_attention_heads=16,
        num_key_value_heads=2, head_dim=128, moe_intermediate_size=64,
    )  # fmt: skip


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 199, (n,), generator=generator).tolist() for n in LENGTHS]


def logprob_differences(model: Path, precision: torch.dtype, outputs: list) -> torch.Tensor:
    """|log probability difference| of every output token against transformers in `precision`."""
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(model, dtype=precision).eval().cuda()
    differences = []
    for output in outputs:
        ids = [*output.prompt_token_ids, *output.token_ids]
        with torch.inference_mode():
            logits = peer(torch.tensor([ids]).cuda()).logits[0].float().log_softmax(-1).cpu()
        for index, (token, entry) in enumerate(zip(output.token_ids, output.logprobs)):
            at = len(output.prompt_token_ids) - 1 + index
            differences.append(abs(float(logits[at, token]) - entry.logprob))
    return torch.tensor(differences)


def serve(model: Path, **changes: object) -> list:
    config = EngineConfig(
        str(model), device="cuda", launcher="local", max_model_len=512, num_pages=200, **changes
    )
    with Engine(config) as engine:
        params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=0)
        outputs = engine.generate(prompts(), params)
        assert all(rank.free_pages == rank.num_pages - 1 for rank in engine.health())
    return outputs


CASES = [
    ("trtllm", 1, {}),
    ("flashinfer", 1, {}),
    ("torch_ref", 1, {}),
    ("trtllm", 2, {"overlap": True, "poison_padding": True}),
    ("trtllm", 2, {"moe_sharding": "tp", "padding": "ragged"}),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("backend", "dp_size", "changes"), CASES)
def test_bf16_is_as_near_to_float32_as_transformers_is(
    checkpoint: Path, backend: str, dp_size: int, changes: dict
) -> None:
    if torch.cuda.device_count() < dp_size:
        pytest.skip(f"{dp_size} GPUs are needed, {torch.cuda.device_count()} are here")
    outputs = serve(checkpoint, attention_backend=backend, dp_size=dp_size, **changes)
    ours = logprob_differences(checkpoint, torch.float32, outputs)
    theirs = peer_differences(checkpoint, outputs)
    figures = [f"{d.mean():.4f}, p99 {d.quantile(0.99):.4f}" for d in (ours, theirs)]
    print(f"{backend} dp {dp_size}: mean {figures[0]}; transformers bf16: mean {figures[1]}")
    assert ours.mean() <= 1.25 * theirs.mean()
    assert ours.quantile(0.99) <= 1.25 * theirs.quantile(0.99)


def peer_differences(model: Path, outputs: list) -> torch.Tensor:
    """How far transformers in bf16 is from itself in float32, at the same tokens."""
    from transformers import AutoModelForCausalLM

    precise = oracle(model).cuda()
    rough = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval().cuda()
    differences = []
    for output in outputs:
        ids = torch.tensor([[*output.prompt_token_ids, *output.token_ids]]).cuda()
        with torch.inference_mode():
            one, other = (peer(ids).logits[0].float().log_softmax(-1) for peer in (precise, rough))
        first = len(output.prompt_token_ids) - 1
        rows = torch.arange(first, first + len(output.token_ids), device="cuda")
        tokens = torch.tensor(output.token_ids, device="cuda")
        differences.append((one[rows, tokens] - other[rows, tokens]).abs().cpu())
    return torch.cat(differences)
