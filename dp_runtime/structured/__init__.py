"""Structured outputs: which tokens a request's grammar allows next."""
