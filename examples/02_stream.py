"""One text as it is written, while another request is under way and a third is given up.

python examples/02_stream.py
"""

from pathlib import Path

from dp_runtime import Engine, EngineConfig, SamplingParams

TINY_MODEL = Path(__file__).parent / "tiny_moe" / "checkpoint"


def main(launcher: str = "local") -> None:
    config = EngineConfig(str(TINY_MODEL), dp_size=2, device="cpu", launcher=launcher)
    with Engine(config) as engine:
        other = engine.submit("A class can be used to", SamplingParams(max_tokens=16), dp_rank=1)
        unwanted = engine.submit("The default value is", SamplingParams(max_tokens=512))
        unwanted.abort()
        print("Return a new", end="")
        for delta in engine.stream("Return a new", SamplingParams(max_tokens=32)):
            print(delta.text, end="", flush=True)
        print(f"\nmeanwhile, on rank {other.dp_rank}:{other.result(timeout=60).text}")
        print(f"given up after {len(unwanted.result(timeout=60).token_ids)} tokens")


if __name__ == "__main__":  # ranks are processes that import this file
    main()
