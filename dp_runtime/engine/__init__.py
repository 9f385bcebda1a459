"""The driver side: the public Engine, its inputs, admission, and text."""
