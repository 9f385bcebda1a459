"""Measures a checkpoint on held-out text: perplexity, draft agreement, speculative acceptance."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from examples.tiny_moe.model import load_model
from examples.tiny_moe.train import Drafting

HERE = Path(__file__).parent
END_OF_TEXT = "<|endoftext|>"
WINDOW = 512
PROMPTS = (
    "When an exception is raised inside the with statement, the context manager",
    "An object is considered immutable if",
    "Classes provide a means of bundling data and functionality together. Creating a new class "
    "creates a new type of object, allowing new instances of that type to be made. Each class "
    "instance can have attributes attached to it for maintaining its state.",
    "Python is an interpreted, interactive, object-oriented programming language. It incorporates "
    "modules, exceptions, dynamic typing, very high level dynamic data types, and classes. It "
    "supports multiple programming paradigms beyond object-oriented programming,",
    "Python is an interpreted language, which can save you considerable time during program "
    "development because no compilation and linking is necessary. The interpreter can be used "
    "interactively, which makes it easy to experiment with features of the language,",
)


@dataclass(frozen=True)
class Speculation:
    """What greedy speculative decoding of one prompt produced."""

    tokens: list[int]  # the continuation
    accepted: list[int]  # accepted drafts of each verification


def encode_documents(tokenizer: Tokenizer, path: Path) -> list[list[int]]:
    documents = path.read_text().split(f"\n{END_OF_TEXT}\n")
    end = tokenizer.encode(END_OF_TEXT).ids
    return [[*tokenizer.encode(document).ids, *end] for document in documents]


def windows_of(documents: list[list[int]]) -> Tensor:
    """[num_windows, WINDOW + 1] consecutive windows that share their boundary token."""
    ids = torch.tensor([i for document in documents for i in document])
    return ids.unfold(0, WINDOW + 1, WINDOW)


@torch.no_grad()
def mean_loss(model: Drafting, windows: Tensor) -> float:
    """Mean cross-entropy in nats a token."""
    losses = []
    for batch in windows.split(16):
        logits = model.logits(model(batch[:, :-1])[0])
        losses.append(
            F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        )
    return float(torch.stack(losses).sum()) / (windows.shape[0] * WINDOW)


@torch.no_grad()
def draft_agreement(model: Drafting, windows: Tensor, num_drafts: int) -> Tensor:
    """[num_drafts] share of positions where draft j is the trunk's greedy token, on true text."""
    hits = torch.zeros(num_drafts)
    length = WINDOW - num_drafts
    for batch in windows.split(16):
        hidden, _ = model(batch[:, :-1])
        greedy = model.logits(hidden).argmax(-1)
        embeds = model.model.embed_tokens(batch)
        shifted = [embeds[:, j : j + length] for j in range(1, num_drafts + 1)]
        for j, (draft, _) in enumerate(model.mtp.unroll(shifted, hidden[:, :length])):
            agree = model.mtp_logits(draft).argmax(-1) == greedy[:, j + 1 : j + 1 + length]
            hits[j] += agree.sum()
    return hits / (windows.shape[0] * length)


@torch.no_grad()
def greedy_tokens(model: Drafting, prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        hidden, _ = model(torch.tensor([tokens]))
        tokens.append(int(model.logits(hidden[:, -1]).argmax()))
    return tokens[len(prompt) :]


def propose(model: Drafting, tokens: list[int], hidden: Tensor, num_drafts: int) -> list[int]:
    """Drafts after tokens; hidden [1, len(tokens) - 1, hidden_size] covers all but the last one.

    Row i of the MTP layer's input is (embedding of token i+1, hidden state at i). Each draft adds
    a row whose hidden state is the layer's own output for the row before.
    """
    drafts: list[int] = []
    for _ in range(num_drafts):
        embeds = model.model.embed_tokens(torch.tensor([[*tokens, *drafts][1:]]))
        out = model.mtp(embeds, hidden)[:, -1:]
        drafts.append(int(model.mtp_logits(out).argmax()))
        hidden = torch.cat((hidden, out), dim=1)
    return drafts


def num_agreeing(drafts: list[int], greedy: list[int]) -> int:
    """How many leading drafts are what the trunk would have produced."""
    agree = [draft == token for draft, token in zip(drafts, greedy, strict=True)]
    return [*agree, False].index(False)


@torch.no_grad()
def speculate(model: Drafting, prompt: list[int], num_tokens: int, num_drafts: int) -> Speculation:
    """Greedy speculative decoding, everything recomputed at every step: slow and plain."""
    hidden, _ = model(torch.tensor([prompt]))
    tokens = [*prompt, int(model.logits(hidden[:, -1]).argmax())]
    accepted: list[int] = []
    while len(tokens) < len(prompt) + num_tokens:
        drafts = propose(model, tokens, hidden, num_drafts)
        verified, _ = model(torch.tensor([[*tokens, *drafts]]))
        greedy = model.logits(verified[0, len(tokens) - 1 :]).argmax(-1).tolist()
        count = num_agreeing(drafts, greedy[:-1])
        hidden = verified[:, : len(tokens) + count]
        tokens += greedy[: count + 1]
        accepted.append(count)
    return Speculation(tokens[len(prompt) :], accepted)


def evaluate_speculation(
    model: Drafting, documents: list[list[int]], args: argparse.Namespace
) -> None:
    long_enough = [d for d in documents if len(d) > args.prompt_tokens]
    runs = []
    for document in long_enough[: args.num_prompts]:
        prompt = document[: args.prompt_tokens]
        run = speculate(model, prompt, args.new_tokens, args.num_drafts)
        plain = greedy_tokens(model, prompt, args.new_tokens)
        assert run.tokens[: args.new_tokens] == plain, "speculation changed the text"
        runs.append(run)
    counts = torch.tensor([count for run in runs for count in run.accepted])
    histogram = torch.bincount(counts, minlength=args.num_drafts + 1).tolist()
    mean = float(counts.float().mean())
    print(f"speculation: {len(runs)} held-out prompts, {args.new_tokens} greedy tokens each")
    print(f"  {mean + 1:.3f} tokens a verification; accepted 0..{args.num_drafts}: {histogram}")


def check_against_transformers(checkpoint: Path, model: Drafting, windows: Tensor) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        theirs = reference(windows[:2, :-1]).logits
        ours = model.logits(model(windows[:2, :-1])[0])
    print(f"transformers: largest logit difference {float((theirs - ours).abs().max()):.2e}")


def parse_args(checkpoint: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint)
    parser.add_argument("--text", type=Path, default=HERE / "held_out.txt")
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--num-drafts", type=int, default=3)
    parser.add_argument("--transformers", action="store_true", help="compare logits with theirs")
    return parser.parse_args()


def evaluate(model: Drafting, args: argparse.Namespace) -> None:
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    documents = encode_documents(tokenizer, args.text)
    windows = windows_of(documents)
    loss = mean_loss(model, windows)
    bits = loss / math.log(2) * sum(map(len, documents)) / args.text.stat().st_size
    print(f"loss {loss:.4f}, perplexity {math.exp(loss):.2f}, {bits:.3f} bits a byte")
    agreement = draft_agreement(model, windows, args.num_drafts).tolist()
    print("draft agreement on true text:", " ".join(f"{share:.3f}" for share in agreement))
    if args.transformers:
        check_against_transformers(args.checkpoint, model, windows)
    evaluate_speculation(model, documents, args)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        print(f"> {prompt}|{tokenizer.decode(greedy_tokens(model, ids, 48))}")


def main() -> None:
    args = parse_args(HERE / "checkpoint")
    evaluate(load_model(args.checkpoint), args)


if __name__ == "__main__":
    main()
