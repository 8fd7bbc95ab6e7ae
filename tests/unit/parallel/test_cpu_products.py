"""Products by oneDNN: the numbers of torch's own, in every form, and only on the processors that gain by it."""

import subprocess
import sys

import pytest
import torch

from megatron_cocoa.parallel import cpu_products

PRODUCTS = """
import os
import torch
from torch.nn import functional as F
from megatron_cocoa.parallel import cpu_products

cpu_products.is_wanted = lambda: True
cpu_products.install()
cpu_products.install()
torch.manual_seed(0)
taken = []
product = cpu_products._product
cpu_products._product = lambda *args: taken.append(1) or product(*args)


def check(compute, *inputs, calls):
    # Outputs and gradients beside float64's; products of 512 to 1024 terms round by less than this.
    taken.clear()
    mine = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, wanted = compute(*mine), compute(*exact)
    grad = torch.randn(out.shape)
    out.backward(grad)
    wanted.backward(grad.double())
    assert len(taken) == calls, (len(taken), calls)
    for found, other in zip([out, *(x.grad for x in mine)], [wanted, *(x.grad for x in exact)]):
        torch.testing.assert_close(found.double(), other, rtol=1e-4, atol=2e-4)


rows, weight, bias = torch.randn(600, 512), torch.randn(640, 512), torch.randn(640)
check(lambda x, w: x @ w.t(), rows, weight, calls=3)
check(F.linear, rows, weight, bias, calls=3)
check(F.linear, rows.view(3, 200, 512), weight, calls=3)
check(torch.addmm, torch.randn(600, 640), rows, weight.t(), calls=2)
check(lambda b, x, w: torch.addmm(b, x, w.t(), beta=0.5, alpha=2), bias, rows, weight, calls=2)
check(lambda x, w: x[:, 3:515] @ w[:, :512].t(), torch.randn(600, 1024), torch.randn(640, 1024), calls=3)
# The gradient of a weight with few columns is computed the other way round, to copy the smaller operand.
check(lambda x, w: x @ w.t(), torch.randn(3000, 96), torch.randn(2048, 96), calls=3)
shapes, linear = [], cpu_products._linear
cpu_products._linear = lambda rows, *more: shapes.append(tuple(rows.shape)) or linear(rows, *more)
for columns, first in ((96, (96, 3000)), (2048, (2048, 3000))):
    found = torch.randn(3000, 2048).t() @ torch.randn(3000, columns)
    assert found.is_contiguous() and found.shape == (2048, columns) and shapes.pop() == first, shapes
for strided in (rows[:1].expand(600, 512), torch.randn(600, 1024)[:, ::2]):
    taken.clear()
    torch.testing.assert_close(strided @ weight.t(), strided.contiguous() @ weight.t())
    assert len(taken) == 2
check(lambda x, w: x @ w.t(), rows[:8], weight, calls=0)
check(lambda x, w: x @ w.t(), rows[:0], weight, calls=0)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def multiply_many():
    for number in torch.randint(1000, 3000, (250,)).tolist():
        many[:number] @ weight.t()


many = torch.randn(3000, 512)
multiply_many()
before = resident()
multiply_many()
# Kernels of 250 other shapes take 155 MB where all are kept, and next to nothing where the oldest are dropped.
assert resident() - before < 100e6, resident() - before
taken.clear()
assert (rows.bfloat16() @ weight.bfloat16().t()).dtype == torch.bfloat16 and not taken
torch.backends.mkldnn.set_flags(False)
check(F.linear, rows, weight, bias, calls=0)
torch.backends.mkldnn.set_flags(True)
for left, right in ((rows, weight), (rows, weight.t().double()), (rows[0], weight.t())):
    for function in (torch.mm, lambda a, b: torch.addmm(bias, a, b)):
        try:
            function(left, right)
        except RuntimeError:
            continue
        raise AssertionError("shapes or dtypes that do not fit were multiplied")
print("done")
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_products_and_gradients_are_those_of_torch():
    """Claim: whatever the strides, with and without a bias; what is small, in another dtype or switched off stays."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PRODUCTS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr[-3000:]


@pytest.mark.parametrize(
    "vendor, capability, available, wanted",
    [
        ("AuthenticAMD", "AVX512", True, True),
        ("GenuineIntel", "AVX512", True, False),
        ("AuthenticAMD", "AVX2", True, False),
        ("AuthenticAMD", "AVX512", False, False),
        (None, "AVX512", True, False),
    ],
)
def test_only_processors_that_gain_are_chosen(vendor, capability, available, wanted, monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    if vendor is not None:
        cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(cpu_products, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: available)
    assert cpu_products.is_wanted() is wanted


def test_what_is_multiplied_by_has_no_gaps():
    """Claim: a slice is copied, for which oneDNN would take a thousand times as long; a transposed matrix is not."""
    whole = torch.randn(6, 8)
    for right in (whole, whole.t(), whole[2:], whole[:, None, :].squeeze(1)):
        assert cpu_products._dense(right) is right
    for right in (whole[:, 2:], whole[:, 2:].t(), whole[:, ::2], whole[:1].expand(6, 8)):
        assert cpu_products._dense(right).is_contiguous() and torch.equal(cpu_products._dense(right), right)
