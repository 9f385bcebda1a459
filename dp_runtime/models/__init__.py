"""Supported model families."""
