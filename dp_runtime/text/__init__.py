"""Text and tokens: the tokenizer, text as tokens come, stop strings."""
