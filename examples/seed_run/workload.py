"""The exam: multiple-choice questions about pictures as chats, as MMMU-Pro's are asked."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from random import Random
from typing import Any

from PIL import Image

from examples.tiny_vl.questions import Question, draw_questions

ANSWER_TOKENS = 64
TAIL_ALPHA, MAX_TAIL = 1.2, 512  # of the Pareto of how many tokens a chat goes on


@dataclass(frozen=True)
class ExamShape:
    """How many chats, and which share of them is out of the ordinary."""

    num_chats: int = 1730
    repeated_share: float = 0.1  # ask an earlier question once more, which caches may have
    endless_share: float = 0.1  # go on behind their answer, with a heavy tail of lengths
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Chat:
    body: Mapping[str, Any]  # of a request, without the model
    letter: str  # of the right choice
    kind: str  # of question
    num_images: int

    @property
    def max_tokens(self) -> int:
        return int(self.body["max_tokens"])

    @property
    def is_endless(self) -> bool:
        return bool(self.body["extra_body"]["ignore_eos"])


def draw_exam(shape: ExamShape) -> tuple[Chat, ...]:
    """Draw all chats; equal shapes make equal exams."""
    rng, chats = Random(f"exam {shape.seed}"), list[Chat]()
    new = (_chat(question) for question in draw_questions(shape.seed, shape.num_chats))
    while len(chats) < shape.num_chats:
        repeats = chats and rng.random() < shape.repeated_share
        chat = rng.choice(chats) if repeats else next(new)
        is_endless = rng.random() < shape.endless_share
        chats.append(_ending(chat, rng if is_endless else None))
    return tuple(chats)


def _ending(chat: Chat, rng: Random | None) -> Chat:
    """End with the answer, or go on behind it for a length that is drawn."""
    tail = 0 if rng is None else min(MAX_TAIL, int(ANSWER_TOKENS * rng.paretovariate(TAIL_ALPHA)))
    extra = {"return_token_ids": True, "ignore_eos": rng is not None}
    limits = {"max_tokens": max(ANSWER_TOKENS, tail), "extra_body": extra}
    return replace(chat, body={**chat.body, **limits})


def _chat(question: Question) -> Chat:
    content = [*_image_parts(question), {"type": "text", "text": question.text}]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0.0}
    return Chat(body, question.letter, question.kind, len(question.images))


def _image_parts(question: Question) -> Iterator[dict[str, Any]]:
    for image in question.images:
        yield {"type": "image_url", "image_url": {"url": data_url(image)}}


def data_url(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
