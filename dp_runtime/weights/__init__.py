"""Checkpoints: tensors, shards and block scales."""
