"""Each GPU attention backend against SDPA and a dense softmax, forward and backward, for every mask kind."""

import math

import pytest
import torch

from megatron_cocoa.batch import MaskKind
from megatron_cocoa.model import sdpa
from megatron_cocoa.model.attention import attend_function
from megatron_cocoa.model.segments import SegmentTable, compile_segments
from megatron_cocoa.parallel import device
from tests.parity.masks import dense_attention

pytestmark = pytest.mark.gpu

LENGTHS, BRIDGES, TAIL = [200, 1, 333, 64], [120, 200, 201, 597], 10
"""The bridges lie inside, alone, first and last in their samples: block A or block B is empty for three of four."""

SHAPES = {"language": (16, 2, 128), "tower": (16, 16, 80)}
"""Query heads, key-value heads and head dimension of Qwen2.5-VL-3B's two parts."""

FACTOR = 2.0
"""Kernels round a BF16 softmax at other places than SDPA does; a wrong row is a hundred times farther off."""


def inputs(table: SegmentTable, shape: tuple[int, int, int]) -> list[torch.Tensor]:
    heads, groups, dim = shape
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(table.length, n, dim, generator=generator).cuda().bfloat16().requires_grad_()
        for n in (heads, groups, groups)
    ]


def run(attend, tensors: list[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, then the gradients of query, key and value."""
    output = attend(*tensors)
    return [output.detach(), *torch.autograd.grad(output, tensors, weight.to(output.dtype))]


def mask_of(table: SegmentTable) -> torch.Tensor:
    low, high = (torch.from_numpy(x)[:, None] for x in table.key_ranges())
    columns = torch.arange(table.length)[None]
    return ((low <= columns) & (columns < high)).cuda()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference over that of the reference."""
    return float((found.float() - wanted.float()).square().mean().sqrt() / wanted.float().square().mean().sqrt())


def backend_or_skip(name: str):
    """The backend; Transformer Engine's is absent too where cuDNN gives it no fused kernel."""
    try:
        attend = attend_function(name, on_gpu=device.has_gpu())
        if name == "transformer_engine":
            table = SegmentTable.from_lengths([64, 64])
            attend(*inputs(table, SHAPES["language"]), table, 0.1)
    except ValueError as reason:
        pytest.skip(str(reason))
    return attend


def check(name: str, table_of, shape: tuple[int, int, int]) -> None:
    attend = backend_or_skip(name)
    tensors = inputs(table_of(), shape)
    heads, _, dim = shape
    scale = 1.0 / math.sqrt(dim)
    weight = torch.randn(len(tensors[0]), heads, dim, generator=torch.Generator().manual_seed(1)).cuda()
    exact = [x.detach().float().requires_grad_() for x in tensors]
    mask = mask_of(table_of())
    wanted = run(lambda q, k, v: dense_attention(q, k, v, mask, scale), exact, weight)
    ours = run(lambda q, k, v: attend(q, k, v, table_of(), scale), tensors, weight)
    by_sdpa = run(lambda q, k, v: sdpa.attend(q, k, v, table_of(), scale), tensors, weight)
    for what, found, other, reference in zip(("output", "query", "key", "value"), ours, by_sdpa, wanted):
        assert found.shape == reference.shape and found.dtype == torch.bfloat16
        assert error(found, reference) <= FACTOR * error(other, reference), what


@pytest.mark.parametrize("part", SHAPES)
@pytest.mark.parametrize("kind", MaskKind)
@pytest.mark.parametrize("backend", ["flash", "transformer_engine"])
def test_backend_equals_sdpa(backend, kind, part):
    """Claim: a backend changes speed and nothing else, for every mask kind, in outputs and gradients."""
    check(backend, lambda: compile_segments(kind, LENGTHS, BRIDGES, TAIL), SHAPES[part])


@pytest.mark.parametrize("backend", ["flash", "transformer_engine"])
def test_backend_equals_sdpa_over_windows(backend):
    """Claim: many short segments, as the tower's windows are, are served too."""
    check(backend, lambda: SegmentTable.from_lengths([64] * 20 + [16, 32, 4]), SHAPES["tower"])


@pytest.mark.parametrize("kind", MaskKind)
def test_sdpa_equals_dense_attention_in_float32(kind):
    """Claim: the reference of the tests above is right on this GPU."""
    table = compile_segments(kind, LENGTHS, BRIDGES, TAIL)
    tensors = [x.detach().float().requires_grad_() for x in inputs(table, SHAPES["language"])]
    weight = torch.randn(table.length, 16, 128, generator=torch.Generator().manual_seed(1)).cuda()
    mask = mask_of(table)
    wanted = run(lambda q, k, v: dense_attention(q, k, v, mask, 0.1), tensors, weight)
    found = run(lambda q, k, v: sdpa.attend(q, k, v, table, 0.1), tensors, weight)
    for mine, reference in zip(found, wanted):
        # Float32 kernels may multiply in TF32 by the machine's setting: 10 bits of mantissa.
        assert error(mine, reference) < 2e-3


def test_auto_picks_a_variable_length_kernel_where_there_is_one():
    """Claim: ``auto`` on a GPU is not SDPA if a flash kernel is present."""
    backend_or_skip("flash")
    assert attend_function("auto", on_gpu=True) is not sdpa.attend
