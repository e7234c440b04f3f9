"""The battery's first part: what the device allows at our shapes, and whether every kernel of ours is right on it."""

from collections.abc import Iterable
from contextlib import contextmanager
from functools import partial
from math import log
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from step1x.bench.battery import Run
from step1x.kernels.aot import modules
from step1x.kernels.attention import joined
from step1x.kernels.attention_backends import available, choose
from step1x.kernels.checks import relative_errors, tensors
from step1x.kernels.launch import Example, Op

if TYPE_CHECKING:
    from collections.abc import Iterator

# Both guidance branches at 1024 x 1024, and the rows, inner and outer widths of the transformer's large products.
ROWS = {"full": 2 * 8832, "smoke": 128}
WIDTHS = {
    "full": {"qkv": (3072, 9216), "mlp": (3072, 12288), "linear1": (3072, 21504), "linear2": (15360, 3072)},
    "smoke": {"linear1": (192, 1344)},
}
# Heads, head_dim, and rows of text and image at 512, 768 and 1024, padding collapsed.
ATTENTION = {"full": (24, 128, (2400, 4960, 8544)), "smoke": (6, 32, (112,))}
TEXT_ROWS = {"full": 352, "smoke": 48}
COPY_BYTES = {"full": 1 << 30, "smoke": 1 << 22}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative error against float32
FP8_BOUND = 5e-2  # two operands with three bits of mantissa
EIGHT_BIT = ("sage", "fp8")  # attention backends that round q, k, v or the weights to 8 bits
EIGHT_BIT_BOUND = 0.1


def kernels(run: Run) -> None:
    size = "smoke" if run.smoke else "full"
    _copy(run, COPY_BYTES[size])
    for name, (inner, outer) in WIDTHS[size].items():
        _products(run, name, ROWS[size], inner, outer)
    heads, head_dim, lengths = ATTENTION[size]
    for length in lengths:
        _attention(run, (2, heads, length, head_dim))
        _backends(run, (2, heads, length, head_dim), TEXT_ROWS[size])
    ops = our_kernels()
    run.notes["kernels"] = f"{check_kernels(run, ops)} of ours checked"
    for name, arguments in at_full_size(run, heads, head_dim, lengths[-1], TEXT_ROWS[size]):
        if not run.late(f"kernel {name} against its compiled reference"):
            _against_reference(run, next(op for op in ops if op.name == name), arguments)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """‖out - expected‖ / ‖expected‖, as `relative_errors` has it."""
    return relative_errors(out, expected).item()


def require(what: str, error: float, bound: float) -> None:
    """Raises RuntimeError if an error is above its bound."""
    if error > bound:
        raise RuntimeError(f"{what}: relative error {error:.3g}, at most {bound:.3g} is right")


def _copy(run: Run, size: int) -> None:
    source = torch.randint(256, (size,), dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    seconds = run.seconds(lambda: target.copy_(source), 20)
    run.put("ceiling.copy", 2 * size / seconds, "B/s", "info", higher=True)


def _products(run: Run, name: str, rows: int, inner: int, outer: int) -> None:
    """Rates of x @ w in the model's dtype and in fp8 with a scale per row and column."""
    x = torch.randn(rows, inner, device=run.device, dtype=run.dtype)
    w = torch.randn(outer, inner, device=run.device, dtype=run.dtype)
    flops = 2 * rows * inner * outer
    run.put(f"ceiling.gemm_{name}", flops / run.seconds(lambda: x @ w.T), "FLOP/s", "info", higher=True)
    exact = x.float() @ w.float().T
    require(f"product {name}", relative_error(x @ w.T, exact), BOUND[run.dtype])
    if run.device.type == "cuda" and torch.cuda.get_device_capability(run.device) < (8, 9):
        run.notes["fp8"] = "this GPU has no fp8 products"
        return
    (x8, x_scale), (w8, w_scale) = _to_fp8(x), _to_fp8(w)

    def product() -> Tensor:
        return torch._scaled_mm(x8, w8.T, x_scale, w_scale.T, out_dtype=torch.bfloat16)

    run.put(f"ceiling.fp8_gemm_{name}", flops / run.seconds(product), "FLOP/s", "info", higher=True)
    require(f"fp8 product {name}", relative_error(product(), exact), FP8_BOUND)


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x in e4m3, each scaled to its range, and the scales (rows, 1) float32."""
    scale = x.abs().amax(1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def _attention(run: Run, shape: tuple[int, int, int, int]) -> None:
    q, k, v = (torch.randn(shape, device=run.device, dtype=run.dtype) for _ in range(3))
    batch, heads, rows, head_dim = shape
    flops = 4 * batch * heads * head_dim * rows**2
    few = slice(0, 64)  # queries that are checked, all heads
    scores = q[:, :, few].float() @ k.float().transpose(2, 3) * head_dim**-0.5
    exact = scores.softmax(-1) @ v.float()
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v)
                seconds = run.seconds(lambda: F.scaled_dot_product_attention(q, k, v))
        except RuntimeError as error:
            run.notes[f"attention {name}"] = f"refused: {str(error).splitlines()[0][:80]}"
            continue
        require(f"attention {name} of {rows} rows", relative_error(out[:, :, few], exact), BOUND[run.dtype])
        run.put(f"ceiling.attention_{name}_{rows}", flops / seconds, "FLOP/s", "info", higher=True)


def _backends(run: Run, shape: tuple[int, int, int, int], texts: int) -> None:
    """Who computes attention with collapsed padding fastest (kernels/attention_backends.py)."""
    q, k, v = (torch.randn(shape, device=run.device, dtype=run.dtype) for _ in range(3))
    batch, heads, rows, head_dim = shape
    bias, biased = torch.zeros(batch, rows, device=run.device), slice(texts - 2, texts)
    bias[:, biased] = log(145.0)
    few = slice(0, 64)  # queries that are checked, all heads
    scores = q[:, :, few].float() @ k.float().transpose(2, 3) * head_dim**-0.5 + bias[:, None, None]
    exact = joined(scores.softmax(-1) @ v.float())
    for name in available(run.device):
        attend = choose(name, run.device, biased)
        bound = EIGHT_BIT_BOUND if name in EIGHT_BIT else BOUND[run.dtype]
        require(f"attention {name} of {rows} rows", relative_error(attend(q, k, v, bias)[:, few], exact), bound)
        seconds = run.seconds(partial(attend, q, k, v, bias))
        run.put(f"attention.{rows}.{name}.seconds", seconds, "s", "stage")
        rate = 4 * batch * heads * head_dim * rows**2 / seconds
        run.put(f"attention.{rows}.{name}.rate", rate, "FLOP/s", "info", higher=True)


def at_full_size(run: Run, heads: int, head_dim: int, rows: int, texts: int) -> "Iterator[tuple[str, Example]]":
    """Arguments of the operations that move memory, as both branches of a step give them; rows: text and image."""
    width = heads * head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=run.device, dtype=run.dtype)

    vectors = [normal(2, 1, width) for _ in range(3)]
    x, y = normal(2, rows, width), normal(2, rows, width)
    for kind in ("", "_fp8"):
        yield f"gated_residual_adaln{kind}", (x, vectors[0], y, False, *vectors[1:], True)
        yield f"adaln{kind}", (x, *vectors[:2], True)
    yield "gated_residual", (x, vectors[0], y, False)
    for name in ("gelu_join", "gelu_quant"):
        yield name, (x, normal(2, rows, 4 * width))
    table = torch.rand(2, 1, 1, rows, head_dim // 2, device=run.device)
    qkv = normal(2, rows - texts, 3 * width), normal(2, texts, 3 * width)
    yield "qk_norm_rope", (*qkv, normal(2, head_dim), normal(2, head_dim), *table, heads)
    targets = (rows - texts) // 2
    yield "cfg_step", (normal(1, targets, 64), normal(2, targets, 64), 6.0, -0.03, True, "pure")


def _against_reference(run: Run, op: Op, arguments: Example) -> None:
    """A kernel against its compiled reference, and the bandwidth of both against a copy's."""
    torch._dynamo.reset()
    compiled = torch.compile(op.reference, dynamic=False, backend="aot_eager" if run.smoke else "inductor")
    ours, reference = (run.seconds(partial(call, *arguments)) for call in (op.call, compiled))
    given = [one for one in (*arguments, *tensors(op.call(*arguments))) if isinstance(one, Tensor)]
    copied = run.metrics["ceiling.copy"].value * ours
    run.put(f"kernel.{op.name}.at_full_size", ours, "s", "stage")
    run.put(f"kernel.{op.name}.times_compiled", reference / ours, "", "info", higher=True)
    run.put(f"kernel.{op.name}.of_copy", sum(one.nbytes for one in given) / copied, "", "info", higher=True)


def our_kernels() -> list[Op]:
    """Every operation of kernels/."""
    return [op for module in modules() for op in module.OPS]


def check_kernels(run: Run, ops: Iterable[Op]) -> int:
    """Each op on its own examples, against its reference in float32; returns how many there were.

    Compared are the results and the arguments, since an op may write to some. Memory is poisoned with NaN before it is
    handed out. Raises RuntimeError for the first that is wrong.
    """
    checked = 0
    for op in ops:
        for arguments in op.examples(run.device, run.dtype):
            wide = [_widened(one) for one in arguments]
            with poisoned():
                out = op.call(*arguments)
            exact = op.reference(*wide)
            for one, expected in zip((*tensors(out), *arguments), (*tensors(exact), *wide), strict=True):
                if isinstance(one, Tensor):
                    bound = FP8_BOUND if one.dtype.itemsize == 1 else BOUND[run.dtype]
                    require(f"kernel {op.name}", relative_error(one, expected), bound)
        run.put(f"kernel.{op.name}", run.seconds(partial(op.call, *arguments)), "s", "stage")
        checked += 1
    return checked


def _widened(argument: Any) -> Any:
    """A copy of a tensor, in float32 if it is of floats; fp8 stays, since its scale is an argument of its own."""
    if not isinstance(argument, Tensor):
        return argument
    wide = argument.is_floating_point() and argument.dtype.itemsize > 1
    return argument.to(torch.float32 if wide else argument.dtype, copy=True)


@contextmanager
def poisoned() -> "Iterator[None]":
    """Fresh memory is NaN (torch fills it in its deterministic mode): what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
