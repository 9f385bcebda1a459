#!/usr/bin/env bash
# Starts a Ray cluster on this machine, submits `launch.py generate` as a job, prints its result
# and ends the cluster. Arguments go to `launch.py generate`; without any it is the demo:
#
#     examples/ray_job.sh --dp-size 4 --prompt "Return a new string" --max-tokens 32
set -euo pipefail
cd "$(dirname "$0")/.."

# A local ray.init() leaves a token behind that would turn authentication on for this cluster.
export RAY_AUTH_MODE=disabled
unset RAY_ADDRESS
port=${RAY_JOB_PORT:-6399}
dashboard_port=${RAY_JOB_DASHBOARD_PORT:-8299}
dashboard=http://127.0.0.1:$dashboard_port
files=$(mktemp -d /tmp/ray-job.XXXXXX)

# --block keeps the cluster in one process of ours, so that the trap ends this cluster and no
# other; `ray stop` would end every cluster of the machine. With a --temp-dir of its own the
# cluster does not become the one that a ray.init() without an address looks for.
ray start --head --block --disable-usage-stats --include-dashboard=true --temp-dir "$files" \
    --port "$port" --dashboard-port "$dashboard_port" --ray-client-server-port $((port + 1)) \
    >"$files/start.log" 2>&1 &
cluster=$!
trap 'kill "$cluster" 2>/dev/null; wait "$cluster" || true; rm -rf "$files"' EXIT

answers() {
    python -c "import urllib.request as u; u.urlopen('$dashboard/api/version', timeout=5)" 2>/dev/null
}
until answers; do
    kill -0 "$cluster" 2>/dev/null || { cat "$files/start.log" >&2; exit 1; }
    sleep 0.5
done

ray job submit --address "$dashboard" --working-dir . -- python launch.py generate "$@"
