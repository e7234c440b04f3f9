from pathlib import Path

import pytest
import torch

from step1x.engine.text_ids import Grid, latent_coordinates, rope_positions, signed_ids

GOLDEN = Path(__file__).parents[1] / "golden" / "trajectory_diffusers_v1p2.safetensors"
PAD = 99


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


@pytest.mark.golden
@pytest.mark.parametrize("name", ["prompt", "negative"])
def test_golden_signed_ids(name: str) -> None:
    from safetensors import safe_open

    with safe_open(GOLDEN, "pt") as file:
        positions = file.get_tensor(f"{name}.raw_mrope_position_ids").T
        is_picture = file.get_tensor(f"{name}.vision_mask").bool()
        _, rows, columns = file.get_tensor(f"{name}.vision_thw")[0].tolist()
        expected = file.get_tensor(f"{name}.txt_ids")
        affine = file.get_tensor(f"{name}.affine_mat")
        metadata = file.metadata()
    grid = Grid(rows, columns, 28, int(metadata["width"]), int(metadata["height"]))

    worst = relative(signed_ids(positions, is_picture, grid), expected)
    print(f"golden trajectory_diffusers_v1p2.safetensors {name}.txt_ids worst={worst:.1e}")
    assert worst <= 1e-5

    # The matrix maps pixels of the level-resized picture to merged patches: the inverse of what we compute.
    pixels = torch.ones(3, max(rows, columns), dtype=torch.float64)
    for axis, (cells, side) in enumerate(((columns, grid.width), (rows, grid.height))):
        pixels[axis, :cells] = latent_coordinates(torch.arange(cells), cells, side, 28) * 16 + 11
    patches = affine.double() @ pixels
    wanted = torch.arange(columns, dtype=torch.float64)
    worst = max(relative(patches[0], wanted), relative(patches[1, :rows], wanted[:rows]))
    print(f"golden trajectory_diffusers_v1p2.safetensors {name}.affine_mat worst={worst:.1e}")
    assert worst <= 1e-5


def test_picture_tokens_have_rows_and_columns() -> None:
    ids = torch.tensor([5, 6, PAD, PAD, PAD, PAD, PAD, PAD, 7, 8])
    positions = rope_positions(ids, PAD, Grid(2, 3, 28, 84, 56))
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (3, 2), (1, 5)])
def test_positions_are_those_of_transformers(rows: int, columns: int) -> None:
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 0, "intermediate_size": 8}
    text = {**sizes, "num_key_value_heads": 1, "vocab_size": 128}
    vision = {"depth": 0, "hidden_size": 8, "num_heads": 1, "intermediate_size": 8, "out_hidden_size": 8}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=PAD)
    with torch.device("meta"):
        model = Qwen2_5_VLModel(config)
    # `!` in the text: not counted; transformers 5 leaves 0 there, the versions the models ran with left 1
    ids = torch.tensor([5, 0, 6, *[PAD] * (rows * columns), 7, 0, 8])
    expected, _ = model.get_rope_index(
        ids[None],
        mm_token_type_ids=(ids[None] == PAD).int(),
        image_grid_thw=torch.tensor([[1, rows * 2, columns * 2]]),
        attention_mask=(ids[None] > 0).long(),
    )
    expected[:, :, ids == 0] = 1
    positions = rope_positions(ids, PAD, Grid(rows, columns, 28, 1, 1))
    assert torch.equal(positions, expected[:, 0])


def test_a_cut_picture_keeps_the_rows_it_has() -> None:
    grid = Grid(2, 3, 28, 84, 56)
    whole = rope_positions(torch.tensor([5, *[PAD] * 6, 7]), PAD, grid)
    assert torch.equal(rope_positions(torch.tensor([5, *[PAD] * 4]), PAD, grid), whole[:, :5])


def test_equal_sizes_put_patches_on_the_pixels_they_cover() -> None:
    # 28-pixel patches of a picture that was not resized: centres 13.5 and 41.5; a latent token is 16 pixels
    assert latent_coordinates(torch.arange(2), 2, 56, 28).tolist() == [(13.5 - 11) / 16, (41.5 - 11) / 16]
