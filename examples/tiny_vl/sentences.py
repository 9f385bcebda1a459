"""Sentences that have nothing to do with a picture, of which a question may have many before it."""

from __future__ import annotations

from random import Random

MAX_WORDS = 1_000
WHO = ("The clerk", "A driver", "The teacher", "My neighbour", "The captain", "A farmer",
       "The doctor", "Her brother", "The editor", "A tourist", "The painter",
       "Our guide")  # fmt: skip
DID = ("carried", "sold", "found", "lost", "repaired", "painted", "borrowed", "forgot", "opened",
       "moved", "bought", "showed")  # fmt: skip
WHAT = ("box", "lamp", "letter", "map", "coat", "clock", "chair", "basket", "ticket", "book",
        "bicycle", "window")  # fmt: skip
HOW = ("heavy", "old", "small", "new", "broken", "cheap", "wooden", "large", "red", "blue",
       "green", "black")  # fmt: skip
WHERE = ("at the station", "near the river", "in the market", "behind the school", "on the bridge",
         "at the harbour", "in the library", "outside the town", "on the train", "in the garden",
         "by the square", "under the star")  # fmt: skip
WHEN = ("in the morning", "last night", "before noon", "after the rain", "on Monday",
        "in the winter", "at 7", "for 3 days", "during the meeting", "two years ago",
        "in the evening", "without a word")  # fmt: skip


def draw_sentence(rng: Random) -> str:
    who, did, what, how, where, when = (rng.choice(w) for w in (WHO, DID, WHAT, HOW, WHERE, WHEN))
    match rng.randrange(4):
        case 0:
            return f"{who} {did} a {how} {what} {where} {when}."
        case 1:
            return f"{who} {did} the {what} {when}."
        case 2:
            return f"There was a {what} {where}, and it was {how}."
        case _:
            return f"{who} said that the {how} {what} was {where}."


def draw_context(rng: Random, num_words: int) -> str:
    """Draw whole sentences until there are so many words."""
    sentences, count = list[str](), 0
    while count < num_words:
        sentences.append(draw_sentence(rng))
        count += sentences[-1].count(" ") + 1
    return " ".join(sentences)


def heavy_tailed_words(rng: Random) -> int:
    """Draw a length: mostly none or few words, seldom very many (Pareto, alpha 1.1)."""
    if rng.random() < 0.4:
        return 0
    return min(MAX_WORDS, int(10 * rng.paretovariate(1.1)))
