"""FP32 matrix products on AMD's CPUs by oneDNN, there twice as fast as torch's own choice.

torch hands such products to MKL, which on an EPYC with AVX-512 reaches the speed of AVX2. oneDNN, which torch brings as
well, reaches that of AVX-512 (docs/results.md). Its product takes the place of torch's kernels of ``mm`` and ``addmm``
for the whole process, below autograd: whatever multiplies matrices, forward or backward, has it.
``torch.backends.mkldnn.set_flags(False)``, torch's own switch, turns it off again.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

LEAST_MULTIPLICATIONS = 2**24
"""Of a product that goes to oneDNN. It compiles a kernel for each new shape, which takes longer than a smaller product,
and packs make new shapes all the time."""

KEPT_KERNELS = 64
"""Compiled kernels that oneDNN, and torch beside it, keep: those of a step. Their own 1024 take a gigabyte, with
the holes that they leave between activations, before the first is dropped."""

_CPUINFO = Path("/proc/cpuinfo")
_library: torch.library.Library | None = None


def is_wanted() -> bool:
    """Whether this process's torch has oneDNN, on a processor that MKL does not use whole."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        return "AuthenticAMD" in _CPUINFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


@functools.cache
def install() -> None:
    """Replace torch's kernels for the life of the process, where ``is_wanted``."""
    global _library
    if not is_wanted():
        return
    # Both are read when the first product asks for a kernel.
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_KERNELS))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        _library = torch.library.Library("aten", "IMPL")
        _library.impl("mm", _mm, "CPU")
        _library.impl("addmm", _addmm, "CPU")


def _mm(left: Tensor, right: Tensor) -> Tensor:
    if _is_large(left, right):
        return _product(left, right, None)
    # The form with ``out`` has a kernel of its own.
    return torch.mm(left, right, out=left.new_empty(0))


def _addmm(added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta == alpha == 1 and _is_large(left, right) and added.shape == right.shape[1:] and added.dtype == left.dtype:
        return _product(left, right, added)
    return torch.addmm(added, left, right, beta=beta, alpha=alpha, out=left.new_empty(0))


def _is_large(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype == torch.float32
        and left.dim() == right.dim() == 2
        and left.shape[1] == right.shape[0]
        and left.numel() * right.shape[1] >= LEAST_MULTIPLICATIONS
        and torch._C._get_mkldnn_enabled()
    )


def _product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    # It copies a first operand whose rows are not contiguous, such as the transposed gradient of a weight's gradient,
    # which may be larger than the other operand and the product together.
    other_way = right.numel() * (not right.t().is_contiguous()) + left.shape[0] * right.shape[1]
    if bias is None and not left.is_contiguous() and other_way < left.numel():
        return _linear(right.t(), _dense(left), None).t().contiguous()
    return _linear(left, _dense(right).t(), bias)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``rows @ weight.T + bias``."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _dense(right: Tensor) -> Tensor:
    """``right`` without gaps between its rows or columns, for which oneDNN has no kernel but a plain loop."""
    return right if right.is_contiguous() or right.t().is_contiguous() else right.contiguous()
