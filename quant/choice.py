"""Who multiplies rows that are quantised as they come: torch, or torchao's kernels."""

import importlib.metadata
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from step1x.kernels.launch import capability
from step1x.quant.products import Product
from step1x.quant.schemes import Scheme

__all__ = ["DYNAMIC", "Products", "product_of", "why_not_torchao"]

Products = Literal["auto", "torch", "torchao"]  # as in profiles.Profile
DYNAMIC = ("fp8", "int8")  # schemes that quantise the rows that come in
LEAST = {"fp8": 89, "int8": 80}  # compute capability, times ten, from which auto takes torchao's
RELEASE = "0.18"  # of torchao, whose modules move from one release to the next
INSTALL = "pip install 'torchao>=0.18,<0.19'"
SKIP = "TORCHAO_FORCE_SKIP_LOADING_SO_FILES"

log = logging.getLogger(__name__)


def product_of(choice: Products, scheme: Scheme, device: torch.device) -> Product | None:
    """What multiplies quantised rows with a weight of a scheme on a device; None: torch.

    Raises ValueError, one line, if torchao is asked for and cannot be had.
    """
    if scheme not in DYNAMIC or choice == "torch" or (choice == "auto" and capability(device) < LEAST[scheme]):
        return None
    reason = why_not_torchao()
    if reason is None:
        from step1x.quant import torchao_backend

        return torchao_backend.fp8_product if scheme == "fp8" else torchao_backend.int8_product
    if choice == "torchao":
        raise ValueError(f"products = 'torchao': {reason}; {INSTALL}, or take products = 'torch'")
    log.info("products by torch: %s", reason)
    return None


def why_not_torchao() -> str | None:
    """Why torchao cannot be used here, in words; None: it can, and is imported."""
    try:
        found = importlib.metadata.version("torchao")
    except importlib.metadata.PackageNotFoundError:
        return f"torchao {RELEASE} is not installed"
    if not found.startswith(f"{RELEASE}."):
        return f"torchao {found} is installed, {RELEASE} is needed"
    try:
        with _quietly():
            import step1x.quant.torchao_backend  # noqa: F401
    except (ImportError, AttributeError, RuntimeError) as error:  # as it does with a torch that it is not made for
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"torchao {found} cannot be imported with torch {torch.__version__}: {reason}"
    return None


@contextmanager
def _quietly() -> Iterator[None]:
    """Within it torchao's import says nothing, and leaves out its compiled parts, which nothing here calls."""
    before, level = os.environ.get(SKIP), logging.root.manager.disable
    os.environ[SKIP] = "1"
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if before is None:
            del os.environ[SKIP]
        else:
            os.environ[SKIP] = before
