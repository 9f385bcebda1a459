"""The driver side: the public engines, their inputs, admission, and outputs."""
