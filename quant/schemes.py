"""What each scheme stores of a layer's weight: names, shapes and dtypes of its tensors. Needs no torch."""

from math import prod
from typing import Literal, get_args

__all__ = ["SCHEMES", "Scheme", "fits", "group_size", "layout", "stored_bytes"]

# As in profiles.Weights. A scheme without -weight quantises the layer's input too, row by row, as it comes.
Scheme = Literal["plain", "fp8", "fp8-weight", "int8", "int8-weight", "int4-weight", "nvfp4"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
GROUPS = (128, 64, 32)  # weights of a row that share a scale and a zero in int4-weight: the first that divides the row
BLOCK = 16  # weights of a row that share a scale in nvfp4
ITEM_BYTES = {"float8_e4m3fn": 1, "int8": 1, "uint8": 1, "bfloat16": 2, "float32": 4}

Layout = dict[str, tuple[tuple[int, ...], str]]  # tensor -> (shape, name of a torch dtype)


def group_size(in_features: int) -> int:
    """Group of int4-weight. Raises ValueError if rows are no multiple of 32."""
    for group in GROUPS:
        if in_features % group == 0:
            return group
    raise ValueError(f"int4-weight needs rows of a multiple of {GROUPS[-1]}, got {in_features}")


def fits(scheme: Scheme, out_features: int, in_features: int) -> bool:
    """Whether a layer of these sizes can have the scheme; one that cannot stays plain.

    8-bit products on CUDA take multiples of 16 (`torch._scaled_mm`) and of 8 (`torch._int_mm`) only.
    """
    match scheme:
        case "fp8":
            return in_features % 16 == 0 and out_features % 16 == 0
        case "int8":
            return in_features % 8 == 0 and out_features % 8 == 0
        case "int4-weight":
            return in_features % GROUPS[-1] == 0
        case "nvfp4":
            return in_features % BLOCK == 0
        case _:
            return True


def layout(scheme: Scheme, out_features: int, in_features: int) -> Layout:
    """The tensors that stand for a layer's weight (out_features, in_features), without its bias.

    Every tensor but a scalar has a row for each output. docs/quantisation.md says how they make the weight.
    Raises ValueError for plain, which stores the weight as it is.
    """
    rows, whole = out_features, (out_features, in_features)
    match scheme:
        case "fp8" | "fp8-weight":
            return {"weight": (whole, "float8_e4m3fn"), "weight_scale": ((rows, 1), "float32")}
        case "int8" | "int8-weight":
            return {"weight": (whole, "int8"), "weight_scale": ((rows, 1), "float32")}
        case "int4-weight":
            groups = ((rows, in_features // group_size(in_features)), "bfloat16")
            return {"weight": ((rows, in_features // 2), "uint8"), "weight_scale": groups, "weight_zero": groups}
        case "nvfp4":
            return {
                "weight": ((rows, in_features // 2), "uint8"),
                "weight_scale": ((rows, in_features // BLOCK), "float8_e4m3fn"),
                "weight_global_scale": ((), "float32"),
            }
        case _:
            raise ValueError(f"{scheme!r} stores weights as they are")


def stored_bytes(scheme: Scheme, out_features: int, in_features: int, itemsize: int) -> int:
    """Bytes of a layer's weight with its scales, without bias; plain where the scheme does not fit.

    itemsize: bytes of a weight that is not quantised.
    """
    if scheme == "plain" or not fits(scheme, out_features, in_features):
        return out_features * in_features * itemsize
    return sum(prod(shape) * ITEM_BYTES[dtype] for shape, dtype in layout(scheme, out_features, in_features).values())
