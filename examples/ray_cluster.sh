# Sourced by scripts that need a Ray cluster of their own on this machine: starts one, waits until
# it answers, and ends it (and no other) when the script ends. Sets
#   cluster_address     host:port, for --ray-address
#   dashboard_address   its URL, for `ray job ...`; empty where ray[default]'s packages are missing

# Ray's ports listen on all interfaces, and whoever may talk to a cluster runs code as its user:
# this cluster asks for a token. It is made in ~/.ray/auth_token where the user has none yet; other
# shells of the same user find it there.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(ray get-auth-token --generate)
export RAY_AUTH_TOKEN
unset RAY_ADDRESS
cluster_port=${RAY_JOB_PORT:-6399}
cluster_address=127.0.0.1:$cluster_port
dashboard_port=${RAY_JOB_DASHBOARD_PORT:-8299}
export dashboard_address=http://127.0.0.1:$dashboard_port
cluster_files=$(mktemp -d /tmp/ray-job.XXXXXX)
python -c "import ray.dashboard.optional_deps" 2>"$cluster_files/why.log" || dashboard_address=

# --block keeps the cluster in one process of ours, so that the trap ends this cluster and no
# other; `ray stop` would end every cluster of the machine. With a --temp-dir of its own the
# cluster does not become the one that a ray.init() without an address looks for.
ray start --head --block --disable-usage-stats --temp-dir "$cluster_files" --port "$cluster_port" \
    --include-dashboard="$([ -n "$dashboard_address" ] && echo true || echo false)" \
    --dashboard-port "$dashboard_port" --dashboard-agent-listen-port $((dashboard_port + 1)) \
    --ray-client-server-port $((cluster_port + 1)) \
    >"$cluster_files/start.log" 2>&1 &
cluster=$!
end_cluster() {
    trap '' INT TERM
    kill "$cluster" 2>/dev/null || true
    wait "$cluster" || true
    rm -rf "$cluster_files"
}
trap end_cluster EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

cluster_answers() {
    if [ -n "$dashboard_address" ]; then
        python - <<'END'
import os, urllib.request as web
headers = {"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]}
web.urlopen(web.Request(os.environ["dashboard_address"] + "/api/version", headers=headers), timeout=5)
END
    else
        ray health-check --address "$cluster_address"
    fi >/dev/null 2>&1
}
until cluster_answers; do
    kill -0 "$cluster" 2>/dev/null || { cat "$cluster_files/start.log" >&2; exit 1; }
    sleep 0.5
done

# What a job uploads of this directory: not what is hidden, such as virtual environments.
job_excludes='{"excludes": ["/.*/"]}'
need_job_client() {
    [ -n "$dashboard_address" ] && return
    echo "ray job needs the packages of ray[default]: $(tail -1 "$cluster_files/why.log")" >&2
    exit 1
}
