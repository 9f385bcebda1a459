"""Triton kernels, and the building of compiled modules."""
