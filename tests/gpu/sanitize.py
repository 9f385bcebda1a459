"""Small calls of attention kernels and of those of gated delta nets, for a memory checker.

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m tests.gpu.sanitize

Appending keys and values is part of each call. Exit status 1 if a result is not finite.
"""

from __future__ import annotations

import sys

import torch

from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.kernels.gated_delta.rows import HeadShape
from tests.dp_runtime.kernels.gated_delta.oracle import Caches, Net, Rows, run, sequences_of
from tests.gpu.build import build_all
from tests.gpu.cases import CUDA, Case, Lengths

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
SPECS = {
    "bf16": AttentionSpec(32, 4, 128, 64, BF16, BF16, frozenset({1, 4})),
    "e4m3": AttentionSpec(32, 4, 128, 64, BF16, E4M3, frozenset({1, 4})),
}
CALLS: dict[str, Lengths] = {
    "prefill": [(70, 70), (33, 100), (1, 1), (64, 64)],
    "decode": [(1, 1), (1, 64), (1, 65), (1, 300)],
    "verify": [(4, 4), (4, 67), (4, 300)],
}


NONE = (0, 0, 0, 0)
DELTA_CALLS = {  # rows of each sequence, drafts of each, and those accepted of the pass before
    "prompts": ((70, 1, 129, 8), NONE, NONE),
    "verifications": ((4, 4, 4, 4), (3, 3, 3, 0), NONE),
    "decodes": ((1, 1, 1, 1), NONE, (3, 0, 2, 0)),
    "a mixture": ((4, 65, 1, 4), (3, 0, 0, 0), NONE),
    "decodes after it": ((1, 1, 1, 1), NONE, (2, 0, 0, 0)),
}


def check_delta_nets() -> int:
    """Run passes of three requests and a null sequence, one after the other; count what failed."""
    failed = 0
    for shape in (HeadShape(16, 64, 128, 128), HeadShape(2, 4, 16, 24)):
        net = Net.draw(shape, 4, BF16)
        caches, slots = Caches.dirty(net, 4, 3), [3, 1, 2, 0]
        for kind, (lengths, *drafts) in DELTA_CALLS.items():
            of = sequences_of(lengths, slots, [kind == "prompts"] * 4, (drafts[0], drafts[1]))
            out = run(net, Rows.draw(shape, sum(lengths), BF16), caches, of)
            torch.cuda.synchronize()
            finite = bool(out.isfinite().all() and caches.states[1:].isfinite().all())
            failed += not (finite and bool(caches.states[0].isnan().all()))
            print(
                f"gated delta net, {shape.num_v_heads} heads, {kind}: finite {finite}", flush=True
            )
    return failed


def main() -> int:
    needs = [(name, spec) for name in ("trtllm", "flashinfer") for spec in SPECS.values()]
    build_all(needs, CUDA)
    failed = check_delta_nets()
    for name, spec in needs:
        for kind, lengths in CALLS.items():
            out = Case.make(lengths, spec).run(name)
            torch.cuda.synchronize()
            finite = bool(out.isfinite().all())
            failed += not finite
            what = "finite" if finite else "NOT FINITE"
            print(f"{name}, {spec.dtypes}, {kind}: {what}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
