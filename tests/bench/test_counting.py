import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from step1x.bench.counting import Launches, Memory, flop_counter


def test_launches_leave_out_views_and_reservations() -> None:
    x = torch.randn(4, 6)
    with Launches() as launches:
        y = x.view(2, 12)[:, :6].transpose(0, 1)
        torch.empty(3)
        (y @ x[:2]).relu()
    assert dict(launches.operators) == {"aten.mm.default": 1, "aten.relu.default": 1}
    assert launches.total == 2


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


def test_flops_of_attention_on_the_cpu() -> None:
    q = torch.randn(2, 3, 10, 8)
    with flop_counter() as counter:
        F.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 4 * 2 * 3 * 10 * 10 * 8
