"""Triton kernels run in Triton's interpreter where there is no GPU: it reads this variable as it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
