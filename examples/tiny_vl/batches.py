"""Batches to train on: conversations about pictures as tokens, patches and positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from dp_runtime.core.request import PromptImage
from dp_runtime.vision.rope_positions import rope_positions
from examples.tiny_vl.pictures import CELL, Scene, draw_picture
from examples.tiny_vl.questions import (
    IMAGE,
    KINDS,
    LETTERS,
    Asked,
    Question,
    ask,
    draw_scenes,
    posed,
)  # fmt: skip
from examples.tiny_vl.tokenizer import SPECIAL

Array = np.ndarray[Any, Any]
PATCH = CELL // 2
NUM_STATEMENTS = 20
LINES = ("row", "column")
END, PAD, IMAGE_TOKEN = (SPECIAL[t] for t in ("<|im_end|>", "<|endoftext|>", "<|image_pad|>"))


def patches_of(image: Image.Image) -> Array:
    """Cut a picture as the runtime's processor does: the four patches of a cell side by side."""
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // CELL, pixels.shape[1] // CELL
    cut = pixels.reshape(rows, 2, PATCH, columns, 2, PATCH, 3)
    return cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns * 4, 3 * PATCH * PATCH)


@dataclass(frozen=True)
class Mix:
    """How hard the conversations are."""

    num_turns: Sequence[float]  # weights of 1, 2, ... questions
    num_images: Sequence[float]  # weights of 1, 2, 3
    num_choices: Sequence[float]  # weights of none, and of any count of choices
    num_words: Sequence[float]  # weights of no context, up to 60 words, up to 1,000
    kinds: Mapping[str, float]
    forms: Sequence[float] = (1, 0, 0)  # weights of questions, and of two forms of practice


@dataclass(frozen=True)
class Conversation:
    tokens: Array  # [length]
    is_answer: Array  # [length] bool
    kinds: Array  # [length] int8, the kind of the question that is answered, else -1
    patches: Array  # [patches, 768] uint8
    grids: list[tuple[int, int]]  # rows and columns of tokens
    positions: Array  # [3, length]


@dataclass(frozen=True)
class Batch:
    tokens: Tensor  # [batch, length]; the last ones of each conversation are padding
    is_answer: Tensor  # [batch, length]
    kinds: Tensor  # [batch, length]
    patches: Tensor
    grids: Tensor  # [images, 3], of patches
    positions: Tensor  # [3, batch, length]


def draw_context_words(rng: Random, mix: Mix) -> int:
    match rng.choices(range(3), mix.num_words)[0]:
        case 0:
            return 0
        case 1:
            return rng.randint(1, 60)
        case _:
            return int(60 * 16.0 ** rng.random())


@dataclass(frozen=True)
class Script:
    """A conversation as texts: each given one is followed by one that the model is to write."""

    images: Sequence[Image.Image]
    given: Sequence[str]
    written: Sequence[str]
    kinds: Sequence[str]  # of the questions that are answered


def draw_script(rng: Random, mix: Mix) -> Script:
    scenes = draw_scenes(rng, rng.choices((1, 2, 3), mix.num_images)[0])
    images = tuple(draw_picture(scene, rng) for scene in scenes)
    draw = rng.choices((draw_turns, draw_statements, draw_letters), mix.forms)[0]
    return draw(rng, mix, scenes, images)


Images = tuple[Image.Image, ...]


def draw_asked(rng: Random, mix: Mix, scenes: Sequence[Scene]) -> tuple[str, Asked]:
    while True:
        (kind,) = rng.choices(tuple(mix.kinds), tuple(mix.kinds.values()))
        asked = ask(scenes, kind, rng)
        if asked is not None:
            return kind, asked


def draw_turns(rng: Random, mix: Mix, scenes: Sequence[Scene], images: Images) -> Script:
    """Draw questions as users ask them; the first one has the context."""
    count = rng.choices(range(1, len(mix.num_turns) + 1), mix.num_turns)[0]
    turns = list[Question]()
    while len(turns) < count:
        kind, asked = draw_asked(rng, mix, scenes)
        choices = rng.choices((0, rng.randint(2, 10)), mix.num_choices)[0]
        words = 0 if turns else draw_context_words(rng, mix)
        turns.append(posed(asked, kind, () if turns else images, rng, choices, words))
    kinds = [turn.kind for turn in turns]
    if count == 1 and rng.random() < 0.5:
        return Script(images, [turns[0].prompt], [f"\n{turns[0].answer}<|im_end|>"], kinds)
    begin = "<|im_start|>user\n"
    given = [f"{turn.prompt}<|im_end|>\n<|im_start|>assistant\n" for turn in turns]
    given = [begin + given[0], *(f"\n{begin}{text}" for text in given[1:])]
    return Script(images, given, [f"{turn.answer}<|im_end|>" for turn in turns], kinds)


def draw_statements(rng: Random, mix: Mix, scenes: Sequence[Scene], images: Images) -> Script:
    """Draw many short statements about pictures, to be completed: practice in looking."""
    stated = dict[str, tuple[str, str]]()
    for _ in range(NUM_STATEMENTS):
        kind, asked = draw_asked(rng, mix, scenes)
        if kind == "exists":  # as if it asked for something else
            continue
        *begun, last = asked.words.split() if kind in LINES else [asked.words]
        stated["".join([f"\nThe {asked.about}:", *(f" {word}" for word in begun)])] = kind, last
    given = list(stated)
    given[0] = IMAGE * len(images) + given[0]
    written = [f" {words}." for _, words in stated.values()]
    return Script(images, given, written, [kind for kind, _ in stated.values()])


def draw_letters(rng: Random, mix: Mix, scenes: Sequence[Scene], images: Images) -> Script:
    """Draw choices of which every one is right once: practice in finding the letter."""
    given, written, kinds = list[str](), list[str](), list[str]()
    while len(given) < NUM_STATEMENTS:
        kind, asked = draw_asked(rng, mix, scenes)
        question = posed(asked, kind, (), rng, context_words=0)
        lettered = list(zip(LETTERS, question.choices))
        rng.shuffle(lettered)
        head = f"\n{question.text}" if given else question.text
        for letter, choice in lettered:
            given.append(f"{head}\nThe {asked.about}: {choice}. Answer:")
            written.append(f" {letter}")
            kinds.append(kind)
            head = ""
    return Script((), given, written, kinds)


def conversation(script: Script, tokenizer: Tokenizer) -> Conversation:
    texts = [text for both in zip(script.given, script.written) for text in both]
    encoded = [e.ids for e in tokenizer.encode_batch(texts)]
    sizes = [(i.height // CELL, i.width // CELL) for i in script.images]
    tokens, is_answer, kinds, placed = list[int](), list[bool](), list[int](), list[PromptImage]()
    empty, order = np.zeros((0, 0), np.uint8), list(KINDS)
    for number, ids in enumerate(encoded):
        for token in ids:
            times = 1
            if token == IMAGE_TOKEN:
                rows, columns = sizes[len(placed)]
                placed.append(PromptImage(len(tokens), rows, columns, empty, b""))
                times = rows * columns
            tokens += [token] * times
        grown = len(tokens) - len(is_answer)
        is_answer += [number % 2 == 1] * grown
        kinds += [order.index(script.kinds[number // 2]) if number % 2 else -1] * grown
    patches = [np.zeros((0, 3 * PATCH * PATCH), np.uint8), *map(patches_of, script.images)]
    return Conversation(
        np.array(tokens), np.array(is_answer), np.array(kinds, np.int8),
        np.concatenate(patches), sizes, rope_positions(len(tokens), placed)[0],
    )  # fmt: skip


def batch_of(conversations: Sequence[Conversation]) -> Batch:
    longest = max(len(one.tokens) for one in conversations)

    def padded(rows: list[Array], value: int) -> Tensor:
        return torch.from_numpy(np.stack([
            np.pad(row, [(0, 0)] * (row.ndim - 1) + [(0, longest - row.shape[-1])],
                   constant_values=value)
            for row in rows
        ]))  # fmt: skip

    grids = [(1, 2 * r, 2 * c) for one in conversations for r, c in one.grids]
    return Batch(
        padded([one.tokens for one in conversations], PAD),
        padded([one.is_answer for one in conversations], 0),
        padded([one.kinds for one in conversations], -1),
        torch.from_numpy(np.concatenate([one.patches for one in conversations])),
        torch.tensor(grids),
        padded([one.positions for one in conversations], 0).transpose(0, 1),
    )


def draw_batches(
    mix: Mix, tokenizer: Tokenizer, seed: str, batch_tokens: int, pool: int = 512
) -> Iterator[Batch]:
    """Draw batches of at most so many tokens with padding: conversations of like length."""
    rng = Random(seed)
    while True:
        drawn = [conversation(draw_script(rng, mix), tokenizer) for _ in range(pool)]
        drawn.sort(key=lambda one: len(one.tokens))
        batches, batch = list[list[Conversation]](), list[Conversation]()
        for one in drawn:
            if batch and (len(batch) + 1) * len(one.tokens) > batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(one)
        batches.append(batch)
        rng.shuffle(batches)
        yield from map(batch_of, batches)
