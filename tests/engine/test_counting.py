import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from step1x.engine.counting import FlashAttention, Memory


def test_memory_counts_storages_while_they_live() -> None:
    given = torch.zeros(100)
    with Memory() as memory:
        a = given + 1  # 400 bytes
        view = a[:10]
        b = torch.cat((a, a))  # 800 bytes
        assert memory.now == 1200
        del a
        assert memory.now == 1200, "a view keeps it"
        del view
        assert memory.now == 800
        given.add_(b[:100])
    assert (memory.now, memory.peak) == (800, 1200)


def test_memory_of_fake_tensors() -> None:
    with FakeTensorMode(), Memory() as memory:
        a = torch.empty(1 << 20, 1 << 10)
        b = a.to(torch.bfloat16)
        assert (memory.now, memory.peak) == (6 << 30, 6 << 30)
        del a, b
    assert memory.now == 0


def test_attention_takes_its_result_alone() -> None:
    with torch.device("meta"):
        query, keys = torch.empty(2, 3, 10, 4), torch.empty(2, 3, 1000, 4)
        with Memory() as memory, FlashAttention():
            joined = F.scaled_dot_product_attention(query, keys, keys, is_causal=False).transpose(1, 2).flatten(2)
    assert joined.shape == (2, 10, 12)
    assert memory.peak == 4 * query.numel()
