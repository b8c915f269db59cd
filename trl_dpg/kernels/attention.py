"""
`scaled_dot_product_attention`, twice differentiable.

torch's fast kernels have no second derivative, and its math kernel keeps several `[L, L]` tensors. Here the
probabilities are computed again from queries and keys, for some heads at a time. So the memory between forward and
backward pass is linear in L.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import blocks


def attention(
    through_theta, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """`scaled_dot_product_attention` of `[B, H, L, E]` tensors, computed in float32 or float64."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.size(-3) // x.size(-3), -3) for x in (key, value))
    else:  # one key and value may serve all heads
        key, value = (x.expand(*query.shape[:-2], *x.shape[-2:]) for x in (key, value))
    if is_causal:
        size = query.size(-2), key.size(-2)
        attn_mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()
    dtype = query.dtype
    query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
    if attn_mask is not None:
        least = torch.finfo(query.dtype).min  # with -inf, a row of padding that attends to nothing would be nan
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, least)
        attn_mask = attn_mask.clamp(min=least).expand(query.size(0), query.size(1), -1, -1)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    query, key, value = (x.contiguous() for x in (query, key, value))  # otherwise every product copies them
    if attn_mask is not None and attn_mask.requires_grad:  # a learned bias
        return (((query * scale) @ key.mT + attn_mask).softmax(-1) @ value).to(dtype)
    return _Attention.apply(query, key, value, attn_mask, scale, through_theta).to(dtype)


def _blocks(query: Tensor, key: Tensor, *others: Tensor | None):
    """Slices of `[B, H, ...]` tensors with whole heads. The attention weights of a slice have about the block size."""
    batch, heads = query.shape[:2]
    weights = query.size(2) * key.size(2)
    step_heads = max(1, min(heads, 4 * blocks.BLOCK // weights))
    step_rows = max(1, 4 * blocks.BLOCK // (weights * heads))
    for row in range(0, batch, step_rows):
        for head in range(0, heads, step_heads):
            block = slice(row, row + step_rows), slice(head, head + step_heads)
            yield [x if x is None else x[block] for x in (query, key, *others)]


def _probabilities(query, key, mask, scale):
    """P = softmax(s Q Kᵀ + M)"""
    scores = (query * scale) @ key.mT
    if mask is not None:
        scores += mask
    return scores.softmax(-1)


def _softmax_vjp(probabilities, cotangent):
    """P ∘ (C - Σ P ∘ C): the cotangent of the softmax's input for the cotangent C, and also its derivative along C"""
    return torch.ops.aten._softmax_backward_data(cotangent, probabilities, -1, probabilities.dtype)


class _Attention(Function):
    """O = P V"""

    @staticmethod
    def forward(ctx, query, key, value, mask, scale, through_theta):
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale, ctx.through_theta = scale, through_theta
        output = query.new_empty(*query.shape[:-1], value.size(-1))
        for q, k, v, m, out in _blocks(query, key, value, mask, output):
            torch.matmul(_probabilities(q, k, m, scale), v, out=out)
        return output

    @staticmethod
    def backward(ctx, output_bar):
        bars = _AttentionBackward.apply(*ctx.saved_tensors, output_bar.contiguous(), ctx.scale, ctx.through_theta)
        return *bars, None, None, None


class _AttentionBackward(Function):
    """V̄ = Pᵀ Ō, S̄ = P ∘ (G - Σ P ∘ G) with G = Ō Vᵀ, Q̄ = s S̄ K, K̄ = s S̄ᵀ Q"""

    @staticmethod
    def forward(ctx, query, key, value, mask, output_bar, scale, through_theta):
        ctx.save_for_backward(query, key, value, mask, output_bar)
        ctx.scale, ctx.through_theta = scale, through_theta
        bars = [torch.empty_like(x) for x in (query, key, value)]
        for q, k, v, m, o_bar, q_bar, k_bar, v_bar in _blocks(query, key, value, mask, output_bar, *bars):
            p = _probabilities(q, k, m, scale)
            torch.matmul(p.mT, o_bar, out=v_bar)
            s_bar = _softmax_vjp(p, o_bar @ v.mT).mul_(scale)
            torch.matmul(s_bar, k, out=q_bar)
            torch.matmul(s_bar.mT, q, out=k_bar)
        return tuple(bars)

    @staticmethod
    @once_differentiable
    def backward(ctx, a_query, a_key, a_value):
        """
        The derivative of O along the cotangents is Ȯ = Ṗ V + P a_V with Ṡ = s (a_Q Kᵀ + Q a_Kᵀ). It is the cotangent
        of Ō. The cotangents of Q, K and V are the gradients of ⟨Ō, Ȯ⟩ in them.
        """
        *saved, output_bar = ctx.saved_tensors
        query, key, value, mask = saved
        scale = ctx.scale
        outs = [torch.empty_like(x) for x in (output_bar, query, key, value)]
        cotangents = (a.contiguous() for a in (a_query, a_key, a_value))
        pieces = _blocks(query, key, value, mask, output_bar, *cotangents, *outs)
        for q, k, v, m, o_bar, a_q, a_k, a_v, to_o_bar, to_q, to_k, to_v in pieces:
            p = _probabilities(q, k, m, scale)
            s_dot = torch.matmul(a_q, k.mT).add_(q @ a_k.mT).mul_(scale)
            p_dot = _softmax_vjp(p, s_dot)
            torch.matmul(p_dot, v, out=to_o_bar).add_(p @ a_v)
            if not ctx.through_theta:
                continue
            torch.matmul(p_dot.mT, o_bar, out=to_v)
            g = o_bar @ v.mT
            s_bar = _softmax_vjp(p, g)
            # ∂⟨Ō, Ȯ⟩/∂P = G ∘ (Ṡ - Σ P ∘ Ṡ) - Ṡ Σ P ∘ G + Ō a_Vᵀ
            p_bar = (o_bar @ a_v.mT).addcmul_(s_dot, (p * g).sum(-1, keepdim=True), value=-1)
            p_bar.addcmul_(g, s_dot.sub_((p * s_dot).sum(-1, keepdim=True)))
            s_bar_bar = _softmax_vjp(p, p_bar).mul_(scale)
            s_bar.mul_(scale)
            torch.matmul(s_bar, a_k, out=to_q).add_(s_bar_bar @ k)
            torch.matmul(s_bar.mT, a_q, out=to_k).add_(s_bar_bar.mT @ q)
        if not ctx.through_theta:
            return None, None, None, None, outs[0], None, None
        return outs[1], outs[2], outs[3], None, outs[0], None, None
