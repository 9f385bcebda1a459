import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models, pre_tokenizers, processors

from dp_runtime.text.bad_words import encoded_bad_words
from dp_runtime.text.tokenizer import Tokenizer
from tests.dp_runtime.text.test_tokenizer import byte_level


def test_a_word_is_encoded_with_and_without_a_space_and_without_special_tokens() -> None:
    hf = byte_level()
    hf.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = Tokenizer(hf.to_str())
    words = encoded_bad_words(["cat", " mat", "cat", "the cat", " "], tokenizer, 1000)
    assert tokenizer.encode("cat")[0] == 0
    texts = [tokenizer.decode(tokens, skip_special_tokens=False) for tokens in words]
    assert texts == ["cat", " cat", "mat", " mat", "the cat", " the cat", " ", "  "]


def test_spellings_that_the_model_can_not_generate_are_left_out() -> None:
    tokenizer = Tokenizer(byte_level().to_str())
    known = tokenizer.encode(" cat")
    spaced = encoded_bad_words(["cat"], tokenizer, max(known) + 1)
    assert tuple(known) in spaced
    assert encoded_bad_words(["cat"], tokenizer, max(known)) == tuple(
        tokens for tokens in spaced if max(tokens) < max(known)
    )


def test_words_that_a_step_would_be_slow_to_compare_are_refused() -> None:
    tokenizer = Tokenizer(byte_level().to_str())
    many = [f"{number:03}" for number in range(1000)]
    assert len(encoded_bad_words(many, tokenizer, 1000)) > 1000
    with pytest.raises(ValueError, match=r"bad_words: .*; at most 16384 tokens: spellings times"):
        encoded_bad_words([*many[:400], "xyz" * 20], tokenizer, 1000)


def test_a_word_without_tokens_is_named() -> None:
    hf = HfTokenizer(models.WordLevel({"a": 0}, unk_token="?"))
    hf.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match="bad_words: '\\\\t' is not allowed; words of which"):
        encoded_bad_words(["a", "\t"], Tokenizer(hf.to_str()), 1)
