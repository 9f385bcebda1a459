"""A model of your own sizes, written by transformers, served, and compared with transformers.

Needs transformers, which the `test` extra installs. Only config.json, safetensors and, for text,
tokenizer.json are read; docs/extending.md says how to add an architecture.

python examples/04_your_own_model.py
"""

from tempfile import TemporaryDirectory

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from dp_runtime import Engine, EngineConfig, SamplingParams

PROMPT = [5, 17, 3, 88]


def main(launcher: str = "local") -> None:
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, eos_token_id=None)).eval()
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        config = EngineConfig(directory, dp_size=2, device="cpu", launcher=launcher)
        with Engine(config) as engine:
            (output,) = engine.generate([PROMPT], SamplingParams(max_tokens=12, temperature=0.0))
    print("dp-runtime  ", list(output.token_ids))
    print("transformers", expected[0, len(PROMPT) :].tolist())


if __name__ == "__main__":  # ranks are processes that import this file
    main()
