"""ImageEncoding: features of a step's images, computed before its passes read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.device_copy import all_on_device, on_device
from dp_runtime.core.request import ImageFormat
from dp_runtime.scheduler.image_slots import PlacedImage
from dp_runtime.vision.encoder import VisionEncoder
from dp_runtime.vision.patch_grid import PatchGrid


@dataclass(frozen=True, eq=False)
class ImageEncoding:
    """Runs the encoder on images that the scheduler has placed among `features`."""

    encoder: VisionEncoder
    format: ImageFormat
    features: Tensor  # [slots, hidden]

    max_tokens: int  # that are encoded at once, side by side; one image may have as many

    def encode(self, images: Sequence[PlacedImage]) -> float:
        """Encode images and keep their features; returns the host's seconds."""
        started = perf_counter()
        for some in self._batches(images):
            self._encode(some)
        return perf_counter() - started if images else 0.0

    def _batches(self, images: Sequence[PlacedImage]) -> Iterator[list[PlacedImage]]:
        batch, num_tokens = list[PlacedImage](), 0
        for one in images:
            if num_tokens + len(one.slots) > self.max_tokens:
                yield batch
                batch, num_tokens = [], 0
            batch.append(one)
            num_tokens += len(one.slots)
        if batch:
            yield batch

    def _encode(self, images: Sequence[PlacedImage]) -> None:
        patches = np.concatenate([one.image.patches for one in images])
        slots = np.concatenate([one.slots for one in images])
        raw, rows = all_on_device((patches, slots), self.features.device)
        side = self.format.merge_size
        grids = [PatchGrid(one.image.rows * side, one.image.columns * side) for one in images]
        self.features[rows] = self.encoder(self.normalised(raw), grids)

    @torch.inference_mode()
    def encode_most(self) -> None:
        """Encode as much as can be at once, and keep nothing of it."""
        side, values = self.format.merge_size, self.encoder.config.patch_values
        grid = PatchGrid(side, side * self.max_tokens)
        size, device = (grid.num_patches, values), self.features.device
        self.encoder(self.normalised(torch.zeros(size, dtype=torch.uint8, device=device)), [grid])

    def normalised(self, patches: Tensor) -> Tensor:
        """Rescale and centre each channel of [patches, values] uint8, in float32."""
        shape, device = (len(self.format.mean), 1), patches.device
        mean, std = (
            on_device(np.array(values, np.float32), device).view(shape)
            for values in (self.format.mean, self.format.std)
        )
        channels = patches.view(len(patches), shape[0], -1).float()
        return ((channels * self.format.rescale_factor - mean) / std).flatten(1)
