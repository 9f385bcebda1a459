"""Text from four CPU ranks, each with its own requests and its own KV cache.

python examples/01_generate.py
"""

from pathlib import Path

from dp_runtime import Engine, EngineConfig, SamplingParams

TINY_MODEL = Path(__file__).parent / "tiny_moe" / "checkpoint"
PROMPTS = ("The list of arguments", "If the file does not exist,", "Return a new string")


def main(launcher: str = "local") -> None:
    config = EngineConfig(str(TINY_MODEL), dp_size=4, device="cpu", launcher=launcher)
    greedy = SamplingParams(max_tokens=24, temperature=0.0)
    with Engine(config) as engine:
        outputs = engine.generate(PROMPTS, greedy)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        print(f"[rank {output.dp_rank}, {output.finish_reason}] {prompt} →{output.text}")


if __name__ == "__main__":  # ranks are processes that import this file
    main()
