"""
The yardstick: the whole fine-tuning as one autograd graph, differentiated in the data weights.

Written without anything of `trl_dpg`: weights as a dictionary, torch.optim's formulas step by step, one sample after
the other, no padding. In float64 without the float32 parts that transformers' norms and eager attention have.
"""

import copy
import functools
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def _rms_norm(module, x):
    """transformers' RMSNorm, Gemma's included, in the input's own type."""
    gemma = "Gemma" in type(module).__name__
    eps = module.eps if gemma else module.variance_epsilon
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * (module.weight + 1 if gemma else module.weight)


@sdpa_kernel(SDPBackend.MATH)
def unroll(
    model,
    samples,
    metric,
    weights,
    *,
    optimizer="adamw",
    lr=1e-2,
    betas=(0.9, 0.95),
    eps=1e-8,
    eps_root=1e-9,
    weight_decay=0.0,
    momentum=0.0,
    batch_size=4,
    order=None,
    normalization="example_tokens",
    max_length=16,
    max_grad_norm=None,
    lrs=None,
    dtype=torch.float64,
):
    """Returns ∂Φ/∂w `[N]`, ∂Φ/∂w_{i,k} `[N, L]`, Φ(θ_T) and the list of losses."""
    model = copy.deepcopy(model).to(dtype).train()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = functools.partial(_rms_norm, module)
    theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    initial = dict(theta)
    first = {name: torch.zeros_like(p) for name, p in theta.items()}
    second = {name: torch.zeros_like(p) for name, p in theta.items()}
    ids = [torch.tensor([sample["input_ids"]]) for sample in samples]
    labels = [torch.tensor([sample.get("labels", sample["input_ids"])]) for sample in samples]
    longest = max(x.size(1) for x in ids)
    weights = torch.as_tensor(weights, dtype=dtype)
    token_weights = weights[:, None].repeat(1, longest).requires_grad_()
    order = list(range(len(samples))) if order is None else order
    losses = []
    steps = [order[k : k + batch_size] for k in range(0, len(order), batch_size)]
    for t, rows in enumerate(steps):
        rate = lr if lrs is None else lrs[t]
        loss = 0.0
        for i in rows:
            out = torch.func.functional_call(model, theta, (ids[i],), {"use_cache": False})
            losses_i = F.cross_entropy(
                out.logits[0, :-1].to(dtype), labels[i][0, 1:], reduction="none", ignore_index=-100
            )
            count = int((labels[i][0, 1:] != -100).sum())
            if normalization == "example_tokens":
                divisor = count * len(rows)
            elif normalization == "max_length":
                divisor = max_length * len(rows)
            else:
                divisor = sum(int((labels[j][0, 1:] != -100).sum()) for j in rows)
            loss = loss + (token_weights[i, 1 : ids[i].size(1)] * losses_i).sum() / divisor
        losses.append(loss.item())
        gradients = dict(zip(theta, torch.autograd.grad(loss, list(theta.values()), create_graph=True), strict=True))
        if max_grad_norm is not None:
            norm = sum((g**2).sum() for g in gradients.values()).sqrt()
            factor = torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0)
            gradients = {name: g * factor for name, g in gradients.items()}
        updated = {}
        for name, p in theta.items():
            g = gradients[name]
            if optimizer == "adamw":
                first[name] = betas[0] * first[name] + (1 - betas[0]) * g
                second[name] = betas[1] * second[name] + (1 - betas[1]) * g * g
                m = first[name] / (1 - betas[0] ** (t + 1))
                v = second[name] / (1 - betas[1] ** (t + 1))
                # where v + eps_root = 0 the root's derivative is 0 (m = 0 there as well), not inf · 0
                positive = v + eps_root > 0
                root = torch.where(positive, torch.sqrt(torch.where(positive, v + eps_root, 1.0)), 0.0)
                updated[name] = p * (1 - rate * weight_decay) - rate * m / (root + eps)
            else:
                first[name] = momentum * first[name] + g + weight_decay * p
                updated[name] = p - rate * first[name]
        theta = updated
    value = metric(model, theta, initial)
    (token_scores,) = torch.autograd.grad(value, token_weights)
    return token_scores.sum(dim=1), token_scores, value.item(), losses


def log_likelihood(samples, dtype=torch.float64):
    """Φ = mean log-likelihood of the samples' tokens, one sample after the other."""

    def metric(model, theta, initial):
        total, count = 0.0, 0
        for sample in samples:
            ids = torch.tensor([sample["input_ids"]])
            logits = torch.func.functional_call(model, theta, (ids,), {"use_cache": False}).logits
            total = total - F.cross_entropy(logits[0, :-1].to(dtype), ids[0, 1:], reduction="sum")
            count += ids.size(1) - 1
        return total / count

    return metric


def cosine_lrs(lr, steps, warmup):
    """transformers' "cosine" schedule."""
    rates = []
    for t in range(steps):
        if t < warmup:
            rates.append(lr * t / warmup)
        else:
            rates.append(lr * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup))))
    return rates


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
