#!/usr/bin/env bash
# The Qwen3-30B-A3B shape with dummy weights (or MODEL, with its own) on DP_SIZE ranks under an
# uneven load, experts sharded by expert and then by intermediate size: what `inspect` predicts, the
# run, its report. REQUESTS: those of each rank, in turn. Arguments go to every launch.py call.
set -euo pipefail
cd "$(dirname "$0")/../.."
files=$(mktemp -d /tmp/bench-30b.XXXXXX)
trap 'rm -rf "$files"' EXIT
if [ -z "${MODEL:-}" ]; then
    python examples/nvl4/shape.py "$files/model"
    MODEL=$files/model
    set -- --load-format dummy "$@"
fi
. examples/nvl4/flags.sh
read -ra requests <<<"${REQUESTS:-40 64 48 8}"
python examples/nvl4/uneven_load.py --model "$MODEL" --dp-size "${DP_SIZE:-4}" \
    --requests "${requests[@]}" >"$files/load.jsonl"
set -- --max-model-len 2048 --start-timeout-s 900 "$@"
for sharding in ${SHARDINGS:-ep tp}; do
    echo "=== $sharding, requests by rank: ${requests[*]:0:${DP_SIZE:-4}}"
    python launch.py inspect "${flags[@]}" --moe-sharding "$sharding" "$@"
    python launch.py generate "${flags[@]}" --moe-sharding "$sharding" "$@" \
        --prompts "$files/load.jsonl" --output "$files/out.jsonl"
done
