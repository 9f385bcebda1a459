"""Trains the vision encoder, then all of the model, then its MTP layer, on one core of a CPU.

python -m examples.tiny_vl.train --vision-minutes 4 --trunk-minutes 20 --mtp-minutes 4
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from examples.tiny_vl.batches import Batch, Mix, draw_batches, patches_of
from examples.tiny_vl.first_weights import begin
from examples.tiny_vl.model import TEXT, TinyVl, load_model, save_weights
from examples.tiny_vl.muon import Muon
from examples.tiny_vl.pictures import COLOURS, MAX_SIDE, SHAPES, Item, Scene, draw_picture
from examples.tiny_vl.questions import KINDS
from examples.tiny_vl.tokenizer import save_tokenizer

MAX_PIXELS = 16 * 32 * 32
NUM_DRAFTS = 3
GOOD = 0.03  # of tokens wrong, of each kind of question, where harder ones follow
BALANCE = 0.01
SAVE_SECONDS, LOG_SECONDS = 120, 30
SHARES = {
    "colour": 1, "shape": 1, "count": 3, "row": 1, "column": 1, "place": 1, "exists": 1,
}  # fmt: skip
PRACTICE = Mix((3, 2, 1, 1, 1), (4, 3, 2), (1, 5), (8, 2, 0), SHARES, forms=(3, 3, 1))
QUESTIONS = Mix((6, 2, 1, 1), (5, 3, 2), (1, 7), (5, 4, 1), SHARES, forms=(8, 2, 1))
PRACTICE_PART = 0.2  # of training, at most


@dataclass(frozen=True)
class Phase:
    """A schedule that warms up, stays, and falls to nothing in its last part."""

    name: str
    minutes: float
    peak_lr: float
    warmup_steps: int = 100
    decay_part: float = 0.5

    def lr(self, step: int, progress: float) -> float:
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        left = min(1.0, max(0.0, 1 - progress) / self.decay_part)
        return self.peak_lr * warmup * (0.02 + 0.98 * left)


@dataclass
class Trainer:
    model: TinyVl
    tokenizer: Tokenizer
    save: Callable[[], None]

    def run(
        self, phase: Phase, module: nn.Module,
        losses: Callable[[float], tuple[Tensor, str]],
    ) -> None:  # fmt: skip
        """Descend along `losses`, which gets how far the phase is and returns what to log too."""
        optimizer = Muon(module.named_parameters())
        start = last_save = last_log = time.monotonic()
        step = 0
        while (progress := (time.monotonic() - start) / 60 / phase.minutes) < 1:
            loss, text = losses(progress)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(optimizer.every, 1.0)
            optimizer.step(phase.lr(step, progress))
            step += 1
            now = time.monotonic()
            if now - last_log > LOG_SECONDS:
                last_log = now
                print(f"{phase.name} {now - start:5.0f} s step {step:5d} {text}", flush=True)
            if now - last_save > SAVE_SECONDS:
                last_save = now
                self.save()
        self.save()
        print(f"{phase.name} ends after {step} steps", flush=True)

    def train_vision(self, minutes: float, seed: int) -> None:
        """Make features of each cell the sum of the embeddings of what is in it, and its place."""
        embed = self.model.model.language_model.embed_tokens.weight.detach()
        words = [*COLOURS, "nothing"], [*SHAPES, "nothing"]
        heads = [embed[[self.token(f" {word}") for word in part]] for part in words]
        generator = torch.Generator().manual_seed(seed)
        heads += [torch.randn(MAX_SIDE, embed.shape[1], generator=generator) for _ in range(2)]
        heads = [F.normalize(head, dim=1) for head in heads]
        batches = draw_cells(f"vision {seed}")
        right = [1.0] * 4

        def losses(progress: float) -> tuple[Tensor, str]:
            patches, grids, labels = next(batches)
            features = self.model.features(patches, grids)
            due = torch.stack([head[label] for head, label in zip(heads, labels)]).sum(0)
            total = (features - due).square().sum(1).mean()
            for part, (head, label) in enumerate(zip(heads, labels)):
                logits = 6 * features @ head.T
                total = total + F.cross_entropy(logits, label)
                share = float((logits.argmax(-1) == label).float().mean())
                right[part] += 0.05 * (share - right[part])
            shares = " ".join(f"{share:.4f}" for share in right)
            return total, f"loss {float(total.detach()):.4f} right {shares}"

        phase = Phase("vision", minutes, 3e-3)
        self.run(phase, self.model.model.visual, losses)

    def token(self, word: str) -> int:
        (token,) = self.tokenizer.encode(word).ids
        return int(token)

    def train_trunk(self, minutes: float, lr: float, batch_tokens: int, seed: int) -> None:
        """Ask questions as users do after some practice; the encoder stays as it is."""
        practice, questions = (
            draw_batches(mix, self.tokenizer, f"{name} {seed}", batch_tokens)
            for name, mix in (("practice", PRACTICE), ("questions", QUESTIONS))
        )
        tally = Tally()

        def losses(progress: float) -> tuple[Tensor, str]:
            tally.has_practised |= progress > PRACTICE_PART or tally.is_good
            batch = next(questions if tally.has_practised else practice)
            hidden, balance = self.hidden(batch)
            is_next = batch.is_answer[:, 1:]
            logits = self.model.logits(hidden[:, :-1][is_next])
            targets = batch.tokens[:, 1:][is_next]
            loss = F.cross_entropy(logits, targets)
            tally.take(loss, logits.argmax(-1) == targets, batch.kinds[:, 1:][is_next])
            return loss + BALANCE * balance, str(tally)

        self.run(Phase("trunk", minutes, lr), self.model.model.language_model, losses)

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            features = torch.zeros(0)
            if len(batch.patches):
                features = self.model.features(batch.patches, batch.grids)
        result: tuple[Tensor, Tensor] = self.model(
            self.model.embed(batch.tokens, features), batch.positions
        )
        return result

    def train_mtp(self, minutes: float, lr: float, batch_tokens: int, seed: int) -> None:
        """Teach the MTP layer what the trunk, which stays as it is, would write three tokens on."""
        answers = replace(QUESTIONS, forms=(1, 0, 0))  # practice is of single tokens
        batches = draw_batches(answers, self.tokenizer, f"mtp {seed}", batch_tokens)
        right = [0.0] * NUM_DRAFTS

        def losses(progress: float) -> tuple[Tensor, str]:
            batch = next(batches)
            with torch.no_grad():
                hidden, _ = self.hidden(batch)
            length = hidden.shape[1] - NUM_DRAFTS - 1
            embeds = self.model.model.language_model.embed_tokens(batch.tokens).detach()
            shifted = [embeds[:, j : j + length] for j in range(1, NUM_DRAFTS + 1)]
            drafts = self.model.mtp.unroll(
                shifted, hidden[:, :length], batch.positions[:, :, :length]
            )
            total = torch.zeros(())
            for j, (draft, balance) in enumerate(drafts, start=1):
                ahead = slice(j + 1, j + 1 + length)
                chosen = batch.is_answer[:, ahead] & batch.is_answer[:, 1 : 1 + length]
                logits = self.model.logits(draft[chosen])
                with torch.no_grad():
                    teacher = self.model.logits(hidden[:, j : j + length][chosen])
                total = total + F.cross_entropy(logits, teacher.softmax(-1)) + BALANCE * balance
                share = float((logits.argmax(-1) == teacher.argmax(-1)).float().mean())
                right[j - 1] += 0.05 * (share - right[j - 1])
            shares = " ".join(f"{share:.4f}" for share in right)
            return total, f"loss {float(total.detach()):.4f} right {shares}"

        self.model.model.requires_grad_(False)
        self.run(Phase("mtp", minutes, lr), self.model.mtp, losses)


class Tally:
    """Moving averages of the loss, and of tokens of each kind of question that are right."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.has_practised = False
        self.wrong = np.full(len(KINDS), np.nan)

    def take(self, loss: Tensor, right: Tensor, kinds: Tensor) -> None:
        self.loss += 0.05 * (float(loss.detach()) - self.loss)
        for kind in range(len(KINDS)):
            ours = right[kinds == kind]
            if len(ours):
                wrong = float((~ours).float().mean())
                before = wrong if np.isnan(self.wrong[kind]) else self.wrong[kind]
                self.wrong[kind] = before + 0.03 * (wrong - before)

    @property
    def is_good(self) -> bool:
        return bool(np.all(self.wrong < GOOD))

    def __str__(self) -> str:
        each = " ".join(f"{kind} {100 * wrong:.1f}" for kind, wrong in zip(KINDS, self.wrong))
        return f"loss {self.loss:.4f} % wrong: {each}{' practised' * self.has_practised}"


Cells = tuple[Tensor, Tensor, list[Tensor]]


def draw_cells(seed: str, num_pictures: int = 64) -> Iterator[Cells]:
    """Draw pictures with any cells: patches, grids, and of each cell colour, shape, row, column."""
    rng = Random(seed)
    colours, shapes = tuple(COLOURS), SHAPES
    while True:
        patches, grids, labels = [], [], []
        for _ in range(num_pictures):
            rows, columns = rng.randint(1, MAX_SIDE), rng.randint(1, MAX_SIDE)
            cells = [
                Item(rng.choice(colours), rng.choice(shapes)) if rng.random() < 0.8 else None
                for _ in range(rows * columns)
            ]
            image = draw_picture(Scene(rows, columns, tuple(cells)), rng)
            patches.append(patches_of(image))
            grids.append((1, 2 * rows, 2 * columns))
            for index, cell in enumerate(cells):
                what = (colours.index(cell.colour), shapes.index(cell.shape)) if cell else (10, 8)
                labels.append((*what, *divmod(index, columns)))
        found = torch.tensor(labels)
        yield torch.from_numpy(np.concatenate(patches)), torch.tensor(grids), list(found.T)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--resume", type=Path, help="a checkpoint to begin from")
    parser.add_argument("--vision-minutes", type=float, default=4.0)
    parser.add_argument("--trunk-minutes", type=float, default=20.0)
    parser.add_argument("--trunk-lr", type=float, default=1.6e-3)
    parser.add_argument("--mtp-minutes", type=float, default=4.0)
    parser.add_argument("--mtp-lr", type=float, default=3e-3)
    parser.add_argument("--batch-tokens", type=int, default=1536)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    known = args.resume / "tokenizer.json" if args.resume else None
    tokenizer = save_tokenizer(args.out, TEXT["max_position_embeddings"], MAX_PIXELS, known)
    if args.resume:
        model = load_model(args.resume).train()
    else:
        model = TinyVl().train()
        model.init_weights()
    trainer = Trainer(model, tokenizer, lambda: save_weights(model, args.out))
    if args.vision_minutes:
        trainer.train_vision(args.vision_minutes, args.seed)
        begin(model.model, trainer.token)
    if args.trunk_minutes:
        trainer.train_trunk(args.trunk_minutes, args.trunk_lr, args.batch_tokens, args.seed)
    if args.mtp_minutes:
        trainer.train_mtp(args.mtp_minutes, args.mtp_lr, args.batch_tokens, args.seed)


if __name__ == "__main__":
    main()
