"""Weights to begin from: layers that look back a few tokens, and attention to what is alike.

A small model needs many steps to find both by itself (for attention alone see arXiv 2305.09828).
Delta nets copy the tokens before a token into a second, rotated space of its row; queries read
that space and keys the first, so a token finds rows that are like what came just before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from examples.tiny_vl.pictures import COLOURS, SHAPES
from examples.tiny_vl.questions import COUNTS, LETTERS

TAPS = (0.6, 0.6, 0.8, 0.0)  # of the tokens 3, 2, 1 and 0 back
NAMES = (*(f" {word}" for word in (*COLOURS, *SHAPES)),)
NUMBERS = (*(f" {word}" for word in (*COUNTS, "yes", "no", "nothing")),)
PLURALS = {f" {shape}{'es' if shape == 'cross' else 's'}": f" {shape}" for shape in SHAPES}


@torch.no_grad()
def begin(model: Any, token: Callable[[str], int]) -> None:
    """Set the weights of a text model whose vision encoder knows its words."""
    text = model.language_model
    embed = text.embed_tokens.weight
    hidden = embed.shape[1]
    always = torch.nn.functional.normalize(torch.randn(hidden), dim=0)
    embed -= embed @ always[:, None] * always
    alike = {letter: f" {letter}" for letter in LETTERS} | PLURALS
    for one, other in alike.items():
        embed[token(one)] = 0.9 * embed[token(other)] + 0.4 * embed[token(one)]
    rotation = torch.linalg.qr(torch.randn(hidden, hidden)).Q
    words = [embed[[token(word) for word in part]] for part in (NAMES, NUMBERS)]
    letters = basis(embed[[token(f" {letter}") for letter in LETTERS]])
    for layer in text.layers:
        if layer.block_type == "linear_attention":
            look_back(layer.linear_attn, always, rotation)
        else:
            find_alike(layer.self_attn, [basis(part) for part in words], letters, rotation)
        layer.mlp.experts.down_proj *= 0.1
        layer.mlp.shared_expert.down_proj.weight *= 0.1
    embed += always  # by which gates begin open
    model.visual.merger.linear_fc2.bias += 1.2 * always


def basis(rows: Tensor) -> Tensor:
    """Return orthonormal rows that span the same."""
    return torch.linalg.qr(rows.T).Q.T


def look_back(layer: Any, always: Tensor, rotation: Tensor) -> None:
    """Each token gets those before it, rotated; nothing is remembered for longer at first."""
    heads, size, hidden = layer.num_v_heads, layer.head_v_dim, len(always)
    frame = torch.linalg.qr(torch.randn(heads * size, hidden)).Q  # [values, hidden]
    frame = frame - frame @ always[:, None] * always
    qkv, keys = layer.in_proj_qkv.weight, layer.key_dim
    qkv[keys : 2 * keys] = qkv[:keys]
    qkv[2 * keys :] = frame
    conv = layer.conv1d.weight[:, 0]
    conv[keys : 2 * keys] = conv[:keys]
    conv[2 * keys :] = torch.tensor(TAPS)
    layer.in_proj_z.weight.mul_(0.1).add_(0.3 * always)
    layer.out_proj.weight.copy_(0.15 * rotation @ frame.T)
    layer.A_log[:-1] = 3.0  # all heads but one forget at once
    layer.dt_bias[:-1] = 1.0


def find_alike(layer: Any, words: Sequence[Tensor], letters: Tensor, rotation: Tensor) -> None:
    """Queries are what came before, keys what is here; values are words, and letters before."""
    size, hidden = layer.head_dim, letters.shape[1]
    groups = layer.num_key_value_groups
    rotated = size // 4  # of a head's dimensions, by position
    q = layer.q_proj.weight.view(-1, 2, size, hidden)[:, 0]  # the others are of the gate
    k, v = (p.weight.view(-1, size, hidden) for p in (layer.k_proj, layer.v_proj))
    o = layer.o_proj.weight.view(hidden, -1, size)
    for number, known in enumerate(words):
        heads = slice(number * groups, (number + 1) * groups)
        count = len(known)
        for part in (q[heads], k[number]):
            part.mul_(0.2)
        k[number, rotated : rotated + count] = known
        q[heads, rotated : rotated + count] = known @ rotation.T
        v[number].mul_(0.2)
        v[number, :count] = known
        room = min(len(letters), size - count)
        v[number, count : count + room] = letters[:room] @ rotation.T
        o[:, heads] *= 0.2
        o[:, heads, :count] = 0.4 * known.T[:, None]
        o[:, heads, count : count + room] = 1.2 * letters[:room].T[:, None]
    layer.q_norm.weight.fill_(0.5)
    layer.k_norm.weight.fill_(0.5)
