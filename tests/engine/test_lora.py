import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from step1x.engine import sizes
from step1x.engine.checkpoint import Checkpoint
from step1x.engine.dit import DiT, Text
from step1x.engine.errors import InputError
from step1x.engine.lora import Merged, merge
from step1x.engine.weights import build, dit_targets

GOLDEN = Path(__file__).parent.parent / "golden"
LORA = GOLDEN / "lora_kohya.safetensors"
NAME = "lora_unet_single_blocks_1_linear2"


def model(dtype: torch.dtype = torch.float32) -> DiT:
    checkpoint = Checkpoint([GOLDEN / "dit_official.safetensors"])
    with torch.device("meta"):
        dit = DiT(sizes.dit_config(checkpoint, [GOLDEN / "dit_official.json"]))
    build(dit, dit_targets(dit, checkpoint), checkpoint, "cpu", dtype)
    return dit


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.golden
@pytest.mark.parametrize("multiplier", [0.5, 1.0])
def test_golden_output_of_a_merged_model(multiplier: float) -> None:
    recorded, wanted = (
        load_file(GOLDEN / "dit_official_io.safetensors"),
        load_file(GOLDEN / "lora_io.safetensors"),
    )
    dit = model()
    assert merge(dit, LORA, multiplier) == Merged(modules=35, ignored=0)
    rope = dit.rope(recorded["in.txt_ids"], recorded["in.img_ids"])
    text = Text(recorded["in.llm_embedding"], recorded["in.mask"])
    with torch.inference_mode():
        final = dit(recorded["in.img"], text, recorded["in.timesteps_diff"], rope)
    errors = [relative(final, wanted[f"mult{multiplier}.final"])]
    key = "double_blocks.0.img_attn.proj.weight"
    if multiplier == 1.0:
        errors.append(relative(dit.get_parameter(key), wanted[f"mult1.0.merged.{key}"]))
    print(f"golden lora_io.safetensors mult{multiplier} worst={max(errors):.1e}")
    assert max(errors) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_merges_in_float32_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    """§8.1: also into plain fp8 weights, which have no arithmetic of their own."""
    dit, tensors = model(dtype), load_file(LORA)
    before = dit.single_blocks[1].linear2.weight.double().clone()
    merge(dit, LORA)
    after = dit.single_blocks[1].linear2.weight
    down, up = (tensors[f"{NAME}.lora_{part}.weight"].double() for part in ("down", "up"))
    exact = before + tensors[f"{NAME}.alpha"].double() / len(down) * (up @ down)
    assert after.dtype == dtype
    # a few sums may land on the other side of a rounding in float32
    assert (after.double() != exact.to(dtype).double()).double().mean() <= (1 if dtype == torch.float64 else 1e-3)
    smallest = 1e-3 if dtype.itemsize == 1 else 1e-12  # fp8 has nothing between 0 and 0.002
    torch.testing.assert_close(after.double(), exact, rtol=torch.finfo(dtype).eps, atol=smallest)


def test_text_model_tensors_are_ignored(tmp_path: Path) -> None:
    """§8.1: the official loader looks for another prefix, so it never applies them."""
    path = tmp_path / "lora.safetensors"
    save_file({**load_file(LORA), "lora_te_layers_0_mlp_up_proj.alpha": torch.ones(())}, path)
    assert merge(model(), path) == Merged(modules=35, ignored=1)


BROKEN = {
    "no alpha": ({f"{NAME}.alpha": None}, rf"missing {NAME}\.alpha"),
    "no up": ({f"{NAME}.lora_up.weight": None}, rf"missing {NAME}\.lora_up\.weight"),
    "other width": ({f"{NAME}.lora_down.weight": torch.ones(2, 5)}, r"down \[2, 5\] and up .* do not fit"),
    "other rank": ({f"{NAME}.lora_up.weight": torch.ones(32, 9)}, f"{NAME}: down .* do not fit"),
    "rank 0": (
        {f"{NAME}.lora_down.weight": torch.ones(0, 160), f"{NAME}.lora_up.weight": torch.ones(32, 0)},
        "do not fit",
    ),
    "many alphas": ({f"{NAME}.alpha": torch.ones(2)}, "must be one number"),
    "other model": ({"lora_unet_double_blocks_9_img_mlp_0.alpha": torch.ones(())}, "does not have"),
    "final layer": ({"lora_unet_final_layer_linear.alpha": torch.ones(())}, "does not have"),
    "peft": ({"transformer.x.lora_A.weight": torch.ones(1, 1)}, "no kohya LoRA tensor; a PEFT file"),
    "stray": ({"x": torch.ones(1)}, "x is no kohya LoRA tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_bad_file_changes_nothing(tmp_path: Path, name: str) -> None:
    changes, message = BROKEN[name]
    tensors = {key: value for key, value in {**load_file(LORA), **changes}.items() if value is not None}
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    dit = model()
    before = {key: value.clone() for key, value in dit.state_dict().items()}
    with pytest.raises(InputError, match=message) as caught:
        merge(dit, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in dit.state_dict().items())


def test_a_file_without_a_lora_for_the_transformer(tmp_path: Path) -> None:
    save_file({"lora_te_x.alpha": torch.ones(())}, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match="no LoRA for the transformer"):
        merge(model(), tmp_path / "lora.safetensors")


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    shutil.copy(LORA, tmp_path / "lora.pt")
    with pytest.raises(InputError, match="a pickle"):
        merge(model(), tmp_path / "lora.pt")
