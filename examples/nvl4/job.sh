#!/usr/bin/env bash
# `launch.py bench` of MODEL as a job on a Ray cluster of this machine, which is started and ended
# around it. Arguments go to bench: examples/nvl4/job.sh --num-requests 256 --moe-sharding tp
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/nvl4/flags.sh
. examples/ray_cluster.sh
need_job_client
ray job submit --address "$dashboard_address" --working-dir . --runtime-env-json "$job_excludes" \
    -- python launch.py bench "${flags[@]}" "$@"
