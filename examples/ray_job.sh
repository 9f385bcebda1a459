#!/usr/bin/env bash
# Starts a Ray cluster on this machine, submits `launch.py generate` as a job, prints its result
# and ends the cluster. Arguments go to `launch.py generate`; without any it is the demo:
#
#     examples/ray_job.sh --dp-size 4 --prompt "Return a new string" --max-tokens 32
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/ray_cluster.sh
need_job_client
ray job submit --address "$dashboard_address" --working-dir . --runtime-env-json "$job_excludes" \
    -- python launch.py generate "$@"
