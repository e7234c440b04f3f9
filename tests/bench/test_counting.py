import torch
import torch.nn.functional as F

from step1x.bench.counting import Launches, Traffic, flop_counter
from step1x.kernels.merge_biased import merge_biased
from step1x.kernels.qk_norm_rope import qk_norm_rope_scatter, qk_norm_rope_scatter_op


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


def test_elementwise_traffic_by_hand() -> None:
    x, bias = torch.randn(4, 6), torch.randn(6)
    with Traffic() as traffic:
        y = torch.addmm(bias, x, x.new_empty(6, 6)).view(24)[:12]  # a product, a reservation and views
        y.relu()  # 12 numbers in, 12 out
        x.add_(bias)  # 24 and 6 in, 24 out
        x.copy_(bias.expand(4, 6))  # 6 in, since the rest is the same; 24 out
        torch.cat((x, x.double()))  # 24 in and 24 doubles out; 24 numbers and 24 doubles in, 48 doubles out
        F.scaled_dot_product_attention(x.view(1, 1, 4, 6), x.view(1, 1, 4, 6), x.view(1, 1, 4, 6))
    assert traffic.by_operator == {
        "aten.relu.default": 4 * 24,
        "aten.add_.Tensor": 4 * 54,
        "aten.copy_.default": 4 * 30,
        "aten._to_copy.default": 4 * 24 + 8 * 24,
        "aten.cat.default": 4 * 24 + 8 * 24 + 8 * 48,
    }
    assert traffic.total == 4 * (24 + 54 + 30 + 24 + 24) + 8 * (24 + 24 + 48)


def test_traffic_of_our_operations_by_hand() -> None:
    """Bytes of bfloat16 rows and float32 log-sum-exps; a cache that is changed in place is read and written."""
    rows = torch.randn(2, 3, 5, 32).bfloat16()
    few, lse, bias = rows[:, :, :2], torch.zeros(2, 3, 5), torch.zeros(2, 9)[:, :2]
    with Traffic() as traffic:
        merge_biased(rows, lse, rows, few, few, bias)
    assert traffic.total == 2 * (3 * 960 + 2 * 384) + 4 * (30 + 4)
    scatter = next(iter(qk_norm_rope_scatter_op.examples(torch.device("cpu"), torch.float32)))
    with Traffic() as traffic:
        q = qk_norm_rope_scatter(*scatter)
    given = [one for one in scatter if isinstance(one, torch.Tensor)]
    assert traffic.total == sum(one.nbytes for one in (*given, *scatter[-2:], q))
