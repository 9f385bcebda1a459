"""Muon: momentum made orthogonal, for the matrices of a model; AdamW for all else.

It learned in fewer steps than AdamW alone (kellerjordan.github.io/posts/muon has the method).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
EMBEDDING_SCALE = 0.1  # features of pictures were made similar to embeddings: these change slowly


def orthogonal(matrices: Tensor) -> Tensor:
    """Push the singular values of matrices [count, rows, columns] towards 1 (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


@dataclass
class Muon:
    """Steps all parameters; the learning rate is AdamW's, in units of which Muon's is given."""

    parameters: Iterable[tuple[str, nn.Parameter]]
    ratio: float = 7.0
    momentum: float = 0.95
    weight_decay: float = 0.02
    velocities: dict[nn.Parameter, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        every = list(self.parameters)
        self.every = [parameter for _, parameter in every]
        matrices = [p for name, p in every if "layers." in name and min(p.shape[-2:], default=0) > 8
                    and p.ndim > 1]  # fmt: skip
        self.by_shape = defaultdict[torch.Size, list[nn.Parameter]](list)
        for parameter in matrices:
            self.by_shape[parameter.shape[-2:]].append(parameter)
        ids = {id(parameter) for parameter in matrices}
        others = [(name, p) for name, p in every if id(p) not in ids]
        groups = [
            {
                "params": [p for name, p in others if ("embed_tokens" in name) == slow],
                "scale": scale,
            }
            for slow, scale in ((False, 1.0), (True, EMBEDDING_SCALE))
        ]
        groups = [group for group in groups if group["params"]]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = lr * group["scale"]
        self.adam.step()
        for (rows, columns), parameters in self.by_shape.items():
            steps = [self._ahead(p).reshape(-1, rows, columns) for p in parameters]
            updates = orthogonal(torch.cat(steps)).split([len(s) for s in steps])
            rate = lr * self.ratio * max(1.0, rows / columns) ** 0.5
            for parameter, update in zip(parameters, updates):
                parameter.mul_(1 - rate * self.weight_decay)
                parameter.add_(update.view_as(parameter), alpha=-rate)

    def _ahead(self, parameter: nn.Parameter) -> Tensor:
        """Return Nesterov's momentum."""
        assert parameter.grad is not None
        velocity = self.velocities.setdefault(parameter, torch.zeros_like(parameter))
        velocity.lerp_(parameter.grad, 1 - self.momentum)
        return parameter.grad.lerp(velocity, self.momentum)

    def zero_grad(self) -> None:
        for parameter in self.every:
            parameter.grad = None
