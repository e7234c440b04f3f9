import torch
import torch.nn.functional as F

from step1x.bench.counting import Launches, flop_counter


def test_launches_leave_out_views_and_reservations() -> None:
    x = torch.randn(4, 6)
    with Launches() as launches:
        y = x.view(2, 12)[:, :6].transpose(0, 1)
        torch.empty(3)
        (y @ x[:2]).relu()
    assert dict(launches.operators) == {"aten.mm.default": 1, "aten.relu.default": 1}
    assert launches.total == 2


def test_flops_of_attention_on_the_cpu() -> None:
    q = torch.randn(2, 3, 10, 8)
    with flop_counter() as counter:
        F.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 4 * 2 * 3 * 10 * 10 * 8
