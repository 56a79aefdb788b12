"""What a training step is made of: the rate of its matrix products, and the time of each part by itself."""

import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from moe import ModelConfig, Transformer
from moe.layers import FeedForward, MoE
from moe_kernels.combine import sum_slots
from moe_kernels.dispatch import sort_rows

__all__ = ["best_s", "parts_ms", "product_rate", "train_layer"]


def best_s(work: Callable[[], object], repeats: int = 5) -> float:
    """The shortest of some calls, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def product_rate(config: ModelConfig, tokens: int, dtype: torch.dtype) -> float:
    """Operations per second of the step's matrix products, each shape by itself on matrices that lie in the cache.

    Forward, input's and weight's gradient of every linear map, weighted by how much of the step it is.
    """
    operations = spent_s = 0.0
    for (rows, inputs, outputs), count in _products(config, tokens).items():
        x, w = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        dy = torch.randn(rows, outputs).to(dtype)
        once = best_s(lambda x=x, w=w: x @ w.t()) + best_s(lambda dy=dy, w=w: dy @ w)
        once += best_s(lambda dy=dy, x=x: dy.t() @ x)
        operations += count * 6 * rows * inputs * outputs
        spent_s += count * once
    return operations / spent_s


def _products(config: ModelConfig, tokens: int) -> dict[tuple[int, int, int], int]:
    """(rows, inputs, outputs) of each linear map to how often a forward pass has it; load is even."""
    shapes: dict[tuple[int, int, int], int] = {}
    with torch.device("meta"):
        model = Transformer(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shape = (tokens, module.in_features, module.out_features)
            shapes[shape] = shapes.get(shape, 0) + 1
        elif isinstance(module, MoE):
            rows = max(1, tokens * config.num_experts_per_tok // config.n_routed_experts)
            for stack in (module.experts.gate_up_proj, module.experts.down_proj):
                experts, outputs, inputs = stack.shape
                shapes[rows, inputs, outputs] = shapes.get((rows, inputs, outputs), 0) + experts
    return shapes


def train_layer(layer: nn.Module, x: Tensor, bf16: bool, *more: Tensor) -> Callable[[], object]:
    """Forward and backward of a layer over `x`, gradients of its parameters too."""
    leaf = x.detach().requires_grad_()

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            out = layer(leaf, *more)
        out.backward(torch.ones_like(out))
        layer.zero_grad(set_to_none=True)
        leaf.grad = None

    return work


def parts_ms(model: Transformer, optimizer: torch.optim.Optimizer, ids: Tensor, bf16: bool) -> dict[str, float]:
    """Milliseconds of all layers' share in a step, each part measured alone, forward and backward, best of five.

    What is missing to a whole step: embedding, residuals, the balancer, and what parts push out of each other's cache.
    """
    config = model.config
    x = torch.randn(*ids.shape, config.hidden_size)
    flat = x.flatten(0, 1)
    dense_layers = sum(not config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    moe_layers = config.num_hidden_layers - dense_layers
    found = {"norms": (2 * config.num_hidden_layers + 1) * best_s(train_layer(model.norm, x, bf16))}
    found["attention"] = config.num_hidden_layers * best_s(train_layer(model.layers[0].self_attn, x, bf16))
    first = model.layers[0].mlp
    if isinstance(first, FeedForward):
        found["dense feed-forward"] = dense_layers * best_s(train_layer(first, x, bf16))
    last = model.layers[-1].mlp
    if isinstance(last, MoE):
        found |= {name: moe_layers * spent_s for name, spent_s in _mixture_s(last, flat, bf16).items()}
    found["head and loss"] = best_s(train_layer(model.lm_head, x, bf16, ids))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    found["clipping"] = best_s(lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    found["AdamW"] = best_s(optimizer.step)
    optimizer.zero_grad(set_to_none=True)
    return {name: round(spent_s * 1e3, 1) for name, spent_s in found.items()}


def _mixture_s(layer: MoE, x_TD: Tensor, bf16: bool) -> dict[str, float]:
    """Router, the experts with what brings rows to them and back, that alone, and the shared experts."""
    route = layer.router(x_TD)
    index, weight, counts = route.topk_index_TK, route.topk_weight_TK.detach(), route.tokens_per_expert_E
    leaf = x_TD.detach().requires_grad_()

    def route_and_back() -> None:
        layer.router(leaf).topk_weight_TK.sum().backward()
        layer.router.forget()

    def dispatch() -> None:
        order, place, _ = sort_rows(index, len(counts), counts, "torch")
        rows = x_TD.to(torch.bfloat16 if bf16 else x_TD.dtype)
        for _ in range(3):  # x forward, dy and x backward
            gathered = rows.index_select(0, order // index.shape[1])
        for _ in range(2):  # y forward, dx backward
            sum_slots(gathered, place, index.shape[1], "torch")

    found = {"router": best_s(route_and_back), "dispatch and combine": best_s(dispatch)}
    found["experts"] = best_s(train_layer(layer.experts, x_TD, bf16, index, weight, counts))
    found["experts"] -= found["dispatch and combine"]
    layer.zero_grad(set_to_none=True)
    if layer.shared_experts is not None:
        found["shared experts"] = best_s(train_layer(layer.shared_experts, x_TD, bf16))
    return found
