#!/usr/bin/env bash
# Runs a Ray cluster on this machine until Ctrl-C, which ends this cluster and no other.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/ray_cluster.sh
echo "cluster $cluster_address (--ray-address), jobs ${dashboard_address:-not possible} (--address)"
wait "$cluster"
