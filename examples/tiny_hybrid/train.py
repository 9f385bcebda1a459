"""Trains the trunk and then the MTP layer of the tiny hybrid model, on the corpus of tiny_moe.

python -m examples.tiny_hybrid.train --corpus CORPUS --trunk-minutes 5 --mtp-minutes 2
python -m examples.tiny_hybrid.train --corpus CORPUS --trunk CHECKPOINT --mtp-minutes 2 --out OUT
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from examples.tiny_hybrid.model import SHAPE, TinyHybrid, load_model, save_weights
from examples.tiny_moe.train import new_parser, prepare_tokens, train


def parse_args() -> argparse.Namespace:
    parser = new_parser(Path(__file__).parent / "checkpoint")
    parser.set_defaults(trunk_minutes=5.0, mtp_minutes=2.0, compile=False)
    parser.add_argument(
        "--trunk", type=Path, help="checkpoint whose trunk is taken: only the MTP layer is trained"
    )
    args = parser.parse_args()
    if args.trunk is not None:
        args.trunk_steps = 0
    return args


def initial_model(args: argparse.Namespace) -> TinyHybrid:
    torch.manual_seed(args.seed)
    model = TinyHybrid(SHAPE | {"vocab_size": args.vocab_size})
    model.init_weights()
    if args.trunk is not None:
        model.model.load_state_dict(load_model(args.trunk).model.state_dict())
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
