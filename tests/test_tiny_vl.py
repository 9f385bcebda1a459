"""The tiny model that reads pictures answers held-out questions right, over two ranks."""

from __future__ import annotations

from dp_runtime import Engine
from examples.tiny_vl.evaluate import HELD_OUT_SEED, answers, config_of, is_right, table
from examples.tiny_vl.questions import draw_questions


def test_it_answers_questions_about_pictures() -> None:
    questions = list(draw_questions(HELD_OUT_SEED, 20))
    with Engine(config_of(dp_size=2, speculative_num_steps=3)) as engine:
        outputs = answers(engine, questions)
    print(table(questions, outputs))
    assert sum(map(is_right, questions, outputs)) >= 18
