"""Trains the tokenizer, the trunk and then the MTP layer, and writes a Hugging Face checkpoint.

python -m examples.tiny_moe.train --corpus CORPUS --trunk-minutes 5.5 --mtp-minutes 1.5
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from examples.tiny_moe.model import TinyMoe, TinyMoeConfig, save_weights

END_OF_TEXT = "<|endoftext|>"
VAL_LENGTH = 512
LOG_STEPS = 500
SAVE_SECONDS = 15
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\nYou may call one of these tools:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- 'with <tool_call>{"name": ..., "arguments": {...}}</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>' + call.function | tojson + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Phase:
    """A cosine schedule that ends after num_steps or max_minutes, whichever comes first."""

    name: str
    num_steps: int
    max_minutes: float
    peak_lr: float
    batch_tokens: int
    sequence_length: int
    focus_share: float = 0.25
    warmup_steps: int = 200
    weight_decay: float = 0.1

    def lr(self, step: int, progress: float) -> float:
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return self.peak_lr * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on besides the corpus and the model's shape."""

    trunk: Phase
    mtp: Phase
    seed: int = 0
    balance_coefficient: float = 0.01
    num_drafts: int = 3


@dataclass(frozen=True)
class Tokens:
    """The corpus as ids: the tokens of all documents, each closed by the end-of-text token."""

    train: Tensor  # [num_train_tokens] int64
    focus: Tensor  # [num_focus_tokens] int64, a part of train that is to be drawn more often
    val: Tensor  # [num_val_tokens] int64
    val_bytes: int

    def batches(self, phase: Phase, seed: int) -> Iterator[Tensor]:
        """Random windows [batch_tokens // sequence_length, sequence_length + 1], without end."""
        generator = torch.Generator().manual_seed(seed)
        num_rows = phase.batch_tokens // phase.sequence_length
        num_focus = round(num_rows * phase.focus_share)

        def draw(ids: Tensor, num_rows: int) -> Tensor:
            last = len(ids) - phase.sequence_length
            starts = torch.randint(last, (num_rows, 1), generator=generator)
            return ids[(starts + torch.arange(phase.sequence_length + 1)).to(ids.device)]

        while True:
            yield torch.cat((draw(self.train, num_rows - num_focus), draw(self.focus, num_focus)))

    def val_batches(self, length: int, batch_tokens: int) -> tuple[Tensor, ...]:
        """Consecutive windows, as many as fill whole batches of the shape of training's."""
        num_rows = batch_tokens // length
        windows = self.val.unfold(0, length + 1, length).contiguous()
        return windows[: len(windows) // num_rows * num_rows].split(num_rows)


def train_tokenizer(text: Path, vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every string round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train([str(text)], trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, max_length: int, checkpoint: Path) -> None:
    checkpoint.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(checkpoint / "tokenizer.json"), pretty=False)
    settings = {
        "add_bos_token": False,
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": max_length,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "do_sample": False}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (checkpoint / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (checkpoint / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def encode(tokenizer: Tokenizer, text: Path) -> np.ndarray:
    documents = text.read_text().split(f"\n{END_OF_TEXT}\n")
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [np.array([*e.ids, end], np.uint16) for e in tokenizer.encode_batch(documents)]
    return np.concatenate(ids)


def prepare(corpus: Path, vocab_size: int) -> Path:
    """Trains the tokenizer and encodes the corpus, once; returns the folder of both."""
    folder = corpus / f"vocab-{vocab_size}"
    if not (folder / "tokens.npz").exists():
        folder.mkdir(exist_ok=True)
        tokenizer = train_tokenizer(corpus / "train.txt", vocab_size)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        ids = {n: encode(tokenizer, corpus / f"{n}.txt") for n in ("train", "focus", "val")}
        val_bytes = np.array((corpus / "val.txt").stat().st_size)
        np.savez_compressed(folder / "tokens.npz", val_bytes=val_bytes, **ids)  # type: ignore[arg-type]
    return folder


def load_tokens(folder: Path, device: torch.device) -> Tokens:
    with np.load(folder / "tokens.npz") as file:
        ids = {n: torch.from_numpy(file[n].astype(np.int64)) for n in ("train", "focus", "val")}
        return Tokens(**{n: i.to(device) for n, i in ids.items()}, val_bytes=int(file["val_bytes"]))


Losses = tuple[Tensor, Tensor]


def optimizer_of(parameters: list[nn.Parameter], phase: Phase) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": phase.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = parameters[0].is_cuda
    return torch.optim.AdamW(groups, lr=phase.peak_lr, betas=(0.9, 0.95), fused=fused)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def distillation(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy against the trunk's own next-token distribution."""
    teacher = teacher_logits.float().softmax(-1)
    return -(teacher * logits.float().log_softmax(-1)).sum(-1).mean()


class Drafting(Protocol):
    """What training asks of a trunk with an MTP layer."""

    model: Any  # the trunk: `embed_tokens`, `layers`
    mtp: Any  # `unroll`

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the MTP layer reads of the trunk, and the mean load-balancing loss."""

    def logits(self, hidden: Tensor) -> Tensor: ...

    def mtp_logits(self, hidden: Tensor) -> Tensor: ...


class Trainer:
    """The two training phases over one model; losses come as (cross-entropy, load balancing)."""

    def __init__(
        self,
        recipe: Recipe,
        tokens: Tokens,
        model: Drafting,  # on the tokens' device
        save: Callable[[], None],
        compiled: bool,
    ) -> None:
        self.recipe, self.tokens, self.save = recipe, tokens, save
        self.device = tokens.train.device
        self.model = model
        self.cross_entropy, self.draft_losses = cross_entropy, self._draft_losses
        if compiled:
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
            self.cross_entropy = torch.compile(cross_entropy, dynamic=False)
            self.draft_losses = torch.compile(self._draft_losses, dynamic=False)

    def trunk_losses(self, batch: Tensor) -> Losses:
        with torch.autocast(self.device.type, torch.bfloat16):
            hidden, balance = self.model(batch[:, :-1])
            # NOTE: validation takes the plain function, to compile nothing for its sake alone.
            loss_of = self.cross_entropy if torch.is_grad_enabled() else cross_entropy
            return loss_of(self.model.logits(hidden), batch[:, 1:]), balance

    def mtp_losses(self, batch: Tensor) -> Losses:
        """Means over all positions and drafts; the frozen trunk is the teacher."""
        with torch.autocast(self.device.type, torch.bfloat16):
            with torch.no_grad():
                hidden, _ = self.model(batch[:, :-1])
                teacher = self.model.logits(hidden)
            losses_of = self.draft_losses if torch.is_grad_enabled() else self._draft_losses
            return losses_of(batch, hidden, teacher)

    def _draft_losses(self, batch: Tensor, hidden: Tensor, teacher: Tensor) -> Losses:
        num_drafts = self.recipe.num_drafts
        length = hidden.shape[1] - 8  # attention masks want a multiple of 8
        assert num_drafts <= 8, f"num_drafts {num_drafts} is more than the 8 rows cut off"
        embeds = self.model.model.embed_tokens(batch)
        shifted = [embeds[:, j : j + length] for j in range(1, num_drafts + 1)]
        drafts = self.model.mtp.unroll(shifted, hidden[:, :length])
        losses = [
            distillation(self.model.mtp_logits(draft), teacher[:, j : j + length])
            for j, (draft, _) in enumerate(drafts, start=1)
        ]
        return torch.stack(losses).mean(), torch.stack([b for _, b in drafts]).mean()

    @torch.no_grad()
    def val_loss(self, losses_of: Callable[[Tensor], Losses], batch_tokens: int) -> float:
        batches = self.tokens.val_batches(VAL_LENGTH, batch_tokens)
        return float(torch.stack([losses_of(batch)[0] for batch in batches]).mean())

    def run(
        self,
        phase: Phase,
        parameters: list[nn.Parameter],
        losses_of: Callable[[Tensor], Losses],
    ) -> None:
        optimizer = optimizer_of(parameters, phase)
        batches = self.tokens.batches(phase, self.recipe.seed)
        start = time.monotonic()
        losses_of(next(batches))[0].backward()
        print(f"{phase.name} warm-up {time.monotonic() - start:.0f} s", flush=True)
        start = last_save = time.monotonic()
        for step in range(phase.num_steps):
            now = time.monotonic()
            progress = max(step / phase.num_steps, (now - start) / 60 / phase.max_minutes)
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = phase.lr(step, progress)
            loss, balance = losses_of(next(batches))
            optimizer.zero_grad(set_to_none=True)
            (loss + self.recipe.balance_coefficient * balance).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step % LOG_STEPS == 0:
                rate = (step + 1) * phase.batch_tokens / (time.monotonic() - start)
                text = f"loss {loss.item():.4f} balance {balance.item():.3f} {rate:,.0f} tokens/s"
                print(f"{phase.name} {step:6d} {text}", flush=True)
            if step % 2000 == 1999:
                val_loss = self.val_loss(losses_of, phase.batch_tokens)
                print(f"{phase.name} {step:6d} val {val_loss:.4f}", flush=True)
            if now - last_save > SAVE_SECONDS:
                self.save()
                last_save = now
        print(f"{phase.name} ends after {step} steps, {time.monotonic() - start:.0f} s", flush=True)
        self.save()
        val_loss = self.val_loss(losses_of, phase.batch_tokens)
        bits = val_loss / math.log(2) * len(self.tokens.val) / self.tokens.val_bytes
        print(f"{phase.name} val {val_loss:.4f} nats a token, {bits:.4f} bits a byte", flush=True)

    def train(self) -> None:
        trunk, mtp = list(self.model.model.parameters()), list(self.model.mtp.parameters())
        if self.recipe.trunk.num_steps:
            self.run(self.recipe.trunk, trunk, self.trunk_losses)
        for parameter in trunk:
            parameter.requires_grad_(False)
        if self.recipe.mtp.num_steps:
            self.run(self.recipe.mtp, mtp, self.mtp_losses)


def initial_model(args: argparse.Namespace) -> TinyMoe:
    torch.manual_seed(args.seed)
    config = TinyMoeConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        moe_intermediate_size=args.moe_intermediate_size,
    )
    model = TinyMoe(config)
    model.init_weights()
    return model.train().to(args.device)


def recipe_of(args: argparse.Namespace) -> Recipe:
    return Recipe(
        trunk=Phase("trunk", args.trunk_steps, args.trunk_minutes, 4e-3, 65_536, 1024),
        mtp=Phase("mtp", args.mtp_steps, args.mtp_minutes, 3e-3, args.mtp_batch_tokens, 512),
        seed=args.seed,
    )


def new_parser(out: Path) -> argparse.ArgumentParser:
    """Return the flags that trainings of any model share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--corpus", type=Path, required=True, help="folder that corpus.py wrote")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument(
        "--prepare-only", action="store_true", help="tokenizer and ids, no training"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trunk-steps", type=int, default=2_200)
    parser.add_argument("--trunk-minutes", type=float, default=0.66)
    parser.add_argument("--mtp-steps", type=int, default=1_200)
    parser.add_argument("--mtp-minutes", type=float, default=0.42)
    parser.add_argument("--mtp-batch-tokens", type=int, default=65_536)
    parser.add_argument("--vocab-size", type=int, default=3072)
    return parser


def parse_args() -> argparse.Namespace:
    parser = new_parser(Path(__file__).parent / "checkpoint")
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--moe-intermediate-size", type=int, default=32)
    return parser.parse_args()


def prepare_tokens(args: argparse.Namespace, max_length: int) -> Tokens:
    """Write the checkpoint's tokenizer, and return the corpus as its tokens."""
    folder = prepare(args.corpus, args.vocab_size)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    save_tokenizer(tokenizer, max_length, args.out)
    return load_tokens(folder, torch.device(args.device))


def train(
    args: argparse.Namespace, tokens: Tokens, model: Drafting, save: Callable[[], None]
) -> None:
    trainer = Trainer(recipe_of(args), tokens, model, save, args.compile)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.model, model.mtp)]
    print(f"{sum(sizes):,} parameters, {sizes[1]:,} of them MTP; {len(tokens.train):,} tokens")
    trainer.train()
    print("files:", sum(path.stat().st_size for path in args.out.iterdir()), "bytes")


def main() -> None:
    args = parse_args()
    tokens = prepare_tokens(args, TinyMoeConfig.max_position_embeddings)
    if args.prepare_only:
        return
    model = initial_model(args)
    train(args, tokens, model, partial(save_weights, model, args.out))


if __name__ == "__main__":
    main()
