#!/usr/bin/env bash
# Text from MODEL on DP_SIZE ranks, each an actor with a GPU of its own. Arguments go to
# `launch.py generate`: examples/nvl4/generate.sh --prompt "Return a new string" --max-tokens 64
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/nvl4/flags.sh
python launch.py generate "${flags[@]}" "$@"
