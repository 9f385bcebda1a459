"""Which images a step encodes, and where their features lie: cuts, budgets, and who goes first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.scheduler.image_slots import ChunkImages, ImageSlots
from tests.dp_runtime.prompt_images import prompt_image

BUDGET = 100


def step(slots: ImageSlots, *starts: int, seed: int = 0, rows: int = 50) -> ChunkImages:
    """A step with one chunk over images of 4 tokens."""
    images = [prompt_image(2, 2, start, seed + number) for number, start in enumerate(starts)]
    slots.begin_step()
    return slots.of_chunk(images, 0, rows, BUDGET)


def test_an_image_is_encoded_once_while_it_stays() -> None:
    slots = ImageSlots(8, drafts=False)
    first = step(slots, 3)
    assert [len(one.slots) for one in first.to_encode] == [4]
    again = step(slots, 9)
    assert again.to_encode == ()
    assert first.slots is not None
    assert again.slots is not None
    assert again.slots.values.tolist() == first.slots.values.tolist()
    assert again.slots.positions.tolist() == [9, 10, 11, 12]


def test_the_least_recently_used_goes() -> None:
    slots = ImageSlots(12, drafts=False)
    for seed in (0, 1, 2, 0, 3):  # the last takes the place of 1
        step(slots, 0, seed=seed)
    assert [len(step(slots, 0, seed=seed).to_encode) for seed in (0, 2, 3, 1)] == [0, 0, 0, 1]
    slots.clear()
    assert len(step(slots, 0, seed=0).to_encode) == 1
    slots.check()


@pytest.mark.parametrize("drafts", [False, True])
def test_a_chunk_ends_before_an_image_that_has_no_room(drafts: bool) -> None:
    """A draft model's row reads what stands for the next token: it ends a row before."""
    slots = ImageSlots(8, drafts)
    chunk = step(slots, 5, 12, 20)
    assert chunk.num_rows == 20 - drafts
    assert [one.image.start for one in chunk.to_encode] == [5, 12]
    others = slots.of_chunk([prompt_image(2, 2, 1, seed=9)], 0, 30, BUDGET)
    assert (others.num_rows, others.slots) == (1 - drafts, None)


def test_a_draft_model_has_the_image_behind_a_chunk() -> None:
    images = [prompt_image(2, 2, 6)]
    for drafts in (False, True):
        slots = ImageSlots(8, drafts)
        chunk = slots.of_chunk(images, 0, 6, BUDGET)
        assert (chunk.num_rows, len(chunk.to_encode)) == (6, drafts)


def test_encoding_takes_its_part_of_the_budget() -> None:
    slots = ImageSlots(100, drafts=False)
    images = [prompt_image(2, 5, 2), prompt_image(1, 9, 14, 1), prompt_image(3, 3, 30, 2)]
    chunk = slots.of_chunk(images, 0, 25, 25)
    assert [one.image.num_tokens for one in chunk.to_encode] == [10]
    assert chunk.num_rows == 14, "15 are left, but not for the second image"
    assert slots.of_chunk(images, 14, 11, 8).num_rows == 0, "another image waits for its turn"
    slots.begin_step()
    assert slots.of_chunk(images, 14, 11, 8).num_rows == 1, "the first of a step is as large as any"


def test_a_draft_model_may_need_two_images_at_once() -> None:
    """The last token of one, and the first of the next behind it: the step's first gets both."""
    images = [prompt_image(2, 3), prompt_image(2, 2, 6)]
    slots = ImageSlots(12, drafts=True)
    chunk = slots.of_chunk(images, 5, 3, 3)
    assert (chunk.num_rows, len(chunk.to_encode)) == (1, 2)
    assert slots.of_chunk([prompt_image(1, 2, 0, 7)], 0, 3, 1).num_rows == 0


def test_an_image_that_never_fits_is_an_error() -> None:
    slots = ImageSlots(7, drafts=False)
    with pytest.raises(AssertionError, match="an image of 4 tokens, 7 slots"):
        step(slots, 0)


@settings(deadline=None, max_examples=40)
@given(
    drafts=st.booleans(), num_slots=st.integers(12, 30), budget=st.integers(1, 40),
    prompts=st.lists(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 3),
                                        st.integers(0, 2)), max_size=6), min_size=1, max_size=4),
)  # fmt: skip
def test_every_prompt_gets_through(
    drafts: bool, num_slots: int, budget: int, prompts: list[list[tuple[int, int, int, int]]]
) -> None:
    """In order, with what each chunk needs in its slots and no slot of two images."""
    slots, waiting = ImageSlots(num_slots, drafts), []
    for prompt in prompts:
        images, at = [], 0
        for rows, columns, gap, seed in prompt:
            images.append(prompt_image(rows, columns, at + gap, seed))
            at = images[-1].end
        waiting.append((images, at + 2))
    done, content = [0] * len(waiting), dict[int, tuple[bytes, int]]()
    for _ in range(1000):
        slots.begin_step()
        left, advanced = budget, False
        for index, (images, length) in enumerate(waiting):
            if not left or done[index] == length:
                continue
            start, count = done[index], min(length - done[index], left)
            chunk = slots.of_chunk(images, start, count, left)
            assert 0 <= chunk.num_rows <= count
            for one in chunk.to_encode:
                content |= {s: (one.image.digest, n) for n, s in enumerate(one.slots.tolist())}
            due = {
                image.start + n: (image.digest, n)
                for image in images for n in range(image.num_tokens)
                if start <= image.start + n < start + chunk.num_rows + drafts
            }  # fmt: skip
            found = {} if chunk.slots is None or not chunk.num_rows else {
                position: content[slot] for position, slot in
                zip(chunk.slots.positions.tolist(), chunk.slots.values.tolist())
            }  # fmt: skip
            assert not chunk.num_rows or due.items() <= found.items()
            advanced |= chunk.num_rows > 0
            done[index] += chunk.num_rows
            encoded = sum(one.image.num_tokens for one in chunk.to_encode)
            left = max(0, left - chunk.num_rows - encoded)
            slots.check()
        if all(count == length for count, (_, length) in zip(done, waiting)):
            return
        assert advanced, "the first prompt always goes on"
    raise AssertionError("prompts are not through after 1000 steps")
