"""Questions about pictures, each with the right answer; with lettered choices, or none.

for question in draw_questions(seed=0, count=10):
    engine.generate([ImagePrompt(question.prompt, question.images)])  # question.letter
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
PLACES = [(row, column) for row in range(MAX_SIDE) for column in range(MAX_SIDE)]


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
        """What the model should write, such as "Image 1, star: red. Answer: B"."""
        sentence = f"{self.asked.about}: {self.asked.words}."
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
        assert (kind, num_images) != ("image", 1), "which image, of one"
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
    """Ask about one of the scenes, if it can be asked so."""
    if kind == "image":
        return ask_image(scenes, rng)
    number = rng.randrange(len(scenes)) + 1
    asked = ONE_SCENE[kind](scenes[number - 1], rng)
    if asked is None:
        return None
    asked = replace(asked, about=f"Image {number}, {asked.about}")
    if len(scenes) == 1:
        return asked
    return replace(asked, text=f"In image {number}, {asked.text[0].lower()}{asked.text[1:]}")


def ask_colour(scene: Scene, rng: Random) -> Asked | None:
    shapes = once(item.shape for _, item in scene.items())
    if not shapes:
        return None
    shape = rng.choice(shapes)
    colour = next(item.colour for _, item in scene.items() if item.shape == shape)
    spelt = rng.choice(("colour", "color"))
    text = rng.choice((f"What {spelt} is the {shape}?", f"Which {spelt} does the {shape} have?"))
    return Asked(text, shape, colour, tuple(COLOURS))


def ask_shape(scene: Scene, rng: Random) -> Asked | None:
    colours = once(item.colour for _, item in scene.items())
    if not colours:
        return None
    colour = rng.choice(colours)
    shape = next(item.shape for _, item in scene.items() if item.colour == colour)
    text = rng.choice((f"Which shape is {colour}?", f"What is the {colour} shape?"))
    return Asked(text, colour, shape, SHAPES)


def ask_count(scene: Scene, rng: Random) -> Asked:
    items = [item for _, item in scene.items()]
    match rng.randrange(5):
        case 0 | 1:
            shape = rng.choice([*(item.shape for item in items), *SHAPES[:2]])
            what, count = f"{shape}s", sum(item.shape == shape for item in items)
            if shape == "cross":
                what = "crosses"
        case 2 | 3:
            colour = rng.choice([*(item.colour for item in items), *("red", "blue")])
            what, count = f"{colour} shapes", sum(item.colour == colour for item in items)
        case _:
            what, count = "shapes", len(items)
    text = rng.choice((f"How many {what} are there?", f"How many {what} do you see?"))
    return Asked(text, what, str(count), COUNTS)


def ask_position(scene: Scene, rng: Random) -> Asked | None:
    items = once(item for _, item in scene.items())
    if not items:
        return None
    item = rng.choice(items)
    place = next(at for at, other in scene.items() if other == item)
    others = [named(other) for other in PLACES]
    return Asked(f"Where is the {described(item)}?", described(item), named(place), others)


def ask_place(scene: Scene, rng: Random) -> Asked:
    places = [divmod(index, scene.columns) for index in range(len(scene.cells))]
    filled = [place for place, _ in scene.items()]
    place = rng.choice(filled if rng.random() < 0.85 else places)
    item = dict(scene.items()).get(place)
    seen = [described(other) for _, other in scene.items()]
    drawn = [f"{rng.choice(tuple(COLOURS))} {rng.choice(SHAPES)}" for _ in range(12)]
    words = described(item) if item else "nothing"
    text = rng.choice(("What is in {}?", "What do you see in {}?")).format(named(place))
    return Asked(text, named(place), words, [*seen, *drawn, "nothing"])


def ask_exists(scene: Scene, rng: Random) -> Asked:
    items = [item for _, item in scene.items()]
    item = rng.choice(items)
    if rng.random() < 0.5:  # a colour and a shape that there are, mostly, not always together
        item = Item(rng.choice(items).colour, rng.choice(SHAPES))
    text = f"Is there {article(item.colour)} {described(item)}?"
    return Asked(text, described(item), "yes" if item in items else "no", ("yes", "no"))


def ask_image(scenes: Sequence[Scene], rng: Random) -> Asked | None:
    """Ask which image has a shape that no other has."""
    having = [frozenset(item.shape for _, item in scene.items()) for scene in scenes]
    shapes = once(shape for shapes in having for shape in sorted(shapes))
    if len(scenes) == 1 or not shapes:
        return None
    shape = rng.choice(shapes)
    index = next(i for i, shapes in enumerate(having) if shape in shapes)
    names = [f"image {number}" for number in range(1, len(scenes) + 1)]
    return Asked(f"Which image has a {shape}?", f"Image of {shape}", names[index], names)


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


ONE_SCENE: dict[str, Callable[[Scene, Random], Asked | None]] = {
    "colour": ask_colour, "shape": ask_shape, "count": ask_count, "position": ask_position,
    "place": ask_place, "exists": ask_exists,
}  # fmt: skip
KINDS = (*ONE_SCENE, "image")
