"""Classifier-free guidance and the Euler step of the sampler in one pass over the prediction.

cfg_step: latents + length * (u + guidance * d), where c and u are the conditional and the unconditional half of the
prediction, and d = c - u, divided per token by ||d||^0.4 where the norm rule holds and ||d|| is above 1. Formula:
model.md §5.4. In plain torch this is up to 12 launches on tensors of half a megabyte; here one, which reads the
latents and both halves once and writes the result once.

`flow` is the variant's dtype flow. It says which intermediates are rounded to the prediction's dtype:

                    rescaled difference and after    step                result
    autocast-state  prediction's                     prediction's        of latents and prediction, promoted
    autocast-fp32   float32                          float32             float32
    pure            prediction's                     float32             prediction's
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from step1x.kernels.launch import Compilation, Example, adjacent, define, jit_for_sizes, tl, triton

FLOWS = ("autocast-state", "autocast-fp32", "pure")
POWER = 0.4  # of the norm that the difference is divided by
LAUNCH = {"num_warps": 4, "num_stages": 1}


def _check(latents: Tensor, prediction: Tensor, flow: str) -> None:
    if flow not in FLOWS:
        raise ValueError(f"flow must be one of {', '.join(FLOWS)}, got {flow!r}")
    if latents.ndim != 3 or prediction.shape != (2 * latents.shape[0], *latents.shape[1:]):
        raise ValueError(
            "latents must be (batch, tokens, channels) and prediction twice the batch, "
            f"got {tuple(latents.shape)} and {tuple(prediction.shape)}"
        )


def _result_dtype(latents: Tensor, prediction: Tensor, flow: str) -> torch.dtype:
    if flow == "pure":
        return prediction.dtype
    return torch.promote_types(latents.dtype, prediction.dtype if flow == "autocast-state" else torch.float32)


def cfg_step_reference(
    latents: Tensor, prediction: Tensor, guidance: float, length: float, rescaled: bool, flow: str
) -> Tensor:
    """latents (batch, tokens, channels); prediction (2 * batch, tokens, channels), conditional rows first.

    length: following t minus this t. rescaled: whether the norm rule holds at this step.
    """
    _check(latents, prediction, flow)
    cond, uncond = prediction.chunk(2)
    difference = cond - uncond
    if rescaled:
        if flow == "autocast-fp32":
            difference = difference.to(torch.promote_types(difference.dtype, torch.float32))
        size = difference.norm(dim=-1, keepdim=True)
        difference = difference / torch.where(size > 1, size**POWER, 1)
    velocity = uncond + guidance * difference
    if flow != "autocast-state":
        wide = torch.promote_types(latents.dtype, torch.float32)
        latents, velocity = latents.to(wide), velocity.to(wide)
    return (latents + length * velocity).to(_result_dtype(latents, prediction, flow)).contiguous()


@jit_for_sizes("tokens")
def _cfg_step_kernel(  # type: ignore[no-untyped-def]
    latents_ptr,
    prediction_ptr,
    out_ptr,
    latents_batch_stride,
    latents_row_stride,
    prediction_batch_stride,
    prediction_row_stride,
    tokens,
    guidance,
    length,
    RESCALED: tl.constexpr,
    WIDE_GUIDANCE: tl.constexpr,  # nothing after the difference is rounded until the velocity is there
    WIDE_STEP: tl.constexpr,  # length * velocity is not rounded
    POWER: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    narrow: tl.constexpr = prediction_ptr.dtype.element_ty
    guided: tl.constexpr = tl.float32 if WIDE_GUIDANCE else narrow
    stepped: tl.constexpr = tl.float32 if WIDE_STEP else narrow
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < tokens) & (column < CHANNELS)

    latents_ptr += batch * latents_batch_stride + row * latents_row_stride + column
    cond_ptr = prediction_ptr + batch * prediction_batch_stride + row * prediction_row_stride + column
    uncond_ptr = cond_ptr + tl.num_programs(1) * prediction_batch_stride
    latents = tl.load(latents_ptr, mask=mask, other=0.0).to(tl.float32)
    cond = tl.load(cond_ptr, mask=mask, other=0.0).to(tl.float32)
    uncond = tl.load(uncond_ptr, mask=mask, other=0.0).to(tl.float32)

    difference = (cond - uncond).to(narrow).to(tl.float32)
    if RESCALED:
        size = tl.sqrt_rn(tl.sum(difference * difference, axis=1, keep_dims=True)).to(guided).to(tl.float32)
        # torch rounds the exponent to the dtype of its base. The divisor is 1 where size <= 1.
        power = tl.full((1, 1), POWER, tl.float32).to(guided).to(tl.float32)
        divisor = tl.exp2(power * tl.log2(tl.maximum(size, 1.0))).to(guided).to(tl.float32)
        difference = tl.div_rn(difference, divisor).to(guided).to(tl.float32)
    product = (guidance * difference).to(guided).to(tl.float32)
    velocity = (uncond + product).to(guided).to(tl.float32)
    product = (length * velocity).to(stepped).to(tl.float32)
    out_ptr += (batch * tokens + row) * CHANNELS + column
    tl.store(out_ptr, (latents + product).to(out_ptr.dtype.element_ty), mask=mask)


def _constants(channels: int, rescaled: bool, flow: str) -> dict[str, bool | int | float]:
    """1024 elements a program: 256 programs for the 4096 tokens of a square of 1024, more than any chip has SMs."""
    block = triton.next_power_of_2(channels)
    return {
        "RESCALED": rescaled,
        "WIDE_GUIDANCE": rescaled and flow == "autocast-fp32",
        "WIDE_STEP": flow != "autocast-state",
        "POWER": POWER,
        "CHANNELS": channels,
        "BLOCK": block,
        "ROWS": max(1024 // block, 1),
    }


def cfg_step_triton(
    latents: Tensor, prediction: Tensor, guidance: float, length: float, rescaled: bool, flow: str
) -> Tensor:
    _check(latents, prediction, flow)
    out = latents.new_empty(latents.shape, dtype=_result_dtype(latents, prediction, flow))
    if torch.float64 in (latents.dtype, prediction.dtype):
        raise ValueError("the kernel of cfg_step computes in float32: float64 is for the reference")
    if out.numel() == 0:
        return out
    latents, prediction = adjacent(latents), adjacent(prediction)
    batch, tokens, channels = latents.shape
    constants = _constants(channels, rescaled, flow)
    _cfg_step_kernel[triton.cdiv(tokens, constants["ROWS"]), batch](
        latents,
        prediction,
        out,
        latents.stride(0),
        latents.stride(1),
        prediction.stride(0),
        prediction.stride(1),
        tokens,
        guidance,
        length,
        **constants,
        **LAUNCH,
        enable_fp_fusion=False,  # products are rounded before they are added, as separate torch operations do
    )
    return out


def _fake(latents: Tensor, prediction: Tensor, guidance: float, length: float, rescaled: bool, flow: str) -> Tensor:
    return latents.new_empty(latents.shape, dtype=_result_dtype(latents, prediction, flow))


def _examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(of)

    for flow in FLOWS:
        for rescaled in (False, True):
            yield normal(1, 19, 64), normal(2, 19, 64), 6.0, -0.07, rescaled, flow
            # One row, channels that are no power of two; differences on both sides of the norm's threshold.
            yield normal(2, 1, 12), 0.3 * normal(4, 1, 12), 3.3, -0.0123, rescaled, flow
            # Target tokens cut from a longer prediction, latents from a wider tensor.
            yield normal(1, 17, 40)[..., 8:], normal(2, 30, 32)[:, :17], 4.7, -1 / 28, rescaled, flow
            yield 3e4 * normal(1, 5, 64), 3e4 * normal(2, 5, 64), 6.0, -0.5, rescaled, flow
            yield 1e-6 * normal(1, 5, 64), 1e-6 * normal(2, 5, 64), 6.0, -0.5, rescaled, flow
    wide = torch.promote_types(dtype, torch.float32)  # of the latents after the first step of this flow
    for rescaled in (False, True):
        yield normal(1, 20, 64, of=wide), normal(2, 20, 64), 6.0, -0.031, rescaled, "autocast-fp32"


def compilations(chip: int) -> Iterator[Compilation]:
    """On every chip the same. 64 channels in all released models and in the small bundled one."""
    strides = ("latents_batch_stride", "latents_row_stride", "prediction_batch_stride", "prediction_row_stride")
    sizes = dict.fromkeys((*strides, "tokens"), "i32")
    flows = [("bf16", "bf16", "bf16", "autocast-state"), ("bf16", "bf16", "bf16", "pure")]
    flows += [("bf16", "bf16", "fp32", "autocast-fp32"), ("fp32", "bf16", "fp32", "autocast-fp32")]
    flows += [("fp32", "fp32", "fp32", flow) for flow in FLOWS]
    for latents, prediction, out, flow in flows:
        pointers = {"latents_ptr": f"*{latents}", "prediction_ptr": f"*{prediction}", "out_ptr": f"*{out}"}
        for rescaled in (False, True):
            yield Compilation(
                kernel=_cfg_step_kernel,
                signature=pointers | sizes | {"guidance": "fp32", "length": "fp32"},
                constants=_constants(64, rescaled, flow),
                **LAUNCH,
                fp_fusion=False,
                aligned=frozenset(strides),
            )


cfg_step_op = define("cfg_step", cfg_step_reference, cfg_step_triton, _fake, _examples)
cfg_step = cfg_step_op.call
OPS = (cfg_step_op,)
