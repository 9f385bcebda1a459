"""Questions about pictures, each with the right answer; with lettered choices, or none.

for question in draw_questions(seed=0, count=10):
    engine.generate([ImagePrompt(question.prompt, question.images)])  # question.letter
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from PIL import Image

from examples.tiny_vl.pictures import (
    COLOURS,
    MAX_SIDE,
    SHAPES,
    Item,
    Place,
    Scene,
    draw_picture,
    draw_scene,
)
from examples.tiny_vl.sentences import draw_context, heavy_tailed_words

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
LETTERS = "ABCDEFGHIJ"
MAX_IMAGES = 3
T = TypeVar("T")
COUNTS = tuple(str(count) for count in range(10))
MAX_COUNT = 3


@dataclass(frozen=True)
class Asked:
    """A question about some scenes: what it is about, and the words of its answer."""

    text: str
    about: str
    words: str
    others: Sequence[str]  # wrong answers


@dataclass(frozen=True, eq=False)
class Question:
    """A question as a user sends it: images, then a text."""

    kind: str
    images: tuple[Image.Image, ...]
    context: str  # sentences before the question that do not matter, or nothing
    asked: Asked
    choices: tuple[str, ...]  # in the order of their letters; empty: none are given
    separator: str  # before each choice

    @property
    def letter(self) -> str:
        """The letter of the right choice, or nothing without choices."""
        return LETTERS[self.choices.index(self.asked.words)] if self.choices else ""

    @property
    def text(self) -> str:
        """Context, question and choices, without the images."""
        lettered = zip(LETTERS, self.choices)
        head = f"{self.context}{self.separator}" if self.context else ""
        return head + self.asked.text + "".join(f"{self.separator}{a}. {c}" for a, c in lettered)

    @property
    def prompt(self) -> str:
        """The text behind the tokens that stand for its images."""
        return IMAGE * len(self.images) + self.text

    @property
    def answer(self) -> str:
        """What the model should write, such as "The star: red. Answer: B"."""
        sentence = f"The {self.asked.about}: {self.asked.words}."
        return f"{sentence} Answer: {self.letter}" if self.choices else sentence


def letter_in(answer: str) -> str:
    """The letter that an answer gives, or nothing."""
    found = re.search(r"Answer: ([A-J])\b", answer)
    return found[1] if found else ""


def draw_questions(seed: int, count: int) -> Iterator[Question]:
    """Draw multiple-choice questions; each depends on the seed and its own number alone."""
    for number in range(count):
        yield draw_question(Random(f"{seed} {number}"))


def draw_question(
    rng: Random,
    *,
    kind: str | None = None,
    num_images: int | None = None,
    num_choices: int | None = None,
    context_words: int | None = None,
) -> Question:
    """Draw one question; what is not given is drawn too.

    num_choices: at most; there are fewer where there are fewer answers, as with yes and no.
    """
    while True:
        scenes = draw_scenes(rng, num_images)
        chosen = kind or rng.choice(tuple(KINDS))
        asked = ask(scenes, chosen, rng)
        if asked is not None:
            break
        assert kind != "place" or num_images in (None, 1), "a place of several images"
    images = tuple(draw_picture(scene, rng) for scene in scenes)
    return posed(asked, chosen, images, rng, num_choices, context_words)


def draw_scenes(rng: Random, num_images: int | None = None) -> list[Scene]:
    count = num_images or rng.choices((1, 2, 3), (6, 3, 1))[0]
    assert count <= MAX_IMAGES, f"{count} images"
    return [draw_scene(rng) for _ in range(count)]


def posed(
    asked: Asked,
    kind: str,
    images: tuple[Image.Image, ...],
    rng: Random,
    num_choices: int | None = None,
    context_words: int | None = None,
) -> Question:
    """Give a question choices (none if 0) and a context."""
    if num_choices is None:
        num_choices = rng.randint(2, len(LETTERS))
    words = heavy_tailed_words(rng) if context_words is None else context_words
    others = dict.fromkeys(other for other in asked.others if other != asked.words)
    wrong = rng.sample(tuple(others), min(len(others), max(0, num_choices - 1)))
    choices = [asked.words, *wrong] if num_choices else []
    rng.shuffle(choices)
    separator = "\n" if rng.random() < 0.7 else " "
    context = draw_context(rng, words)
    return Question(kind, images, context, asked, tuple(choices), separator)


def ask(scenes: Sequence[Scene], kind: str, rng: Random) -> Asked | None:
    """Ask about all that the scenes show, if it can be asked so."""
    return KINDS[kind](scenes, rng)


def ask_colour(scenes: Sequence[Scene], rng: Random) -> Asked | None:
    shapes = once(item.shape for item in items_of(scenes))
    if not shapes:
        return None
    shape = rng.choice(shapes)
    colour = next(item.colour for item in items_of(scenes) if item.shape == shape)
    spelt = rng.choice(("colour", "color"))
    text = rng.choice((f"What {spelt} is the {shape}?", f"Which {spelt} does the {shape} have?"))
    return Asked(text, shape, colour, tuple(COLOURS))


def ask_shape(scenes: Sequence[Scene], rng: Random) -> Asked | None:
    colours = once(item.colour for item in items_of(scenes))
    if not colours:
        return None
    colour = rng.choice(colours)
    shape = next(item.shape for item in items_of(scenes) if item.colour == colour)
    text = rng.choice((f"Which shape is {colour}?", f"What is the {colour} shape?"))
    return Asked(text, colour, shape, SHAPES)


def ask_count(scenes: Sequence[Scene], rng: Random) -> Asked | None:
    items = items_of(scenes)
    if rng.random() < 0.5:
        shape = rng.choice([*(item.shape for item in items), *SHAPES[:2]])
        what, count = plural(shape), sum(item.shape == shape for item in items)
    else:
        colour = rng.choice([*(item.colour for item in items), "red", "blue"])
        what, count = f"{colour} shapes", sum(item.colour == colour for item in items)
    text = rng.choice((f"How many {what} are there?", f"How many {what} do you see?"))
    return Asked(text, what, str(count), COUNTS) if count <= MAX_COUNT else None


def ask_row(scenes: Sequence[Scene], rng: Random) -> Asked | None:
    return ask_line(scenes, rng, "row", 0)


def ask_column(scenes: Sequence[Scene], rng: Random) -> Asked | None:
    return ask_line(scenes, rng, "column", 1)


def ask_line(scenes: Sequence[Scene], rng: Random, line: str, axis: int) -> Asked | None:
    items = once(item for item in items_of(scenes))
    if not items:
        return None
    item = rng.choice(items)
    places = [at for scene in scenes for at, other in scene.items() if other == item]
    lines = [f"{line} {number + 1}" for number in range(MAX_SIDE)]
    text = f"Which {line} is the {described(item)} in?"
    return Asked(text, described(item), lines[places[0][axis]], lines)


def ask_place(scenes: Sequence[Scene], rng: Random) -> Asked | None:
    """Ask what is at a place of a picture, if there is one picture alone."""
    if len(scenes) > 1:
        return None
    (scene,) = scenes
    places = [divmod(index, scene.columns) for index in range(len(scene.cells))]
    filled = [place for place, _ in scene.items()]
    place = rng.choice(filled if rng.random() < 0.85 else places)
    item = dict(scene.items()).get(place)
    seen = [described(other) for other in items_of(scenes)]
    drawn = [f"{rng.choice(tuple(COLOURS))} {rng.choice(SHAPES)}" for _ in range(12)]
    words = described(item) if item else "nothing"
    text = rng.choice(("What is in {}?", "What do you see in {}?")).format(named(place))
    return Asked(text, named(place), words, [*seen, *drawn, "nothing"])


def ask_exists(scenes: Sequence[Scene], rng: Random) -> Asked:
    items = items_of(scenes)
    item = rng.choice(items)
    if rng.random() < 0.5:  # a colour and a shape that there are, mostly, not always together
        item = Item(rng.choice(items).colour, rng.choice(SHAPES))
    text = f"Is there {article(item.colour)} {described(item)}?"
    return Asked(text, described(item), "yes" if item in items else "no", ("yes", "no"))


def items_of(scenes: Sequence[Scene]) -> list[Item]:
    return [item for scene in scenes for _, item in scene.items()]


def once(values: Iterator[T]) -> list[T]:
    """Keep those that come a single time."""
    return [value for value, count in Counter(values).items() if count == 1]


def named(place: Place) -> str:
    row, column = place
    return f"row {row + 1} column {column + 1}"


def described(item: Item) -> str:
    return f"{item.colour} {item.shape}"


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def plural(shape: str) -> str:
    return f"{shape}{'es' if shape.endswith('s') else 's'}"


KINDS: dict[str, Callable[[Sequence[Scene], Random], Asked | None]] = {
    "colour": ask_colour, "shape": ask_shape, "count": ask_count, "row": ask_row,
    "column": ask_column, "place": ask_place, "exists": ask_exists,
}  # fmt: skip
