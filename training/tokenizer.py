"""A small text side of the same classes as the real one: byte-level BPE and Qwen2.5-VL of any size.

The vocabulary is trained on given texts; Qwen2's splitting rule, NFC and special tokens are kept, so the
files load with AutoTokenizer and the quirks of `engine/tokens.py` act as they do with the real vocabulary.
transformers and tokenizers are imported where they are used: a training script without text stays light.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLModel

# Qwen2.5's control tokens in the order of its ids; <|endoftext|> comes first there too.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = r"""{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
BYTES = 256
PATCH = 14  # patch, merge and window of the real vision tower (model.md §1.1): the picture path stays the same
MERGE = 2
TEMPORAL_PATCH = 2
WINDOW = 112
ROPE_THETA = 1e6
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # §1.5
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Byte-level BPE over `texts` with Qwen2's splitting and special tokens.

    vocab_size counts everything (256 bytes, merges, 14 special tokens) and is an upper bound: few texts give
    fewer merges. `!` has id 0, every byte has a token, the special tokens have the last ids in Qwen's order.
    Raises ValueError if vocab_size leaves no room for the bytes and the special tokens.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer

    if vocab_size < BYTES + len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size must be at least {BYTES + len(SPECIAL_TOKENS)}, got {vocab_size}")
    byte_pair = Tokenizer(models.BPE())
    byte_pair.normalizer = normalizers.NFC()
    byte_pair.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # The alphabet is sorted by code point, so `!`, its first character, gets id 0 as in Qwen's vocabulary.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    byte_pair.train_from_iterator(texts, trainer)
    model = json.loads(byte_pair.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=32768,
    )


def count_template_tokens(tokenizer: "PreTrainedTokenizerFast", prefix: str) -> int:
    """The `Variant.template_tokens` of a prefix: the index of the token of its last colon (model.md §1.3).

    217 and 90 with Qwen's vocabulary and the released prefixes. Raises ValueError for a prefix that
    does not end in a colon.
    """
    from step1x.engine.tokens import HEADER, PICTURE

    if not prefix.endswith(":"):
        raise ValueError(f"the prefix must end in a colon, got {prefix[-20:]!r}")
    # What follows is part of the text because the splitting rule joins a colon to the letters after it.
    colon = len(HEADER) + len(prefix) - 1
    encoding = tokenizer.backend_tokenizer.encode(f"{HEADER}{prefix}{PICTURE}", add_special_tokens=False)
    return next(index for index, (start, end) in enumerate(encoding.offsets) if start <= colon < end)


def small_text_model(  # noqa: PLR0913  one keyword per size of the network
    tokenizer: "PreTrainedTokenizerFast",
    *,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vision_hidden: int,
    vision_depth: int,
    vision_heads: int,
    vision_intermediate: int,
) -> "Qwen2_5_VLModel":
    """A random Qwen2.5-VL (vision tower and language model, no lm_head) for a vocabulary, float32.

    Raises ValueError where a width does not fit its heads: the text head width must be even, the vision one a
    multiple of 4.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    half = _even_half(hidden, heads, "hidden")
    _even_half(vision_hidden, vision_heads * 2, "vision_hidden")
    if heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
    # 16, 24, 24 of 64 in the real model: a quarter for time, the rest halved between rows and columns.
    rows = half * 3 // 8
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.05,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": ROPE_THETA,
                "mrope_section": [half - 2 * rows, rows, rows],
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        },
        vision_config={
            "depth": vision_depth,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_intermediate,
            "num_heads": vision_heads,
            "out_hidden_size": hidden,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL_PATCH,
            "window_size": WINDOW,
            "fullatt_block_indexes": [vision_depth - 1],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,  # a reader with a head finds its weights in the embedding; none are stored
    )
    return Qwen2_5_VLModel._from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def _even_half(width: int, heads: int, name: str) -> int:
    if width % (2 * heads):
        raise ValueError(f"{name} {width} must be a multiple of {2 * heads}")
    return width // heads // 2


def save_text_model(
    model: "Qwen2_5_VLModel",
    tokenizer: "PreTrainedTokenizerFast",
    text_encoder: Path,
    processor: Path,
    *,
    min_pixels: int,
    max_pixels: int,
) -> None:
    """Write model and tokenizer as a diffusers folder holds them: `text_encoder/` and `processor/`.

    Weights keep the model's dtype, under the names of Qwen2_5_VLForConditionalGeneration (`model.visual.*`,
    `model.language_model.*`), without a head. The two folders may be one, as in a plain Qwen2.5-VL snapshot.
    """
    from safetensors.torch import save_file

    text_encoder.mkdir(parents=True, exist_ok=True)
    processor.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = model.config.to_dict()
    config["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    _spell_for_both(config["text_config"])
    _write_json(text_encoder / "config.json", config)
    tensors = {f"model.{name}": tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, text_encoder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(str(processor))
    written = json.loads((processor / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    # transformers 4 wants a dictionary under the new name; both take a list under the old one.
    written["additional_special_tokens"] = written.pop("extra_special_tokens")
    _write_json(processor / TOKENIZER_CONFIG, written)
    (processor / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    vision = model.config.vision_config
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    _write_json(processor / "preprocessor_config.json", preprocessor)


def _spell_for_both(text: dict[str, Any]) -> None:
    """Adds to a text model's settings what transformers 4 calls `rope_parameters`."""
    scaling = dict(text["rope_parameters"])
    text["rope_theta"] = scaling.pop("rope_theta")
    text["rope_scaling"] = scaling


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
