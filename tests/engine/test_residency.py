"""Weights that come and go: the same pictures, the bytes that were planned, and nothing changed at home."""

import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from step1x.bench.counters import photograph
from step1x.bench.pretend import Pretend
from step1x.engine import Engine
from step1x.engine.executor import DEFAULT
from step1x.engine.residency import ALIGNMENT, Packed, Stream, Visiting, dit_at_host, spaced, text_at_host
from step1x.engine.weights import Components, load
from step1x.profiles import Residency

WORDS = "make it black and white"
HOST = torch.device("cpu")
AWAY = [
    Residency(text="evict", vision="evict", vae="evict", folded="host"),
    Residency(text="stream", vision="stream"),
    Residency(dit="stream", stream_blocks=3),
    Residency(dit="stream", stream_blocks=7, folded="host"),
]


def components() -> Components:
    return load(None, device=HOST, dtype=torch.float32)


def edited(engine: Engine, moved: int = 0, **options: object) -> bytes:
    shown = photograph(96, 80, moved)
    return engine.edit(shown, WORDS, size=96, seed=1, steps=2, guidance=2.0, **options).image.tobytes()


@pytest.mark.parametrize("residency", AWAY)
@pytest.mark.parametrize("algebra", [True, False])
def test_the_picture_is_the_same(residency: Residency, algebra: bool) -> None:
    expected = edited(Engine(components()), exact_algebra=algebra)
    loaded = components()
    before = {name: value.clone() for name, value in loaded.dit.state_dict().items()}
    engine = Engine(loaded, residency=residency)
    assert [edited(engine, exact_algebra=algebra) for _ in range(2)] == [expected] * 2
    for name, value in loaded.dit.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_threads_share_what_comes_and_goes() -> None:
    engine = Engine(components(), residency=Residency(text="stream", vae="evict", dit="stream", stream_blocks=4))
    expected = [edited(Engine(components()), moved) for moved in range(3)]
    found: dict[int, bytes] = {}
    threads = [threading.Thread(target=lambda m=m: found.update({m: edited(engine, m)})) for m in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[moved] for moved in range(3)] == expected


def packed_bytes(modules: list[nn.Module], without: Callable[[str], bool] = lambda name: False) -> int:
    """What one arrival of each takes."""
    return sum(
        -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        for module in modules
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if not without(name)
    )


def crossed(residency: Residency) -> tuple[dict[str, int], Components]:
    """Bytes that go to a pretended accelerator in an edit of two steps, by stage."""
    loaded, pretend = components(), Pretend()
    pretend.adopt(loaded.dit)
    pretend.adopt(loaded.vae)
    model = loaded.conditioner.model
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not text_at_host(residency)(name):
            pretend.mark(tensor)
    with pretend:
        engine = Engine(loaded, DEFAULT, residency=residency)
        pretend.to_device.clear()
        edited(engine, on_stage=pretend.stage)
    return dict(pretend.to_device), loaded


def test_what_is_evicted_comes_once_for_each_use() -> None:
    base, _ = crossed(Residency())
    moved, loaded = crossed(Residency(text="evict", vision="evict", vae="evict"))
    model = loaded.conditioner.model
    assert moved["encode_text"] - base["encode_text"] == packed_bytes([model.visual, model.language_model])
    assert moved["encode_image"] - base["encode_image"] == packed_bytes([loaded.vae])
    assert moved["decode"] - base.get("decode", 0) == packed_bytes([loaded.vae])
    assert moved["denoise"] == base["denoise"]


def test_streamed_blocks_come_once_a_pass() -> None:
    """Strings are read in four pieces: template and picture once, and each of two instructions."""
    base, _ = crossed(Residency())
    moved, loaded = crossed(Residency(text="stream", dit="stream", stream_blocks=3))
    language = loaded.conditioner.model.language_model
    passes, rest = divmod(moved["encode_text"] - base["encode_text"], packed_bytes(list(language.layers)))
    around = packed_bytes([language], lambda name: name.startswith(("layers.", "embed_tokens.")))
    rows, odd = divmod(rest - around, 4 * language.config.hidden_size)  # of embeddings, looked up on the host
    assert (passes, odd) == (4, 0)
    assert 0 < rows < language.config.vocab_size / 2
    blocks = [*loaded.dit.double_blocks, *loaded.dit.single_blocks]
    chosen = [blocks[index] for index in spaced(3, len(blocks))]
    come = moved["denoise"] - base["denoise"]
    first = packed_bytes(chosen[:1], modulates)  # fetched once more, for a fifth forward
    assert come == 4 * packed_bytes(chosen, modulates) + first


def modulates(name: str) -> bool:
    return "mod" in name


class Adds(nn.Module):
    def __init__(self, number: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((300,), number), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


def test_a_block_runs_in_one_place_while_the_next_arrives_in_the_other() -> None:
    blocks = [Adds(float(10**index)) for index in range(5)]
    stream = Stream(blocks, HOST, around=True)
    home = [block.weight.data_ptr() for block in blocks]
    seen = []
    with stream.running():
        for _ in range(2):
            x = torch.zeros(300)
            for block in blocks:
                with stream.present(block):
                    seen.append(block.weight.data_ptr())
                    x = block(x)
                assert block.weight.data_ptr() in home
            assert x.unique().tolist() == [11111.0]
    assert len(set(seen)) == 2
    assert all(one != other for one, other in pairwise(seen))
    assert not set(seen) & set(home)


def test_blocks_out_of_order_and_others_run_too() -> None:
    blocks, other = [Adds(1.0), Adds(2.0), Adds(4.0)], Adds(8.0)
    stream = Stream(blocks, HOST, around=False)
    with stream.running():
        for block in (blocks[2], blocks[0], other, blocks[0], blocks[1]):
            with stream.present(block):
                assert block(torch.zeros(300))[0] == block.weight[0]


def test_an_error_leaves_everything_at_home() -> None:
    blocks = [Adds(1.0), Adds(2.0)]
    stream, visitor = Stream(blocks, HOST, around=True), Adds(3.0)
    visiting, home = Visiting(visitor, HOST), [block.weight.data_ptr() for block in (*blocks, visitor)]

    def fail() -> None:
        with visiting.using(), stream.running(), stream.present(blocks[0]):
            assert visitor.weight.data_ptr() != home[2]
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        fail()
    assert [block.weight.data_ptr() for block in (*blocks, visitor)] == home
    with stream.running(), stream.present(blocks[1]):
        assert blocks[1].weight[0] == 2


def test_packing_keeps_every_dtype_apart() -> None:
    module = nn.Module()
    values = [torch.randn(3, 5), torch.arange(7, dtype=torch.int8), torch.randn(2).bfloat16(), torch.tensor(2.5)]
    values.append(torch.randn(4, 4).to(torch.float8_e4m3fn))
    for index, value in enumerate(values):
        module.register_buffer(f"b{index}", value.clone())
    packed = Packed(module)
    assert packed.host.numel() == len(values) * ALIGNMENT
    for index, value in enumerate(values):
        kept = module.get_buffer(f"b{index}")
        assert (kept.dtype, kept.shape, kept.data_ptr() % 16) == (value.dtype, value.shape, packed.host.data_ptr() % 16)
        assert torch.equal(kept.float(), value.float())


@pytest.mark.parametrize(("count", "of"), [(1, 57), (14, 57), (57, 57), (3, 7)])
def test_streamed_blocks_are_evenly_spaced(count: int, of: int) -> None:
    chosen = spaced(count, of)
    gaps = {b - a for a, b in pairwise(chosen)}
    assert len(set(chosen)) == count
    assert 0 <= min(chosen) <= max(chosen) < of
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_what_is_loaded_to_host_memory() -> None:
    picked = dit_at_host(Residency(dit="stream", stream_blocks=2), 2, 2)
    assert picked("double_blocks.1.img_attn.qkv.weight")
    assert not picked("double_blocks.1.img_mod.lin.weight")
    assert not picked("double_blocks.0.img_attn.qkv.weight")
    assert dit_at_host(Residency(folded="host"), 2, 2)("double_blocks.0.img_mod.lin.weight")
    assert not dit_at_host(Residency(), 2, 2)("double_blocks.0.img_attn.qkv.weight")
    streamed, evicted = text_at_host(Residency(text="stream")), text_at_host(Residency(vision="evict"))
    assert streamed("language_model.embed_tokens.weight")
    assert not streamed("visual.blocks.0.norm1.weight")
    assert evicted("visual.merger.mlp.0.weight")
    assert not text_at_host(Residency())("language_model.norm.weight")
