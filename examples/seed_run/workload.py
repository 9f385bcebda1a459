"""The exam: multiple-choice questions about pictures as chats, as MMMU-Pro's are asked."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
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
    answer_tokens: int = ANSWER_TOKENS  # at most
    repeated_share: float = 0.1  # ask an earlier question once more, which caches may have
    endless_share: float = 0.1  # go on behind their answer, with a heavy tail of lengths
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Chat:
    messages: Sequence[Mapping[str, Any]]
    letter: str  # of the right choice
    kind: str  # of question
    num_images: int
    max_tokens: int = ANSWER_TOKENS
    is_endless: bool = False  # goes on behind its answer until it has them all

    @property
    def body(self) -> dict[str, Any]:
        """Return the request, without the model."""
        extra = {"return_token_ids": True, "ignore_eos": self.is_endless}
        return {
            "messages": self.messages, "temperature": 0.0, "max_tokens": self.max_tokens,
            "extra_body": extra,
        }  # fmt: skip


def draw_exam(shape: ExamShape) -> tuple[Chat, ...]:
    """Draw all chats; equal shapes make equal exams."""
    rng, chats = Random(f"exam {shape.seed}"), list[Chat]()
    new = (_chat(question) for question in draw_questions(shape.seed, shape.num_chats))
    while len(chats) < shape.num_chats:
        repeats = chats and rng.random() < shape.repeated_share
        chat = rng.choice(chats) if repeats else next(new)
        is_endless = rng.random() < shape.endless_share
        factor = rng.paretovariate(TAIL_ALPHA) if is_endless else 1
        max_tokens = min(MAX_TAIL, int(factor * shape.answer_tokens))
        chats.append(replace(chat, max_tokens=max_tokens, is_endless=is_endless))
    return tuple(chats)


def _chat(question: Question) -> Chat:
    content = [*_image_parts(question), {"type": "text", "text": question.text}]
    messages = [{"role": "user", "content": content}]
    return Chat(messages, question.letter, question.kind, len(question.images))


def _image_parts(question: Question) -> Iterator[dict[str, Any]]:
    for image in question.images:
        yield {"type": "image_url", "image_url": {"url": data_url(image)}}


def data_url(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
