"""Variables that are read when things are imported."""

import os
import tempfile

import torch

# Nothing of the user's is read or written: caches live in a folder of this run.
_caches = tempfile.TemporaryDirectory(prefix="step1x-tests-")
os.environ["XDG_CACHE_HOME"] = _caches.name

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
