import pytest
import torch

from labtrain.order import epoch_order


@pytest.mark.parametrize("size", [0, 1, 2, 5, 1000])
def test_an_order_names_each_sample_once(size: int) -> None:
    assert torch.equal(epoch_order(size, seed=1, epoch=0).sort().values, torch.arange(size))


def test_an_order_is_a_function_of_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    first = epoch_order(100, seed=1, epoch=2)
    torch.manual_seed(2)
    torch.rand(10)
    assert torch.equal(epoch_order(100, seed=1, epoch=2), first)
    others = [epoch_order(100, seed=1, epoch=3), epoch_order(100, seed=2, epoch=2), epoch_order(100, seed=2, epoch=1)]
    assert not any(torch.equal(other, first) for other in others)
