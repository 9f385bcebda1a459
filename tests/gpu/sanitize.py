"""One small call of each attention kernel, to be run under a memory checker.

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m tests.gpu.sanitize

Appending keys and values is part of each call. Exit status 1 if a result is not finite.
"""

from __future__ import annotations

import sys

import torch

from dp_runtime.attention.spec import AttentionSpec
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


def main() -> int:
    needs = [(name, spec) for name in ("trtllm", "flashinfer") for spec in SPECS.values()]
    build_all(needs, CUDA)
    failed = 0
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
