"""Trains the trunk and then the MTP layer of the tiny hybrid model, on the corpus of tiny_moe.

python -m examples.tiny_hybrid.train --corpus CORPUS --trunk-minutes 5 --mtp-minutes 2
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from examples.tiny_hybrid.model import SHAPE, TinyHybrid, save_weights
from examples.tiny_moe.train import new_parser, prepare_tokens, train


def parse_args() -> argparse.Namespace:
    parser = new_parser(Path(__file__).parent / "checkpoint")
    parser.set_defaults(trunk_minutes=5.0, mtp_minutes=2.0, compile=False)
    return parser.parse_args()


def initial_model(args: argparse.Namespace) -> TinyHybrid:
    torch.manual_seed(args.seed)
    model = TinyHybrid(SHAPE | {"vocab_size": args.vocab_size})
    model.init_weights()
    return model.train().to(args.device)


def main() -> None:
    args = parse_args()
    tokens = prepare_tokens(args, SHAPE["max_position_embeddings"])
    if args.prepare_only:
        return
    model = initial_model(args)
    train(args, tokens, model, partial(save_weights, model, args.out))


if __name__ == "__main__":
    main()
