"""The Qwen3.5 MoE family and Qwen3-Next: gated delta nets between layers of gated attention."""
