"""Gated delta nets in Triton: convolution, delta rule row by row or in chunks, and gated norm."""
