"""Files of a Qwen2.5-VL snapshot -> model without head, tokenizer, image processor.

Reads what transformers 4 and 5 wrote: flat and nested configs, all spellings of the keys. Nothing is fetched:
the files are there or an error names the one that is not.
"""

from collections.abc import Callable
from functools import cache
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from step1x.engine.checkpoint import read_json, tensor_files
from step1x.engine.errors import InputError
from step1x.engine.lean_transformers import import_models

if TYPE_CHECKING:
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLModel,
        Qwen2VLImageProcessorPil,
    )

MODEL_TYPE = "qwen2_5_vl"
# What the image processor takes from its file; the area limits are the variant's and given at each call.
PROCESSOR_KEYS = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")
# Checkpoint key -> key of the headless model, longest first: transformers 5 and 4.52+, then older ones.
KEY_PREFIXES = (
    ("model.language_model.", "language_model."),
    ("model.visual.", "visual."),
    ("language_model.", "language_model."),
    ("visual.", "visual."),
    ("model.", "language_model."),
)


def load_model(
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype | None,
    at_host: Callable[[str], bool] | None = None,
) -> "Qwen2_5_VLModel":
    """Vision tower and language model of a snapshot, on `device` in `dtype` (None: as stored), ready to read.

    Tensors whose key `at_host` picks stay in host memory.

    Built on the meta device and filled tensor by tensor; `lm_head` is skipped. Raises InputError naming the
    file (and key) that is missing or wrong.
    """
    from step1x.engine.weights import stream

    model = hollow_model(read_config(folder / "config.json"))
    stream(model, tensor_files(folder), model_key, device, dtype, at_host)
    compute_frequencies(model, device)
    return model.eval().requires_grad_(False)


def hollow_model(config: "Qwen2_5_VLConfig") -> "Qwen2_5_VLModel":
    """Vision tower and language model on the meta device."""
    import_models()
    from transformers import Qwen2_5_VLModel

    # The dtype of meta tensors does not matter, but transformers would make the config's torch's process-wide
    # default meanwhile, which other threads would see.
    with torch.device("meta"):
        return Qwen2_5_VLModel._from_config(config, attn_implementation="sdpa", dtype=torch.get_default_dtype())


def compute_frequencies(model: "Qwen2_5_VLModel", device: torch.device | str) -> None:
    """Puts rotary frequencies into a model made on the meta device.

    They are in no file: each module computes them as it is made, always in float32.
    """
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(config=module.config).to(device))


def going_on(language_model: nn.Module, past: object) -> dict[str, object]:
    """The keyword of the language model's forward for the keys and values (a `DynamicCache`) that it goes on from."""
    return {_cache_keyword(type(language_model).forward): past}


@cache
def _cache_keyword(forward: Callable[..., Any]) -> str:
    """transformers renamed it in 5.24."""
    return "cache" if "cache" in signature(forward).parameters else "past_key_values"


def model_key(key: str) -> str | None:
    """The headless model's name of a checkpoint key; None for what is not loaded."""
    if key.startswith("lm_head.") or key.endswith("inv_freq"):
        return None
    for old, new in KEY_PREFIXES:
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def read_config(path: Path) -> "Qwen2_5_VLConfig":
    """The model's config. Raises InputError if the file is missing or of another model."""
    return parse_config(read_json(path), path)


def parse_config(values: dict[str, Any], path: Path) -> "Qwen2_5_VLConfig":
    """The config of which `values` are the JSON, found at `path`. Raises InputError if it is of another model."""
    from transformers import Qwen2_5_VLConfig

    if values.get("model_type") != MODEL_TYPE:
        raise InputError(f"{path}: model_type is {values.get('model_type')!r}, it must be {MODEL_TYPE!r}")
    return Qwen2_5_VLConfig.from_dict(values)


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a snapshot: tokenizer.json, or vocab.json with merges.txt.

    Raises InputError if neither is there or can be read.
    """
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    whole = folder / "tokenizer.json"
    parts = (folder / "vocab.json", folder / "merges.txt")
    if not whole.is_file() and not all(part.is_file() for part in parts):
        raise InputError(f"{whole}: not found (nor vocab.json and merges.txt); the tokenizer's files belong there")
    try:
        return Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more special for a bad file
        reason = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{folder}: the tokenizer files cannot be read: {reason[0]}") from error


def load_image_processor(folder: Path, config: "Qwen2_5_VLConfig") -> "Qwen2VLImageProcessorPil":
    """The picture processor with PIL's resampling, which the models were made with (model.md §1.5).

    Its settings are in preprocessor_config.json; transformers 5 puts them into processor_config.json. Raises
    InputError if neither is there or their patches are not the model's.
    """
    import_models()
    from transformers import Qwen2VLImageProcessorPil

    path = folder / "preprocessor_config.json"
    joint = folder / "processor_config.json"
    if joint.is_file() and not path.is_file():
        path = joint
    found = read_json(path)
    found = found.get("image_processor", found)
    values = {key: found[key] for key in PROCESSOR_KEYS if key in found}
    vision = config.vision_config
    wanted = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    for key, value in wanted.items():
        if values.setdefault(key, value) != value:
            raise InputError(f"{path}: {key} is {values[key]}, the text model has {value}")
    # A size of its own: without one the class's shared default would be written to.
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 1, "longest_edge": 1}, **values)
