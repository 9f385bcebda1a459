"""Measures the tiny hybrid checkpoint on held-out text, as tiny_moe's is measured."""

from __future__ import annotations

from pathlib import Path

from examples.tiny_hybrid.model import load_model
from examples.tiny_moe.evaluate import evaluate, parse_args


def main() -> None:
    args = parse_args(Path(__file__).parent / "checkpoint")
    evaluate(load_model(args.checkpoint), args)


if __name__ == "__main__":
    main()
