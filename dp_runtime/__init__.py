"""Data-parallel attention runtime for mixture-of-experts language models."""
