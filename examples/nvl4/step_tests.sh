#!/usr/bin/env bash
# The GPU tests of steps, kernels and graphs, each file on its own: one line says how it ended.
# Arguments are files' names instead of all: examples/nvl4/step_tests.sh test_experts test_no_waits
set -uo pipefail
cd "$(dirname "$0")/../.."
files=(test_experts test_collectives test_capture test_step_times test_no_waits test_verification
       test_engine test_structured test_memory test_attention test_fp8_linear test_gated_delta
       test_hybrid_engine test_hybrid_graphs)
if [ $# -gt 0 ]; then files=("$@"); fi
ended=0
for file in "${files[@]}"; do
  started=$SECONDS
  log=$(python -m pytest -q -n 0 -x "tests/gpu/$file.py" 2>&1) && how=passed || { how=FAILED; ended=1; }
  echo "$file $how in $((SECONDS - started)) s: $(tail -1 <<<"$log")"
  if [ "$how" = FAILED ]; then tail -40 <<<"$log"; fi
done
exit $ended
