"""The tiny hybrid model learns a little text in seconds, and is served as it was trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from dp_runtime import Engine, EngineConfig, SamplingParams
from examples.tiny_hybrid.model import SHAPE, Mtp, TinyHybrid, load_model, save_weights
from examples.tiny_hybrid.train import initial_model, parse_args
from examples.tiny_moe.evaluate import encode_documents, greedy_tokens, speculate
from examples.tiny_moe.train import Phase, Recipe, Tokens, Trainer

SMALL: dict[str, Any] = SHAPE | {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_experts": 4,
    "layer_types": ["linear_attention", "full_attention"], "num_experts_per_tok": 2,
}  # fmt: skip
TEXT = torch.randint(1, 64, (97,), generator=torch.Generator().manual_seed(0)).repeat(60)
PHASE: dict[str, Any] = {"max_minutes": 5.0, "batch_tokens": 512, "warmup_steps": 3}
DRAFTS = 3
EXAMPLES = Path(__file__).parents[1] / "examples"
CHECKPOINT = EXAMPLES / "tiny_hybrid" / "checkpoint"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A checkpoint, and its losses on the text before and after."""
    torch.manual_seed(0)
    out, model = tmp_path_factory.mktemp("tiny"), TinyHybrid(SMALL)
    model.init_weights()
    recipe = Recipe(
        Phase("trunk", 20, peak_lr=1e-2, sequence_length=128, **PHASE),
        Phase("mtp", 15, peak_lr=1e-2, sequence_length=64, **PHASE),
    )
    tokens = Tokens(TEXT, TEXT, TEXT[:1025], 1025)
    trainer = Trainer(recipe, tokens, model.train(), partial(save_weights, model, out), False)
    before = trainer.val_loss(trainer.trunk_losses, 1024)
    trainer.train()
    losses = [before, trainer.val_loss(trainer.trunk_losses, 1024)]
    return out, [*losses, trainer.val_loss(trainer.mtp_losses, 1024)]


@pytest.mark.slow
def test_losses_fall(trained: tuple[Path, list[float]]) -> None:
    _, (before, after, drafts) = trained
    print(f"loss {before:.3f}, then {after:.3f}; of drafts {drafts:.3f}")
    assert after < 0.6 * before
    assert drafts < 0.8 * before


@pytest.mark.slow
def test_it_is_served_as_it_was_trained_18(trained: tuple[Path, list[float]]) -> None:
    """Its own greedy tokens, and as many drafts accepted: a wrong draft shows nowhere else."""
    path, _ = trained
    model = load_model(path)
    prompts = [TEXT[31:51].tolist(), TEXT[:12].tolist(), [5, 6, 7]]
    runs = [speculate(model, prompt, 20, DRAFTS) for prompt in prompts]
    config = EngineConfig(
        str(path), device="cpu", launcher="thread", dtype="float32", max_model_len=128,
        num_pages=20, speculative_num_steps=DRAFTS, max_num_requests=1,
    )  # fmt: skip
    with Engine(config) as engine:
        params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        outputs = engine.generate(prompts, params)
        accepted = engine.report().drafts_accepted
    assert [list(output.token_ids) for output in outputs] == [
        greedy_tokens(model, prompt, 20) for prompt in prompts
    ]
    due = sum(count for run in runs for count in run.accepted)
    assert due > len(prompts)
    assert 0 <= due - accepted <= DRAFTS * len(prompts), "but for drafts behind the last token"


def test_each_draft_is_rotated_by_three_rows_of_positions() -> None:
    """As some versions of transformers demand."""
    mtp, seen = Mtp(TinyHybrid(SMALL).model.config), list[torch.Tensor]()
    mtp._rotary.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    embeds = torch.randn(DRAFTS, 2, 8, SMALL["hidden_size"])
    mtp.unroll(list(embeds), torch.randn(2, 8, SMALL["hidden_size"]))
    expected = [torch.arange(step, step + 8).repeat(3, 1, 1) for step in range(DRAFTS)]
    assert all(map(torch.equal, seen, expected)), [positions.shape for positions in seen]
    assert len(seen) == DRAFTS


def test_a_trunk_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    other = TinyHybrid(SHAPE)
    other.init_weights()
    save_weights(other, tmp_path)
    flags = ["train", "--corpus", "x", "--device", "cpu", "--trunk", str(tmp_path)]
    monkeypatch.setattr("sys.argv", flags)
    args = parse_args()
    assert args.trunk_steps == 0, "only the MTP layer is trained"
    model, saved = initial_model(args), load_model(tmp_path)
    for part, taken in ((model.model, saved.model), (model.mtp, saved.mtp)):
        equal = [torch.equal(*pair) for pair in zip(part.parameters(), taken.parameters())]
        assert all(equal) == (part is model.model)


def test_the_checkpoint_continues_held_out_text_with_its_own_tokens() -> None:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    documents = encode_documents(tokenizer, EXAMPLES / "tiny_moe" / "held_out.txt")
    prompts = [document[:64] for document in documents if len(document) > 64][:6]
    config = EngineConfig(
        str(CHECKPOINT), device="cpu", launcher="thread", dtype="float32", max_model_len=128,
        dp_size=2, speculative_num_steps=DRAFTS,
    )  # fmt: skip
    with Engine(config) as engine:
        params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
        outputs = engine.generate(prompts, params)
        per_verification = engine.report().tokens_per_verification
    model = load_model(CHECKPOINT)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = torch.tensor([[*prompt, *output.token_ids]])
        best = model.logits(model(tokens)[0])[0, len(prompt) - 1 : -1].argmax(-1)
        assert best.tolist() == list(output.token_ids)
    print(f"{per_verification:.2f} tokens a verification")
    assert per_verification > 1.7


def test_the_published_size_is_at_most_8_mb() -> None:
    with torch.device("meta"):
        model = TinyHybrid(SHAPE)
    tied = sum(parameter.numel() for parameter in model.parameters())
    assert 7.0e6 < 2 * tied < 7.9e6
