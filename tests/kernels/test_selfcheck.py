"""The self-check before a first use: what it runs, what it minds nothing of, and that it catches a wrong kernel."""

from collections.abc import Callable
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch

from moe_kernels import KernelError, configs, resolve, tiles
from moe_kernels import backend as backend_module
from moe_kernels.quantise import Quantised
from moe_kernels.selfcheck import check_kernels


@pytest.mark.interpreter
def test_self_check_covers_every_family_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes in the interpreter, with all of the table for 16 bits: each family is another program to the compiler,
    and any of them may be the one that training uses. Some expert has more rows than one tile."""
    assert resolve("triton", "cpu") == "triton"
    assert resolve(None, "cpu") == "torch"
    seen, several = set(), set()
    make_config, make_tiles = configs.config_for, tiles.schedule_tiles

    def config_for(kernel: str, dtype: torch.dtype, device: torch.device, block: int, aligned: bool) -> Any:
        seen.add((kernel, block, aligned))
        return make_config(kernel, dtype, device, block, aligned)

    def schedule_tiles(offsets: torch.Tensor, n_rows: int, block: int) -> Any:
        if int(offsets.diff().max()) > block:
            several.add(block)
        return make_tiles(offsets, n_rows, block)

    for file in ("gemm_triton", "mlp_triton"):
        monkeypatch.setattr(import_module(f"moe_kernels.{file}"), "config_for", config_for)
    for file in ("gemm", "mlp_triton"):
        monkeypatch.setattr(import_module(f"moe_kernels.{file}"), "schedule_tiles", schedule_tiles)
    check_kernels("cpu")
    kernels = ("product", "swiglu", "swiglu_backward", "wgrad", "wgrad_gathered")
    assert seen == set(product(kernels, (16, 64, 128), (True, False)))
    assert several == {16, 64, 128}


def only_family(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """One kind of tiles and small products: the interpreter is slow."""
    for file in ("gemm", "mlp"):
        monkeypatch.setattr(import_module(f"moe_kernels.{file}"), "families", lambda dtype: [(block, False)])
        monkeypatch.setattr(import_module(f"moe_kernels.{file}"), "widths", lambda block, aligned: (33, 35))


@pytest.fixture
def one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest tiles only: what is asked does not depend on them."""
    only_family(monkeypatch, 16)


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_family")
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_self_check_minds_no_mode_of_the_caller(default: torch.dtype) -> None:
    """The first use may come in inference, under autocast, where new tensors go elsewhere or are of another dtype."""
    torch.set_default_dtype(default)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            check_kernels("cpu")
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_family")
def test_self_check_is_no_part_of_a_recomputed_layer() -> None:
    """The first use may come in a checkpointed layer: its backward makes the layer again, not the check's numbers."""
    calls = 0

    def layer(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 1:
            check_kernels("cpu")
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert calls == 2
    assert torch.equal(x.grad, torch.ones(2).cos())


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_family")
def test_self_check_resolves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolving waits for the check, so a check that resolved would wait for ever."""

    def refuse(*args: Any) -> str:
        raise AssertionError("resolved")

    for file in ("dispatch", "gemm", "mlp", "routing"):
        monkeypatch.setattr(import_module(f"moe_kernels.{file}"), "resolve", refuse)
    check_kernels("cpu")


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_family")
@pytest.mark.parametrize(
    ("op", "file", "function", "wrong"),
    [
        ("grouped_gemm", "gemm_triton", "product", "y"),
        ("grouped_gemm", "gemm_triton", "wgrad", "dw"),
        ("expert_mlp", "mlp_triton", "swiglu_product", "y"),
        ("expert_mlp", "mlp_triton", "product", "y"),
        ("expert_mlp", "mlp_triton", "swiglu_backward_product", "dx"),
        ("expert_mlp", "mlp_triton", "wgrad", "dgate_up"),
        ("expert_mlp", "combine", "_sum_triton", "y"),
        ("topk_route", "routing_forward", "_forward_triton", "weight"),
        ("topk_route", "routing_backward", "_backward_triton", "d_logits"),
    ],
)
def test_self_check_catches_a_kernel_one_percent_off(
    monkeypatch: pytest.MonkeyPatch, op: str, file: str, function: str, wrong: str
) -> None:
    """A gradient that is wrong by a percent would go unnoticed in a loss curve."""
    module = import_module(f"moe_kernels.{file}")
    right = getattr(module, function)

    def off(*args: Any) -> Any:
        out = right(*args)
        if isinstance(out, tuple):
            return tuple(part * 1.01 if part.is_floating_point() else part for part in out)
        return out * 1.01

    monkeypatch.setattr(module, function, off)
    with pytest.raises(KernelError, match=f"{op} {wrong} "):
        backend_module._checks[op].run(torch.device("cpu"), torch.float32)


FP32, FP16 = torch.float32, torch.float16


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("op", "dtype", "block", "file", "function", "concerned", "wrong"),
    [
        pytest.param(*case[1:], id=case[0])
        for case in (
            ("fp16", "expert_mlp", FP16, 16, "mlp_triton", "product", lambda x, *_: True, "y .* in float16"),
            ("fp16-gemm", "grouped_gemm", FP16, 16, "gemm_triton", "wgrad", lambda *_: True, "dw .* in float16"),
            ("fp16-logits", "topk_route", FP16, 16, "routing_forward", "_forward_triton", lambda *_: True, "weight "),
            (
                "transposed", "grouped_gemm", FP32, 16, "gemm_triton", "product",
                lambda x, w, *_: not w.is_contiguous(), "y .* transposed weights",
            ),
            (
                "transposed-gate-up", "expert_mlp", FP32, 16, "mlp_triton", "swiglu_product",
                lambda x, gate_up, *_: not gate_up.is_contiguous(), "y .* weighting before",
            ),
            (
                "transposed-down", "expert_mlp", FP32, 16, "mlp_triton", "swiglu_backward_product",
                lambda dy, down, *_: not down.is_contiguous(), "dx .* weighting before",
            ),
            (
                "weighting-none", "expert_mlp", FP32, 64, "mlp_triton", "swiglu_product",
                lambda *args: args[5] == "none", "y .* weighting none",
            ),
            (
                "weighting-before", "expert_mlp", FP32, 16, "mlp_triton", "swiglu_backward_product",
                lambda *args: args[6] == "before", "dx .* weighting before",
            ),
            (
                "without-gradients", "expert_mlp", FP32, 16, "mlp_triton", "swiglu_product",
                lambda *args: not args[6], "y without gradients",
            ),
            (
                "fp32-masters", "expert_mlp", FP16, 16, "mlp_triton", "wgrad",
                lambda *args: args[3] == FP32, "dgate_up .* in float32",
            ),
        )
    ],
)  # fmt: skip
def test_self_check_catches_what_only_some_calls_launch(
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    dtype: torch.dtype,
    block: int,
    file: str,
    function: str,
    concerned: Callable[..., bool],
    wrong: str,
) -> None:
    """Each is a kernel of its own to the compiler; that one alone computes a percent too much, and is refused in one
    sentence."""
    only_family(monkeypatch, block)
    module = import_module(f"moe_kernels.{file}")
    right = getattr(module, function)

    def off(*args: Any) -> Any:
        out = right(*args)
        if not concerned(*args):
            return out
        parts = out if isinstance(out, tuple) else (out,)
        more = tuple(part * 1.01 if part.is_floating_point() else part for part in parts)
        return more if isinstance(out, tuple) else more[0]

    check = backend_module._checks[op]
    monkeypatch.setattr(module, function, off)
    with pytest.raises(KernelError, match=f"^{op} {wrong}") as caught:
        check.run(torch.device("cpu"), dtype)
    assert str(caught.value).endswith("pass backend='torch' or install another triton")
    assert "\n" not in str(caught.value)


@pytest.mark.interpreter
@pytest.mark.parametrize("op", ["expert_mlp", "grouped_gemm", "topk_route"])
@pytest.mark.usefixtures("one_family")
def test_self_check_passes_in_fp16(op: str) -> None:
    """Its bound has room for the rounding to 11 bits, and for no percent."""
    backend_module._checks[op].run(torch.device("cpu"), FP16)


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_family")
@pytest.mark.parametrize("position", [0, 1, 2], ids=["order", "place", "offsets"])
def test_self_check_catches_one_row_out_of_place(monkeypatch: pytest.MonkeyPatch, position: int) -> None:
    """Sorting has no one percent: a single wrong index is one too many."""
    from moe_kernels import dispatch

    right = dispatch._sort_triton

    def off(*args: Any) -> Any:
        out = right(*args)
        out[position][3] += 1
        return out

    monkeypatch.setattr(dispatch, "_sort_triton", off)
    with pytest.raises(KernelError, match="sort_by_expert"):
        check_kernels("cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("function", "wrong"), [("_rows_triton", "y"), ("_weight_triton", "y"), ("_columns_triton", "dgate_up")]
)
def test_self_check_catches_scales_of_other_tiles(monkeypatch: pytest.MonkeyPatch, function: str, wrong: str) -> None:
    """Products in 8 bits with each scale where its neighbour's belongs."""
    from moe_kernels import quantise

    right = getattr(quantise, function)

    def off(*args: Any) -> Quantised:
        values, scales = right(*args)
        return Quantised(values, scales.roll(1, -1))

    monkeypatch.setattr(quantise, function, off)
    with pytest.raises(KernelError, match=f"^expert_mlp in fp8 {wrong} "):
        backend_module._checks["expert_mlp in fp8"].run(torch.device("cpu"), torch.float32)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("position", "wrong"), [(4, "load"), (5, "margins"), (6, "preferred"), (7, "shares")], ids=lambda x: str(x)
)
def test_self_check_catches_a_wrong_statistic(monkeypatch: pytest.MonkeyPatch, position: int, wrong: str) -> None:
    """One count too many, or a share that is a percent off."""
    from moe_kernels import routing_forward

    right = routing_forward._forward_triton

    def off(*args: Any) -> Any:
        out = list(right(*args))
        if out[position].numel():
            out[position].view(-1)[3] += 0.05 * out[position].max() if wrong == "shares" else 1
        return tuple(out)

    monkeypatch.setattr(routing_forward, "_forward_triton", off)
    with pytest.raises(KernelError, match=f"topk_route {wrong} "):
        backend_module._checks["topk_route"].run(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("nudge", [-1e-6, 1e-6])  # ten times what rounding does; equal scores stay equal
def test_margins_of_the_self_check_lie_inside_their_bins(monkeypatch: pytest.MonkeyPatch, nudge: float) -> None:
    """Devices differ in the last bits of a score; no count of the check may hang on one."""
    from moe_kernels import routing_forward
    from moe_kernels.agreement import Side

    here = Side("torch", torch.device("cpu"), torch.float32, torch.float32)
    want = backend_module._checks["topk_route"].probe(here)["margins (margins)"]
    right = routing_forward.margin_histogram
    monkeypatch.setattr(
        routing_forward,
        "margin_histogram",
        lambda selection, *rest: right(selection + nudge * torch.sin(1e4 * selection), *rest),
    )
    assert torch.equal(backend_module._checks["topk_route"].probe(here)["margins (margins)"], want)


@pytest.mark.parametrize(
    ("capability", "left_out"), [((8, 0), {"expert_mlp in fp8"}), ((8, 9), set()), ((9, 0), set())]
)
def test_what_a_device_cannot_do_is_not_checked(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], left_out: set[str]
) -> None:
    """An A100 has no products in 8 bits, and refuses them; all else is checked there."""
    monkeypatch.setattr("moe_kernels.agreement.capability_of", lambda device: capability)
    checks = backend_module.registered_checks()
    assert {check.op for check in checks if not check.runs_on(torch.device("cuda"))} == left_out


@pytest.mark.gpu
def test_self_check_passes_on_this_gpu() -> None:
    """What a first use on this device runs."""
    ops = {"expert_mlp", "expert_mlp in fp8", "grouped_gemm", "sort_by_expert", "topk_route"}
    assert {check.op for check in backend_module.registered_checks()} == ops
    assert resolve(None, "cuda") == "triton"
