"""Products of few rows with bf16 matrices, each cut into enough programs for all of a GPU."""
