"""The tokenizer: byte-level BPE in which every word of the questions is one token."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.tiny_vl.pictures import COLOURS, SHAPES
from examples.tiny_vl.questions import draw_question
from examples.tiny_vl.sentences import draw_context

SPECIAL = {
    token: number
    for number, token in enumerate(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
         "<|image_pad|>", "<|video_pad|>")
    )
}  # fmt: skip
VOCAB_SIZE = 704
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def corpus() -> list[str]:
    """Draw enough text that all words are in it."""
    rng = Random("tokenizer")
    texts = ["user\n", "assistant\n", "system\n"] * 50
    for _ in range(3000):
        question = draw_question(rng, context_words=0)
        texts += [question.text, question.answer, draw_context(rng, 10)]
    return texts + [f" {word}" for word in (*COLOURS, *SHAPES)] * 100


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    assert all(tokenizer.token_to_id(token) == place for token, place in SPECIAL.items())
    return tokenizer


def save_tokenizer(
    checkpoint: Path, max_length: int, max_pixels: int, known: Path | None = None
) -> Tokenizer:
    """Write what a checkpoint has besides its config and weights."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(known)) if known else train_tokenizer()
    tokenizer.save(str(checkpoint / "tokenizer.json"), pretty=False)
    (checkpoint / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    files = {
        "tokenizer_config.json": {
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": max_length,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "generation_config.json": {
            "do_sample": False,
            "eos_token_id": [SPECIAL["<|im_end|>"], SPECIAL["<|endoftext|>"]],
            "pad_token_id": SPECIAL["<|endoftext|>"],
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "merge_size": 2,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": 32**2, "longest_edge": max_pixels},
        },
    }
    for name, fields in files.items():
        (checkpoint / name).write_text(json.dumps(fields, indent=2) + "\n")
    return tokenizer
