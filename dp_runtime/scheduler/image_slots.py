"""ImageSlots: which images' features a rank keeps, and which a step must encode first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dp_runtime.core.batch import Int64
from dp_runtime.core.request import PromptImage


@dataclass(frozen=True, eq=False)
class PlacedImage:
    image: PromptImage
    slots: Int64  # [tokens] in the pool of features


@dataclass(frozen=True, eq=False)
class PromptSlots:
    positions: Int64  # [image tokens]
    values: Int64  # [image tokens] slots


@dataclass(frozen=True, eq=False)
class ChunkImages:
    num_rows: int  # that the chunk may have
    slots: PromptSlots | None = None  # of images that these reach; None: of none
    to_encode: tuple[PlacedImage, ...] = ()  # before the step's passes


class ImageSlots:
    """The slots of a rank's pool of image features, by the images' digests.

    Features can be computed anew, so any go but those of the step: the least recently used first.
    """

    def __init__(self, num_slots: int, drafts: bool) -> None:
        self._drafts = drafts  # a draft model's row reads what stands for the next token
        self._num_slots = num_slots
        self.clear()

    def clear(self) -> None:
        """Forget all images: the steps that were to encode some may not have run."""
        self._free = np.arange(self._num_slots)
        self._slots: OrderedDict[bytes, Int64] = OrderedDict()  # least recently used first
        self.begin_step()

    def begin_step(self) -> None:
        self._used: set[bytes] = set()  # in this step
        self._is_first = True  # no chunk of the step has rows yet

    def of_chunk(
        self, images: Sequence[PromptImage], start: int, num_rows: int, budget: int
    ) -> ChunkImages:
        """Find the slots of a chunk's images, and cut the chunk before one that must wait.

        Encoding takes an image's tokens of the budget, and its rows take them once more. What the
        first chunk of a step begins with is encoded however large it is.
        """
        reached, encoded = list[PlacedImage](), list[PlacedImage]()
        for image in images:
            if image.end <= start:
                continue
            before = image.start - self._drafts - start  # rows that do not read it
            if before >= num_rows:
                break
            slots = self._slots.get(image.digest)
            if slots is None:
                left = max(1, budget - image.num_tokens)  # rows, once it is encoded
                waits = before >= left or (image.num_tokens > budget and not self._is_first)
                slots = None if waits else self._take(image.num_tokens)
                if slots is None:
                    num_rows = max(0, before)
                    break
                encoded.append(PlacedImage(image, slots))
                budget -= image.num_tokens
                num_rows = min(num_rows, left)
            self._use(image.digest, slots)
            reached.append(PlacedImage(image, slots))
        self._is_first &= not num_rows
        return ChunkImages(num_rows, _joined(reached), tuple(encoded))

    def check(self) -> None:
        held = np.concatenate([self._free, *self._slots.values()])
        assert np.array_equal(np.sort(held), np.arange(self._num_slots)), "slots are lost or shared"

    def _take(self, count: int) -> Int64 | None:
        """Take slots for an image that is not there; None if the step's other images hold them."""
        assert 2 * count <= self._num_slots, f"an image of {count} tokens, {self._num_slots} slots"
        idle = sum(len(slots) for key, slots in self._slots.items() if key not in self._used)
        if count > len(self._free) + idle:
            return None
        while count > len(self._free):
            oldest = next(digest for digest in self._slots if digest not in self._used)
            self._free = np.concatenate((self._free, self._slots.pop(oldest)))
        slots, self._free = self._free[:count], self._free[count:]
        return slots

    def _use(self, digest: bytes, slots: Int64) -> None:
        self._slots[digest] = slots
        self._slots.move_to_end(digest)
        self._used.add(digest)


def _joined(placed: Sequence[PlacedImage]) -> PromptSlots | None:
    if not placed:
        return None
    positions = [np.arange(one.image.start, one.image.end) for one in placed]
    return PromptSlots(np.concatenate(positions), np.concatenate([one.slots for one in placed]))
