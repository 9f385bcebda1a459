"""Asks a checkpoint held-out questions, as a user would, and counts right answers by kind.

python -m examples.tiny_vl.evaluate --num-questions 700 --drafts 3
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dp_runtime import Engine, EngineConfig, ImagePrompt, RequestOutput, SamplingParams
from examples.tiny_vl.questions import KINDS, Question, draw_questions, letter_in

CHECKPOINT = Path(__file__).parent / "checkpoint"
HELD_OUT_SEED = 1_000_000  # training draws with other seeds
PARAMS = SamplingParams(temperature=0.0, max_tokens=24)


def config_of(checkpoint: Path = CHECKPOINT, **fields: object) -> EngineConfig:
    given: dict[str, object] = {"device": "cpu", "launcher": "thread", "dtype": "float32"}
    return EngineConfig(str(checkpoint), **given | fields)  # type: ignore[arg-type]


def answers(engine: Engine, questions: Sequence[Question]) -> list[RequestOutput]:
    prompts = [ImagePrompt(question.prompt, question.images) for question in questions]
    return engine.generate(prompts, PARAMS, show_progress=True)


def is_right(question: Question, output: RequestOutput) -> bool:
    return letter_in(output.text) == question.letter


def table(questions: Sequence[Question], outputs: Sequence[RequestOutput]) -> str:
    """Tell the share of right letters: by kind, by images, and by the length of the prompt."""
    asked, right = Counter[tuple[int, str]](), Counter[tuple[int, str]]()
    for question, output in zip(questions, outputs, strict=True):
        length = len(output.prompt_token_ids)
        lengths = next(name for limit, name in LENGTHS if length < limit)
        keys = (
            (0, "all"),
            (1 + list(KINDS).index(question.kind), question.kind),
            (20 + len(question.images), f"{len(question.images)} images"),
            (30 + len(lengths), lengths),
        )
        asked.update(keys)
        right.update(keys if is_right(question, output) else ())
    return "\n".join(
        f"{name:24s} {right[order, name]:5d} of {count:5d}  {right[order, name] / count:7.2%}"
        for (order, name), count in sorted(asked.items())
    )


LENGTHS = ((128, "< 128 tokens"), (512, "< 512  tokens"), (10**9, "512 tokens or more"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--num-questions", type=int, default=700)
    parser.add_argument("--dp-size", type=int, default=1)
    parser.add_argument("--drafts", type=int, default=0, help="of the MTP layer, a step")
    parser.add_argument("--show", type=int, default=5, help="mistakes to show")
    args = parser.parse_args()
    questions = list(draw_questions(HELD_OUT_SEED, args.num_questions))
    drafts = {"speculative_num_steps": args.drafts} if args.drafts else {}
    with Engine(config_of(args.checkpoint, dp_size=args.dp_size, **drafts)) as engine:
        outputs = answers(engine, questions)
        print(engine.report())
    print(table(questions, outputs))
    wrong = [pair for pair in zip(questions, outputs) if not is_right(*pair)]
    for question, output in wrong[: args.show]:
        print(f"{question.text[-200:]!r}: {output.text!r}, not {question.answer!r}")


if __name__ == "__main__":
    main()
