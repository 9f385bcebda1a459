"""GivenPrompt: what a user's prompt has, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass

from dp_runtime.core.plain_values import plain_str
from dp_runtime.core.request import ImagePrompt, TokensPrompt
from dp_runtime.errors import one_line, require, shown


@dataclass(frozen=True, eq=False)
class GivenPrompt:
    """Its fields, read once: attributes of a user's own kind may change."""

    field: str
    tokens: object  # text or token ids
    embeds: object = None
    positions: object = ()
    images: object = ()
    replay: object = None

    @property
    def has_places(self) -> bool:
        return self.embeds is not None or self.field == "text"

    @classmethod
    def read(cls, prompt: object) -> GivenPrompt:
        try:
            if isinstance(prompt, ImagePrompt):
                return cls("text", prompt.text, images=prompt.images)
            if not isinstance(prompt, TokensPrompt):
                return cls("prompt", prompt)
            own = prompt.token_ids, prompt.prompt_embeds, prompt.embed_positions
            given = cls("token_ids", *own, replay=prompt.replay_routed_experts)
        except Exception as error:  # of a user's own kind
            raise unreadable("prompt", prompt, error) from None
        text = plain_str(given.tokens)
        require(text is None, given.field, text, "token ids; a text is a prompt by itself")
        return given


def unreadable(field: str, value: object, error: Exception) -> ValueError:
    return ValueError(
        one_line(f"{field}: {shown(value)} can't be read: {type(error).__name__}: {error}", 400)
    )
