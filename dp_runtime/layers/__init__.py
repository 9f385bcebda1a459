"""Layers that architectures are composed of."""
