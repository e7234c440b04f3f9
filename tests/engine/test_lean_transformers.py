"""What is imported and said where torchao is installed beside transformers, which would import it."""

import subprocess
import sys

LEAN = """
import sys
from step1x.engine import Engine
from step1x.engine.lean_transformers import import_models

engine = Engine.load(profile="cpu", products="torchao", cache=False)  # quantises nothing
assert "torchao" not in sys.modules
import_models()
from transformers.utils import is_torchao_available
assert is_torchao_available()
import torch
from step1x.quant.linear import quantise_layers, use_products
quantise_layers(engine.dit, "dit", "fp8")
use_products(engine.dit, "torchao", torch.device("cpu"))
assert "torchao" in sys.modules
"""


def test_loading_imports_torchao_when_it_is_needed_and_says_nothing():
    done = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
