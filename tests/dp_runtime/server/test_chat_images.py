"""Chats with images: answers are those of the Python API, and bad images are one clear 400 each."""

from __future__ import annotations

import re
import zlib
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import httpx
import pytest
from openai import OpenAI
from PIL import Image

from dp_runtime import ImagePrompt, RequestOutput, SamplingParams
from dp_runtime.server.chat.images import ChatImages
from dp_runtime.server.config import ServerConfig
from tests.dp_runtime.server.pictures import (
    Part,
    animated,
    data_url,
    encoded,
    gif_head,
    part,
    png,
    url_part,
)
from tests.dp_runtime.server.served import Served, serving
from tests.dp_runtime.server.unharmed import unharmed
from tests.hybrid_checkpoints import IMAGE_TOKEN, VISION, hybrid_checkpoint
from tests.image_checkpoints import picture, tokenizer_of_letters

# Parts as Qwen's templates show them, with the names that the tiny tokenizer has.
TEMPLATE = """\
{%- for message in messages %}{{ message.role + ' ' }}{% if message.content is string %}
{{- message.content }}{% else %}{% for part in message.content %}
{%- if part.type == 'image' or 'image_url' in part %}{% if message.role == 'system' %}
{{- raise_exception('System message cannot contain images.') }}{% endif %}<start><image><end>
{%- elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}
{{- ' ' }}{% endfor %}"""
START, END = 188, 189
CHATS = "/v1/chat/completions"
CAT, DOG = picture(2, 3), picture(3, 1, seed=1)
LIMITS = {"max_images": 3, "max_image_bytes": 40_000, "max_file_pixels": 2**20}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    layers: dict[str, Any] = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    path = hybrid_checkpoint(tmp_path_factory.mktemp("images"), VISION, **layers)
    tokenizer_of_letters().save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    sizes = {"max_model_len": 112, "page_size": 8, "max_num_tokens": 64, "num_pages": 100}
    with serving(LIMITS, model=str(path), dp_size=2, device="cpu", **sizes) as running:
        yield running
        running.check_idle()


def asked(*content: Part | str) -> dict[str, Any]:
    """A chat of texts and images, whose greedy answer is to come with all tokens."""
    parts = [{"type": "text", "text": one} if isinstance(one, str) else one for one in content]
    return {
        "messages": [{"role": "user", "content": parts}], "max_tokens": 4, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip


CAT_PART, DOG_PART = part(encoded(CAT)), part(encoded(DOG))
PHOTO = encoded(CAT, "JPEG")
EXIF = Image.Exif()
EXIF[0x0112] = 6
GOOD: dict[str, tuple[dict[str, Any], list[object]]] = {
    "one": (asked("what is ", CAT_PART, " here"), [CAT]),
    "two": (asked(CAT_PART, DOG_PART, "which"), [CAT, DOG]),
    "the url alone": (
        asked({"type": "image_url", "image_url": data_url(encoded(DOG))}), [DOG],
    ),
    "detail, parameters": (
        asked(url_part(data_url(PHOTO, "Image/JPG;name=a.jpg"), detail="high")), [PHOTO],
    ),
    "webp": (asked(part(encoded(DOG, "WEBP", lossless=True), "image/webp")), [DOG]),
    "gif": (asked(part(encoded(CAT, "GIF"), "image/gif")), [encoded(CAT, "GIF")]),
    "bmp": (asked(part(encoded(DOG, "BMP"), "image/bmp")), [DOG]),
    "cmyk": (
        asked(part(encoded(CAT.convert("CMYK"), "JPEG"), "image/jpeg")),
        [encoded(CAT.convert("CMYK"), "JPEG")],
    ),
    "palette, transparent": (
        asked(part(encoded(CAT.convert("P"), transparency=3))),
        [encoded(CAT.convert("P"), transparency=3)],
    ),
    "turned": (
        asked(part(encoded(CAT, exif=EXIF))), [CAT.transpose(Image.Transpose.ROTATE_270)],
    ),
    "16 bits": (asked(part(encoded(CAT.convert("I;16")))), [CAT.convert("I;16")]),
    "one pixel": (asked(part(encoded(Image.new("L", (1, 1), 200)))), [Image.new("L", (1, 1), 200)]),
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(served: Served) -> dict[str, Any]:
    """To all good chats, which are asked at the same time."""
    with ThreadPoolExecutor(len(GOOD)) as pool:
        bodies = [body for body, _ in GOOD.values()]
        found = pool.map(lambda body: served.post(CHATS, **body).raise_for_status().json(), bodies)
        return dict(zip(GOOD, found, strict=True))


@pytest.fixture(scope="module")
def outputs(served: Served, answers: dict[str, Any]) -> dict[str, RequestOutput]:
    """What the Python API says to the same."""
    prompts = []
    for name, (_, images) in GOOD.items():
        tokens = answers[name]["prompt_token_ids"]
        short = [
            token
            for before, token in pairwise([0, *tokens])
            if token != IMAGE_TOKEN or before == START
        ]
        prompts.append(ImagePrompt(short, images))
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=4)
    return dict(zip(GOOD, served.generate(prompts, params), strict=True))


@pytest.mark.parametrize("name", GOOD)
def test_an_answer_is_that_of_the_python_api(
    answers: dict[str, Any], outputs: dict[str, RequestOutput], name: str
) -> None:
    answer, expected = answers[name], outputs[name]
    assert tuple(answer["prompt_token_ids"]) == expected.prompt_token_ids
    assert tuple(answer["choices"][0]["token_ids"]) == expected.token_ids
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)


def test_tokenize_counts_the_tokens_of_images(served: Served, answers: dict[str, Any]) -> None:
    counted = served.post("/tokenize", messages=GOOD["two"][0]["messages"]).json()
    assert counted["tokens"] == answers["two"]["prompt_token_ids"]
    assert counted["count"] == answers["two"]["usage"]["prompt_tokens"]


def test_images_stand_where_their_parts_do(answers: dict[str, Any]) -> None:
    tokens = answers["two"]["prompt_token_ids"]
    user = tokens[: tokens.index(START)]
    cat, dog = ([START, *[IMAGE_TOKEN] * count, END] for count in (6, 3))
    assert tokens[: len([*user, *cat, *dog])] == [*user, *cat, *dog]


def test_several_choices_and_streams_of_the_openai_client(served: Served) -> None:
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    tool = {"type": "function", "function": {"name": "f"}}
    body: dict[str, Any] = asked(CAT_PART, "what")
    extra = {name: body.pop(name) for name in ("ignore_eos", "return_token_ids")}
    body |= {"model": served.state.model_name, "n": 2, "tools": [tool], "tool_choice": "none"}
    create: Any = partial(client.chat.completions.create, **body, extra_body=extra)
    whole, chunks = create(), list(create(stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].message.content == whole.choices[1].message.content
    assert whole.usage.prompt_tokens == len("user") + 1 + (1 + 6 + 1) + len("what") + 1
    texts = ["", ""]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content or "" for choice in whole.choices]
    tokens = whole.usage.prompt_tokens, whole.usage.completion_tokens
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == tokens


FIRST = r"messages\[0\]\.content\[0\]"
SMALL = encoded(CAT)
READABLE = f"{FIRST}: '[0-9,]+ bytes' is not allowed; a readable image"
ONLY_DATA = f"{FIRST}: .* is not allowed; a URL of data, as data:image/png;base64"
NO_BASE64 = f"{FIRST}: .* is not allowed; base64; "
MOVES = f"{FIRST}: '[0-9,]+ bytes, an animation' is not allowed; a single frame"
TEXT_BOMB = (b"zTXt", b"a\0\0" + zlib.compress(bytes(4 * 2**20)))
BAD: dict[str, tuple[Part, str]] = {
    "truncated png": (part(SMALL[:-900]), READABLE),
    "truncated jpeg": (part(PHOTO[:-200], "image/jpeg"), f"{READABLE}.*truncated"),
    "truncated webp": (part(encoded(CAT, "WEBP")[:-90], "image/webp"), READABLE),
    "truncated head": (part(SMALL[:20]), READABLE),
    "a wrong checksum": (part(SMALL.replace(b"IDAT", b"IDAT\0", 1)), READABLE),
    "no bytes": (part(b""), READABLE),
    "no image": (part(b"hello" * 30), rf"{READABLE} \(PNG\); .*cannot identify"),
    "another type": (part(PHOTO), rf"{READABLE} \(PNG\)"),
    "pdf as jpeg": (part(b"%PDF-1.7\n" * 9, "image/jpeg"), rf"{READABLE} \(JPEG\)"),
    "svg": (part(b"<svg/>", "image/svg+xml"), ONLY_DATA),
    "tiff": (part(encoded(CAT, "TIFF"), "image/tiff"), ONLY_DATA),
    "octets": (part(SMALL, "application/octet-stream"), ONLY_DATA),
    "no width": (part(png(0, 5, b"")), FIRST),
    "no height": (part(png(5, 0, b"")), FIRST),
    "too thin": (part(encoded(Image.new("L", (1, 300)))), f"{FIRST}: .*1 x 300 pixels"),
    "animated gif": (part(animated(DOG, "GIF"), "image/gif"), MOVES),
    "animated png": (part(animated(DOG, "PNG")), MOVES),
    "animated webp": (part(animated(DOG, "WEBP"), "image/webp"), MOVES),
    "a bomb": (
        part(encoded(Image.new("1", (2000, 2000)))),
        rf"{FIRST}: .*2000 x 2000 pixels' is not allowed; 1\.\.1,048,576",
    ),
    "a bomb's head": (part(png(2**31 - 1, 2**31 - 1, b"")), f"{READABLE}.*DecompressionBomb"),
    "a gif's head": (part(gif_head(65535, 65535), "image/gif"), f"{READABLE}.*DecompressionBomb"),
    "a bomb of text": (part(png(64, 64, b"\0" * 65 * 64, TEXT_BOMB)), f"{READABLE}.*too large"),
    "a large file": (part(bytes(40_003)), rf"{FIRST}: .* at most 40,000 \(max_image_bytes\)"),
    "alphabet": (url_part("data:image/png;base64,a-_b"), NO_BASE64),
    "padding": (url_part("data:image/png;base64,abcdef"), f"{NO_BASE64}.*padding"),
    "lines": (url_part("data:image/png;base64," + "abcd\n" * 4), NO_BASE64),
    "not ASCII": (url_part("data:image/png;base64,ä"), f"{NO_BASE64}.*ASCII"),
    "percents": (url_part("data:image/png,%89PNG"), ONLY_DATA),
    "http": (url_part("http://127.0.0.1/a.png"), f"{ONLY_DATA}.*fetches nothing"),
    "https": (url_part("https://example.com/a.png"), f"{ONLY_DATA}.*fetches nothing"),
    "file": (url_part("file:///etc/passwd"), ONLY_DATA),
    "path": (url_part("cat.png"), ONLY_DATA),
    "plain base64": (url_part(b64encode(SMALL).decode()), ONLY_DATA),
    "empty": (url_part(""), ONLY_DATA),
    "no url": (url_part(None), rf"{FIRST}\.image_url\.url: None"),
    "a number": (url_part(7), rf"{FIRST}\.image_url\.url: 7"),
    "a list": ({"type": "image_url", "image_url": []}, rf"{FIRST}\.image_url: \[\]"),
    "missing": ({"type": "image_url"}, rf"{FIRST}\.image_url: None"),
    "detail": (url_part(data_url(SMALL), detail="most"), rf"{FIRST}\.image_url\.detail: 'most'"),
    "video": ({"type": "video_url", "video_url": {"url": "a"}}, f"{FIRST}: 'video_url' is not"),
    "audio": ({"type": "input_audio", "input_audio": {}}, f"{FIRST}: 'input_audio' is not"),
    "another's part": ({"type": "image", "image": "a.png"}, f"{FIRST}: 'image' is not supported"),
}  # fmt: skip
WIDE = part(encoded(Image.new("L", (32 * 16, 32 * 8))))
BAD_CHATS: dict[str, tuple[dict[str, Any], str]] = {
    name: (asked(bad, "what"), text) for name, (bad, text) in BAD.items()
} | {
    "the second": (asked(CAT_PART, part(b"")), r"messages\[0\]\.content\[1\]: '0 bytes'"),
    "too many": (asked(*[CAT_PART] * 4), r"messages\[0\]\.content\[3\]: '4 images' .*at most 3"),
    "too long": (
        asked(WIDE, WIDE, WIDE),
        r"messages\[0\]\.content\[2\]: '165 tokens' .* maximum context length is 112 tokens and "
        "your request has 165 input tokens",
    ),
    "too long with its text": (
        asked("a" * 60, WIDE), "messages: .* maximum context length is 112 tokens and your",
    ),
    "no room": (asked(WIDE) | {"max_tokens": 90}, "max_tokens: 90 .* maximum context length"),
    "a text's own": (asked("<image>", CAT_PART), "messages: '2 tokens of images' .* 1: one for"),
    "a text without": (asked("<image>"), "messages: '1 tokens of images' is not allowed; 0"),
    "truncated prompt": (asked(CAT_PART) | {"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    "the system's": (
        {"messages": [{"role": "system", "content": [CAT_PART]}]},
        "messages: the chat template refuses them: System message cannot",
    ),
    "goes on": (
        asked(CAT_PART) | {"continue_final_message": True, "add_generation_prompt": False},
        "continue_final_message: True is not allowed; false where the last message has no text at",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def refusals(served: Served) -> dict[str, httpx.Response]:
    """What each bad chat got, while others were served well and nothing was left behind."""
    served.post(CHATS, **asked(CAT_PART))  # libraries are there, and their threads
    with unharmed(served), ThreadPoolExecutor(4) as pool:
        asking = {
            name: pool.submit(served.post, CHATS, **body) for name, (body, _) in BAD_CHATS.items()
        }
        return {name: answer.result() for name, answer in asking.items()}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_what_is_bad_is_one_clear_400(refusals: dict[str, httpx.Response], name: str) -> None:
    answer, (_, text) = refusals[name], BAD_CHATS[name]
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert re.match(text, error["message"]), error["message"]
    assert error["message"].startswith(error["param"])
    assert len(error["message"]) < 400
    assert error["code"] == ("context_length_exceeded" if "maximum context" in text else None)


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("prompt", ["ab<image>", [1, IMAGE_TOKEN], [[1, 2], [IMAGE_TOKEN]]])
def test_a_completion_has_no_images(
    served: Served, prompt: object, add_special_tokens: bool
) -> None:
    asking = {"prompt": prompt, "add_special_tokens": add_special_tokens}
    answer = served.post("/v1/completions", **asking)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"] == (
        "prompt: '1 tokens of images' is not allowed; none where there is no image: "
        "/v1/chat/completions takes them"
    )
    assert error["param"] == "prompt"


def test_the_tokens_of_a_text_are_told_whatever_they_are(served: Served) -> None:
    assert served.post("/tokenize", prompt="a<image>").json()["tokens"] == [1, IMAGE_TOKEN]


def test_the_first_image_waits_for_no_library(served: Served) -> None:
    images = ChatImages.of(served.engine.model, ServerConfig())
    assert images is not None
    assert "_library" in vars(images.processor)


@pytest.mark.parametrize("name", ["max_images", "max_image_bytes", "max_file_pixels"])
def test_limits_are_checked(name: str) -> None:
    limits: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name}: 0 is not allowed"):
        ServerConfig(**limits)
