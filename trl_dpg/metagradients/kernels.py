"""
Kernels whose second derivative is written out.

The reverse sweep differentiates the backward pass of every operation. For most, autograd's own second derivative will
do. For a few it is a chain of elementwise passes over activations, or does not exist; those are replaced while the
student runs in a sweep:

- `scaled_dot_product_attention`: its fast kernels have no second derivative, its math kernel keeps several `[L, L]`
  tensors. Here the probabilities are computed again from queries and keys, some heads at a time, so that memory grows
  with L.
- `silu` and RMSNorm: some twenty passes become few.
- `linear`: in the reverse sweep the gradient g_t is known already, and only its graph is wanted. The weight gradients'
  values are left out: a third of the work of a backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


BLOCK = 1 << 20
"""Elements that are worked on at a time: their temporaries stay in the cache and are not allocated anew."""


class TwiceDifferentiable(TorchFunctionMode):
    """
    Runs `silu`, `rms_norm`, `scaled_dot_product_attention` and (with `skip_values`) `linear` and `addmm` by the
    kernels of this file. Dropout is taken to be off.

    Args:
        through_theta (`bool`):
            Whether the gradient will be differentiated in the parameters, too, and not only in the token weights.
        skip_values (`bool`):
            Leave out the values of weight gradients, which then are good for being differentiated only.
    """

    def __init__(self, through_theta: bool, skip_values: bool):
        super().__init__()
        self.through_theta = through_theta
        self.skip_values = skip_values

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.silu:
            return _SiLU.apply(args[0], self.through_theta)
        if function is F.rms_norm and _over_last_dimension(kwargs["weight"], kwargs["eps"]):
            return _RMSNorm.apply(args[0], kwargs["weight"], kwargs["eps"], self.through_theta)
        if function is F.scaled_dot_product_attention and args[0].dim() == 4:
            return _attention(self.through_theta, *args, **kwargs)
        if self.skip_values and function is F.linear and not kwargs and _is_parameter(args[1]):
            return _Linear.apply(*args, *[None] * (3 - len(args)))
        if (
            self.skip_values
            and function is torch.addmm
            and not kwargs
            and args[0].dim() == 1
            and _is_parameter(args[2])
        ):
            return _Linear.apply(args[1], args[2].mT, args[0])  # GPT-2's linear layer
        return function(*args, **kwargs)


def _is_parameter(weight: Tensor) -> bool:
    """Whether it is trained, and is no function of what is trained but for a cast."""
    if weight.grad_fn is None:
        return weight.requires_grad
    (source, _), *others = weight.grad_fn.next_functions
    return "ToCopy" in weight.grad_fn.name() and not others and source is not None and "Accumulate" in source.name()


def _over_last_dimension(weight: Tensor | None, eps: float | None) -> bool:
    return weight is not None and weight.dim() == 1 and eps is not None


class _Linear(Function):
    """Y = X Wᵀ + b"""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, y_bar):
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad
        x_bar = y_bar @ weight if needs_x else None
        bias_bar = y_bar.flatten(0, -2).sum(0) if needs_bias else None
        if torch.is_grad_enabled():  # a graph is built: the first derivative, which is g_t
            weight_bar = _WeightGradient.apply(y_bar, x, weight)
        else:
            weight_bar = y_bar.flatten(0, -2).mT @ x.flatten(0, -2)
        return x_bar, weight_bar, bias_bar


class _WeightGradient(Function):
    """W̄ = Ȳᵀ X, whose value is left out."""

    @staticmethod
    def forward(ctx, y_bar, x, weight):
        ctx.save_for_backward(y_bar, x)
        return weight.new_zeros(()).expand_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        y_bar, x = ctx.saved_tensors
        to_x = y_bar @ cotangent if ctx.needs_input_grad[1] else None
        return x @ cotangent.mT, to_x, None


class _SiLU(Function):
    """y = x σ(x)"""

    @staticmethod
    def forward(ctx, x, through_theta):
        ctx.save_for_backward(x)
        ctx.through_theta = through_theta
        return F.silu(x)

    @staticmethod
    def backward(ctx, y_bar):
        (x,) = ctx.saved_tensors
        return _SiLUBackward.apply(y_bar, x, ctx.through_theta), None


class _SiLUBackward(Function):
    """x̄ = ȳ f'(x) with f'(x) = σ (1 + x (1 - σ))"""

    @staticmethod
    def forward(ctx, y_bar, x, through_theta):
        ctx.save_for_backward(y_bar, x)
        ctx.through_theta = through_theta
        return torch.ops.aten.silu_backward(y_bar, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        """f''(x) = σ (1 - σ) (2 + x (1 - 2σ))"""
        y_bar, x = ctx.saved_tensors
        to_y_bar = torch.ops.aten.silu_backward(cotangent, x)
        if not ctx.through_theta:
            return to_y_bar, None, None
        to_x = torch.empty_like(x, memory_format=torch.contiguous_format)  # written through flat views
        flat = (tensor.reshape(-1).split(BLOCK) for tensor in (x, y_bar, cotangent, to_x))
        for x, y_bar, cotangent, out in zip(*flat, strict=True):
            sigmoid = torch.sigmoid(x)
            torch.mul(sigmoid, -2, out=out).add_(1).mul_(x).add_(2).mul_(y_bar).mul_(cotangent).mul_(sigmoid)
            out.mul_(sigmoid.neg_().add_(1))
        return to_y_bar, to_x, None


class _RMSNorm(Function):
    """y = w ∘ n with n = r x and r = (mean(x²) + eps)^(-1/2) over the last dimension; n in float32 or wider"""

    @staticmethod
    def forward(ctx, x, weight, eps, through_theta):
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.through_theta = eps, through_theta
        return weight * _normalized(x, eps)[0].to(x.dtype)

    @staticmethod
    def backward(ctx, y_bar):
        return *_RMSNormBackward.apply(*ctx.saved_tensors, y_bar, ctx.eps, ctx.through_theta), None, None


def _normalized(x, eps):
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.linalg.vecdot(x, x).div_(x.size(-1)).add_(eps).rsqrt_().unsqueeze(-1)
    return x * r, r


def _mean(a, b):
    return torch.linalg.vecdot(a, b).div_(a.size(-1)).unsqueeze(-1)


class _RMSNormBackward(Function):
    """x̄ = r (c - n mean(n ∘ c)) with c = w ∘ ȳ, and w̄ = Σ ȳ ∘ n"""

    @staticmethod
    def forward(ctx, x, weight, y_bar, eps, through_theta):
        ctx.save_for_backward(x, weight, y_bar)
        ctx.eps, ctx.through_theta = eps, through_theta
        n, r = _normalized(x, eps)
        c = weight * y_bar
        x_bar = torch.addcmul(c, n, _mean(n, c.to(n.dtype)), value=-1).mul_(r)
        weight_bar = n.mul_(y_bar).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return x_bar.to(x.dtype), weight_bar

    @staticmethod
    @once_differentiable
    def backward(ctx, a, a_weight):
        """
        The derivative of n along a is ṅ = r (a - n mean(n ∘ a)); ȳ's cotangent is w ∘ ṅ + a_w ∘ n. With m_c = mean(n ∘
        c) and so on, the gradient of ⟨c, ṅ⟩ in x is r² (n (3 m_c m_a - m_ca) - m_a c - m_c a).
        """
        x, weight, y_bar = ctx.saved_tensors
        n, r = _normalized(x, ctx.eps)
        a = a.to(n.dtype)
        m_a = _mean(n, a)
        n_dot = torch.addcmul(a, n, m_a, value=-1).mul_(r)
        to_y_bar = weight * n_dot
        if ctx.needs_input_grad[1]:
            to_y_bar.addcmul_(n, a_weight)
        if not ctx.through_theta:
            return None, None, to_y_bar.to(y_bar.dtype), None, None
        c = (weight * y_bar).to(n.dtype)
        m_c = _mean(n, c)
        to_x = (n * (3 * m_c * m_a - _mean(c, a))).addcmul_(c, m_a, value=-1).addcmul_(a, m_c, value=-1).mul_(r * r)
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = n_dot.mul_(y_bar).flatten(0, -2).sum(0).to(weight.dtype)
            # ⟨a_w ∘ ȳ, n⟩ in x
            b = (a_weight * y_bar).to(n.dtype)
            to_x += b.addcmul_(n, _mean(n, b), value=-1).mul_(r)
        return to_x.to(x.dtype), to_weight, to_y_bar.to(y_bar.dtype), None, None


def _attention(
    through_theta, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """`scaled_dot_product_attention` of `[B, H, L, E]` tensors, in float32 or wider."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.size(-3) // x.size(-3), -3) for x in (key, value))
    if is_causal:
        size = query.size(-2), key.size(-2)
        attn_mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()
    dtype = query.dtype
    query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
    if attn_mask is not None:
        least = torch.finfo(query.dtype).min  # not -inf: a row of padding may see nothing at all
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, least)
        attn_mask = attn_mask.clamp(min=least).expand(query.size(0), query.size(1), -1, -1)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    query, key, value = (x.contiguous() for x in (query, key, value))  # or every product copies them
    if attn_mask is not None and attn_mask.requires_grad:  # a learned bias
        return (((query * scale) @ key.mT + attn_mask).softmax(-1) @ value).to(dtype)
    return _Attention.apply(query, key, value, attn_mask, scale, through_theta).to(dtype)


def _blocks(query: Tensor, key: Tensor, *others: Tensor | None):
    """Slices of `[B, H, ...]` tensors, whole heads, whose attention weights fill a block; contiguous if those are."""
    batch, heads = query.shape[:2]
    weights = query.size(2) * key.size(2)
    step_heads = max(1, min(heads, 4 * BLOCK // weights))
    step_rows = max(1, 4 * BLOCK // (weights * heads))
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
    """P ∘ (C - Σ P ∘ C), the cotangent of the softmax's input; also its derivative along C"""
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
        The derivative of O along the cotangents is Ȯ = Ṗ V + P a_V with Ṡ = s (a_Q Kᵀ + Q a_Kᵀ); it is the cotangent
        of Ō. Those of Q, K and V are the gradient of ⟨Ō, Ȯ⟩.
        """
        *saved, output_bar = ctx.saved_tensors
        query, key, value, mask = saved
        scale = ctx.scale
        outs = [torch.empty_like(x) for x in (output_bar, query, key, value)]
        cotangents = (a.contiguous() for a in (a_query, a_key, a_value))
        blocks = _blocks(query, key, value, mask, output_bar, *cotangents, *outs)
        for q, k, v, m, o_bar, a_q, a_k, a_v, to_o_bar, to_q, to_k, to_v in blocks:
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
