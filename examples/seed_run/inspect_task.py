"""The same exam as a task of inspect-ai, another client of OpenAI's endpoint.

    VLLM_BASE_URL=$URL/v1 VLLM_API_KEY=none inspect eval examples/seed_run/inspect_task.py \
        --model vllm/NAME --max-connections 64
"""

from __future__ import annotations

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser, ContentImage, ContentText, GenerateConfig
from inspect_ai.scorer import answer
from inspect_ai.solver import generate

from examples.seed_run.workload import ANSWER_TOKENS, data_url
from examples.tiny_vl.questions import Question, draw_questions


@task  # type: ignore[untyped-decorator]  # the library is not installed with ours
def pictures(count: int = 200, seed: int = 0) -> Task:
    samples = [_sample(question) for question in draw_questions(seed, count)]
    return Task(
        MemoryDataset(samples),
        solver=generate(),
        scorer=answer("letter"),
        config=GenerateConfig(temperature=0.0, max_tokens=ANSWER_TOKENS),
    )


def _sample(question: Question) -> Sample:
    images = [ContentImage(image=data_url(image)) for image in question.images]
    content = [*images, ContentText(text=question.text)]
    return Sample([ChatMessageUser(content=content)], target=question.letter)
