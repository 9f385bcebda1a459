"""What every rank did in every step, while one rank has three requests and another has none.

Real rows are the tokens that a rank's requests feed into a pass. Gathered rows are what the rank
contributes to the all-gather of an MoE stage: with padding="max_len", as many as the largest rank.

python examples/03_uneven_ranks.py
"""

from pathlib import Path

from dp_runtime import Engine, EngineConfig, SamplingParams

TINY_MODEL = Path(__file__).parent / "tiny_moe" / "checkpoint"


def main(launcher: str = "local", padding: str = "max_len") -> None:
    config = EngineConfig(
        str(TINY_MODEL), dp_size=3, device="cpu", launcher=launcher, padding=padding
    )
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (8, 6, 4, 2)]
    with Engine(config) as engine:
        engine.generate([[1] * 40, [2] * 9, [3] * 9, [4] * 5], params, dp_ranks=[0, 0, 0, 1])
        steps, report = engine.step_trace(), engine.report()
    print("step  real rows by rank  gathered rows  busy ms by rank")
    for step_id in sorted({step.step_id for step in steps}):
        ranks = sorted((s for s in steps if s.step_id == step_id), key=lambda s: s.dp_rank)
        target = ranks[0].passes[0]
        busy = "  ".join(f"{rank.busy_s * 1e3:5.1f}" for rank in ranks)
        print(f"{step_id:4}  {target.real_rows!s:17}  {target.gathered_rows!s:13}  {busy}")
    print(f"padding_waste {report.padding_waste:.2f}, row_balance {report.row_balance:.2f}")


if __name__ == "__main__":  # ranks are processes that import this file
    main()
