# Sourced: what the scripts of this folder take from the environment, as flags of launch.py.
#   DP_SIZE         ranks, 4 by default
#   RANKS_PER_GPU   1 by default; 2 runs four ranks on two GPUs
#   MODEL           Hugging Face directory; the tiny model of this repository by default
flags=(--dp-size "${DP_SIZE:-4}" --ranks-per-gpu "${RANKS_PER_GPU:-1}")
if [ -n "${MODEL:-}" ]; then flags+=(--model "$(realpath "$MODEL")"); fi
