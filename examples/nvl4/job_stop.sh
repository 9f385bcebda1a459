#!/usr/bin/env bash
# Stops a long bench job in mid-run and checks that nothing of it is left: see job_stop.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/nvl4/flags.sh
. examples/ray_cluster.sh
python examples/nvl4/job_stop.py --cluster "$cluster_address" --dashboard "$dashboard_address" \
    -- "${flags[@]}" "$@"
