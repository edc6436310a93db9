"""Sums of half-precision products stay float32, whatever autocast would do."""

import pytest
import torch

from ttt_lit.ops.wide import wide_matmul


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_operands_give_float32_sums(shape, autocast):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*shape, *s, generator=generator).bfloat16() for s in ((5, 64), (64, 7)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        product = wide_matmul(x, y, torch.float32)
    assert product.dtype == torch.float32
    # A sum rounded to bfloat16 would be off by 4e-3 of its size.
    torch.testing.assert_close(product.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)


def test_operands_of_the_wanted_dtype_are_multiplied_as_they_are():
    x = torch.randn(4, 4, dtype=torch.float64)
    assert torch.equal(wide_matmul(x, x, torch.float64), x @ x)
