"""A worker's experts in plain torch, in the place of the Triton kernels that vLLM's CPU build cannot run.

Give ``--worker-extension-cls plain_experts.PlainExperts``.  Everything else is vLLM's own: the router, the
adapter's slots and which of them a token takes.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts


class PlainExperts:
    """Adds nothing to the worker; importing this module replaces the kernels."""


def _of(factors: torch.Tensor, expert: int) -> torch.Tensor:
    """The factor of an expert, or the one that all share."""
    return factors[expert if len(factors) > 1 else 0]


def apply(
    self: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *_: Any,
    **__: Any,
) -> None:
    """The weighted sum of ``w2 (silu(gate) up)`` of a token's experts, all with the slot's delta."""
    slots = self._lora_context
    of_token = slots.punica_wrapper.token_lora_indices.tolist()
    for token, x in enumerate(hidden_states):
        index, total = of_token[token], torch.zeros_like(x)
        for expert, weight in zip(topk_ids[token].tolist(), topk_weights[token], strict=True):
            gate_up, down = w1[expert], w2[expert]
            if index >= 0:
                pairs = zip(slots.w13_lora_a_stacked, slots.w13_lora_b_stacked, strict=True)
                gate_up = gate_up + torch.cat(
                    [_of(b[index], expert) @ _of(a[index], expert) for a, b in pairs]
                )
                (a,), (b,) = slots.w2_lora_a_stacked, slots.w2_lora_b_stacked
                down = down + _of(b[index], expert) @ _of(a[index], expert)
            gate, up = (gate_up @ x).tensor_split(2)
            total += weight * (down @ (torch.nn.functional.silu(gate) * up))
        output[token] = total


TritonExperts.apply = apply
