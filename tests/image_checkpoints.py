"""Prompts with images for the tiny multimodal checkpoint, and what transformers makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from dp_runtime import ImagePrompt, RequestOutput
from tests.hybrid_checkpoints import IMAGE_SIZE, IMAGE_TOKEN, oracle
from tests.reference import Tokens, check_logprobs, near_ties

SIDE = 32  # pixels of a token's side
Part = Sequence[int] | Image.Image


def picture(rows: int, columns: int, seed: int = 0) -> Image.Image:
    """An image of noise that comes to so many rows and columns of tokens."""
    rng = np.random.default_rng((seed, rows, columns))
    pixels = rng.integers(0, 256, (SIDE * rows, SIDE * columns, 3), np.uint8)
    return Image.fromarray(pixels)


def tokenizer_of_letters() -> Tokenizer:
    """Letters from 1 on, and the tokens around and for an image."""
    places = {"<start>": 188, "<end>": 189, "<image>": IMAGE_TOKEN}
    vocabulary = {letter: at for at, letter in enumerate("_abcdefghijklmnopqrstuvwxyz")}
    tokenizer = Tokenizer(models.BPE(vocabulary | places, []))
    tokenizer.add_special_tokens(list(places))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("_", "never")
    tokenizer.decoder = decoders.Metaspace("_", "never")
    return tokenizer


@dataclass(frozen=True, eq=False)
class Pictured:
    """A prompt as a user gives it: token ids and images in their order."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, *parts: Part) -> Pictured:
        return cls(parts)

    @property
    def images(self) -> list[Image.Image]:
        return [part for part in self.parts if isinstance(part, Image.Image)]

    @property
    def prompt(self) -> ImagePrompt:
        return ImagePrompt(self.short, self.images)

    @property
    def short(self) -> Tokens:
        """Its token ids, with one for each image."""
        each = [[IMAGE_TOKEN] if isinstance(part, Image.Image) else part for part in self.parts]
        return tuple(token for part in each for token in part)

    @cached_property
    def processed(self) -> Any:
        """The pixels and grids of transformers' processor."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        half = [0.5] * 3
        sizes = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
        processor = Qwen2VLImageProcessorPil(
            size=IMAGE_SIZE, image_mean=half, image_std=half, **sizes
        )
        return processor(self.images, return_tensors="pt")

    @cached_property
    def spans(self) -> list[range]:
        """The positions of each image's tokens."""
        spans, at, grids = list[range](), 0, iter(self.processed["image_grid_thw"].tolist())
        for part in self.parts:
            count = len(part) if not isinstance(part, Image.Image) else np.prod(next(grids)) // 4
            if isinstance(part, Image.Image):
                spans.append(range(at, at + int(count)))
            at += int(count)
        return spans

    @cached_property
    def tokens(self) -> Tokens:
        spans, tokens = iter(self.spans if self.images else ()), list[int]()
        for part in self.parts:
            tokens += (
                [IMAGE_TOKEN] * len(next(spans)) if isinstance(part, Image.Image) else list(part)
            )
        return tuple(tokens)


class ImageReference:
    """transformers' model in float32: it computes features, positions and logits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model: Any = oracle(path)
        self._logits: dict[tuple[int, Tokens], Tensor] = {}

    def positions(self, pictured: Pictured) -> tuple[Tensor, int]:
        """[3, tokens] and the delta; neighbours count as image and video, which it tells apart."""
        kinds = torch.zeros(1, len(pictured.tokens), dtype=torch.int64)
        grids: dict[int, list[list[int]]] = {1: [], 2: []}
        given = pictured.processed["image_grid_thw"].tolist()
        for number, (span, grid) in enumerate(zip(pictured.spans, given, strict=True)):
            kind = 1 + number % 2
            kinds[0, span.start : span.stop] = kind
            grids[kind].append(grid)
        one, other = (torch.tensor(grids[kind]) if grids[kind] else None for kind in (1, 2))
        ids = torch.tensor([pictured.tokens])
        found, delta = self.model.model.get_rope_index(ids, kinds, one, other)
        return found[:, 0], int(delta)

    def logits(self, pictured: Pictured, outputs: Tokens = ()) -> Tensor:
        """Float32 logits [tokens, vocab] of a prompt and what came after it."""
        key = id(pictured), outputs
        if key not in self._logits:
            with torch.inference_mode():
                self._logits[key] = self._computed(pictured, outputs)
        return self._logits[key]

    def _computed(self, pictured: Pictured, outputs: Tokens) -> Tensor:
        text = self.model.model.language_model
        ids = torch.tensor([(*pictured.tokens, *outputs)])
        embeds, positions = text.embed_tokens(ids).clone(), torch.arange(ids.shape[1]).repeat(3, 1)
        if pictured.images:
            pixels, grids = (pictured.processed[n] for n in ("pixel_values", "image_grid_thw"))
            features = self.model.model.visual(pixels, grid_thw=grids).pooler_output
            embeds[0, [row for span in pictured.spans for row in span]] = features
            known, delta = self.positions(pictured)
            positions += delta
            positions[:, : known.shape[1]] = known
        states = text(inputs_embeds=embeds, position_ids=positions[:, None], use_cache=False)
        logits: Tensor = self.model.lm_head(states.last_hidden_state)[0]
        return logits

    def check(self, pictured: Pictured, output: RequestOutput) -> None:
        """Assert that an output is the greedy continuation, with its log probabilities."""
        assert output.prompt_token_ids == pictured.tokens
        logprobs = self.logits(pictured, output.token_ids).log_softmax(-1)
        count = len(pictured.tokens)
        ahead = logprobs[count - 1 : -1]
        assert list(near_ties(output.token_ids, ahead)) == []
        check_logprobs(output, ahead, logprobs[: count - 1])
