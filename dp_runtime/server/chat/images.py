"""ChatImages: the images of a chat, from what a client sends to patches."""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dp_runtime.chat.messages import ImageUrl
from dp_runtime.core.request import PromptImage
from dp_runtime.engine.prompts.context_length import check_context
from dp_runtime.errors import not_allowed, require
from dp_runtime.metrics.status import ModelInfo
from dp_runtime.server.config import ServerConfig
from dp_runtime.vision.image_processor import ImageProcessor

FORMATS = {
    "image/png": "PNG", "image/jpeg": "JPEG", "image/jpg": "JPEG", "image/webp": "WEBP",
    "image/gif": "GIF", "image/bmp": "BMP",
}  # fmt: skip
MAX_HEAD, MAX_SHOWN = 100, 60  # characters of a URL
_HEAD = re.compile(r"data:(image/[a-z]+)(?:;[a-z]+=[^;,]*)*;base64,", re.IGNORECASE)
_ALLOWED = (
    "a URL of data, as data:image/png;base64,...: this server fetches nothing from elsewhere, "
    f"and reads {', '.join(FORMATS)}"
)


@dataclass(frozen=True, eq=False)
class ChatImages:
    """Decodes the images of chats, one after the other; a ValueError names message and part."""

    config: ServerConfig
    processor: ImageProcessor
    max_model_len: int

    @classmethod
    def of(cls, model: ModelInfo, config: ServerConfig) -> ChatImages | None:
        if model.images is None:
            return None
        processor = ImageProcessor(model.images, config.max_file_pixels)
        processor.warm_up()
        return cls(config, processor, model.max_model_len)

    @property
    def token_id(self) -> int:
        return self.processor.format.image_token_id

    def prepare(self, given: Sequence[ImageUrl], tokens: Sequence[int]) -> Sequence[PromptImage]:
        """Return a chat's images; ContextExceeded as soon as no prompt can hold them.

        tokens: the rendered chat's, which must have one for each image.
        """
        count = tokens.count(self.token_id)
        allowed = f"{len(given)}: one for each image, from the chat template and from no text"
        require(count == len(given), "messages", f"{count} tokens of images", allowed)
        most = self.config.max_images
        if len(given) > most:
            allowed = f"at most {most} (max_images)"
            raise not_allowed(given[most].field, f"{len(given)} images", allowed)
        images: list[PromptImage] = []
        num_tokens = 0
        for image in given:
            images.append(self._prepared(image))
            num_tokens += images[-1].num_tokens
            check_context(image.field, num_tokens, self.max_model_len)
        return tuple(images)

    def _prepared(self, image: ImageUrl) -> PromptImage:
        found = _HEAD.match(image.url[:MAX_HEAD])
        name = None if found is None else FORMATS.get(found[1].lower())
        if found is None or name is None:
            raise not_allowed(image.field, image.url[:MAX_SHOWN], _ALLOWED)
        return self.processor(image.field, self._decoded(image, found.end()), (name,))

    def _decoded(self, image: ImageUrl, start: int) -> bytes:
        most = self.config.max_image_bytes
        size = (len(image.url) - start) // 4 * 3
        allowed = f"at most {most:,} (max_image_bytes)"
        require(size <= most, image.field, f"{size:,} bytes", allowed)
        try:
            return b64decode(image.url[start:], validate=True)
        except (binascii.Error, ValueError) as error:  # the latter for what is not ASCII
            shown = image.url[start : start + MAX_SHOWN]
            raise not_allowed(image.field, shown, f"base64; {error}") from None


def has_images(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a chat may have some, before it is read."""
    contents = (message.get("content") for message in messages)
    return any(
        isinstance(part, dict) and part.get("type") == "image_url"
        for content in contents
        if isinstance(content, list)
        for part in content
    )
