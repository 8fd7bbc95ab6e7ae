"""Linears that make their input again: the same gradients as Megatron's own, with nothing of the input kept."""

import gc
from collections.abc import Callable

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megatron_cocoa.batch import MaskKind
from megatron_cocoa.model import activations, sdpa
from megatron_cocoa.model.activations import SwiGLU, gelu, quick_gelu
from megatron_cocoa.model.norms import Norm, _RMSNorm
from megatron_cocoa.model.remade import RemadeColumnParallelLinear, RemadeRowParallelLinear, reshaped
from megatron_cocoa.model.segments import compile_segments
from tests.live_bytes import LiveBytes

ROWS, HIDDEN, FFN = 12, 16, 24

pytestmark = pytest.mark.usefixtures("single_rank")


def config(**changes) -> TransformerConfig:
    values = dict(
        num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=2, normalization="RMSNorm",
        gated_linear_unit=True, use_cpu_initialization=True, gradient_accumulation_fusion=False, add_bias_linear=False,
    )  # fmt: skip
    return TransformerConfig(**{**values, **changes})


def mlp(column: type, row: type, own: TransformerConfig) -> torch.nn.ModuleList:
    """Norm, linear, activation, linear, with weights that do not depend on the classes."""
    common = dict(config=own, init_method=torch.nn.init.normal_, bias=False, skip_bias_add=True)
    parts = torch.nn.ModuleList(
        [
            Norm(own, HIDDEN),
            column(HIDDEN, FFN * (1 + own.gated_linear_unit), gather_output=False, **common),
            SwiGLU(own) if own.gated_linear_unit else torch.nn.Identity(),
            row(FFN, HIDDEN, input_is_parallel=True, **common),
        ]
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return parts


def run(parts: torch.nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    norm, first, activation, second = parts
    activation = activation if isinstance(activation, SwiGLU) else quick_gelu
    return second(activation(first(norm(x))[0]))[0]


def gradients(parts: torch.nn.ModuleList) -> list[torch.Tensor]:
    x = torch.randn(ROWS, 1, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    run(parts, x).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in parts.parameters() if parameter.requires_grad)]


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_linears_that_keep_their_input(normalization, gated, frozen):
    """Claim: what is made again is what was there, bit for bit, also where a weight is frozen."""
    own = config(normalization=normalization, gated_linear_unit=gated)
    found = []
    for kinds in ((RemadeColumnParallelLinear, RemadeRowParallelLinear), (ColumnParallelLinear, RowParallelLinear)):
        parts = mlp(*kinds, own)
        parts[1].weight.requires_grad_(not frozen)
        found.append(gradients(parts))
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def kept_bytes(parts: torch.nn.ModuleList) -> int:
    """Of all storages beside parameters, input and output that live on after the forward pass, whoever holds them."""
    return bytes_kept_by(lambda x: run(parts, x), parts)


def bytes_kept_by(call: Callable[[torch.Tensor], torch.Tensor], module: torch.nn.Module, width: int = HIDDEN) -> int:
    x = torch.randn(ROWS, 1, width, requires_grad=True)
    with LiveBytes() as memory:
        memory.track([x, *module.parameters()])
        before = memory.live
        output = call(x)
        gc.collect()
        kept = memory.live - before - output.untyped_storage().nbytes()
    assert output.requires_grad
    return kept


@pytest.mark.parametrize("gated", [False, True])
def test_only_the_activations_input_and_a_number_a_row_are_kept(gated):
    """Claim: between forward and backward stand the activation's input and the norm's row lengths, no output."""
    own = config(gated_linear_unit=gated)
    lean = kept_bytes(mlp(RemadeColumnParallelLinear, RemadeRowParallelLinear, own))
    plain = kept_bytes(mlp(ColumnParallelLinear, RowParallelLinear, own))
    assert lean == 4 * ROWS * (FFN * (1 + gated) + 1)
    assert plain == lean + 4 * ROWS * (HIDDEN + FFN)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("frozen", [None, 1, 3])
def test_a_projection_is_run_again_for_its_activation(normalization, gated, frozen):
    """Claim: with ``remakes_output`` nothing of the ffn's width is kept and gradients stay the same, bit for bit.

    It is run again once, for the activation and for the linear behind it.
    """
    own = config(normalization=normalization, gated_linear_unit=gated)
    found, kept, runs = [], [], []
    for again in (False, True):
        parts = mlp(RemadeColumnParallelLinear, RemadeRowParallelLinear, own)
        parts[1].remakes_output = again
        if frozen is not None:
            parts[frozen].weight.requires_grad_(False)
        parts[1].forward = lambda *args, forward=parts[1].forward: runs.append(forward(*args)) or runs[-1]
        found.append(gradients(parts))
        assert len(runs) == 1 + again
        runs.clear()
        del parts[1].forward
        kept.append(kept_bytes(parts))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept[0] - kept[1] == 4 * ROWS * FFN * (1 + gated)


def test_an_input_without_a_recipe_is_kept_for_a_projection_that_is_run_again():
    """Claim: the projection runs again on the very rows that it read, also where its own weight is frozen."""
    _, first, activation, second = mlp(RemadeColumnParallelLinear, RemadeRowParallelLinear, config())
    first.weight.requires_grad_(False)
    x, found = torch.randn(ROWS, 1, HIDDEN), []
    for again in (False, True):
        first.remakes_output = again
        leaf = x.clone().requires_grad_()
        second(activation(first(leaf * 1.0)[0]))[0].square().sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [MaskKind.BIDIRECTIONAL, MaskKind.EOS_BRIDGED])
def test_attentions_output_is_kept_once(kind, groups):
    """Claim: behind attention over buckets the projection joins the buckets' outputs again, bit for bit."""
    heads, dim = 4, 8
    table = compile_segments(kind, (5, 7), (3, 9) if kind.needs_bridge else ())
    own = config(num_attention_heads=heads)
    common = dict(config=own, init_method=torch.nn.init.ones_, bias=False, skip_bias_add=True, input_is_parallel=True)
    key = torch.randn(ROWS, groups, dim, generator=torch.Generator().manual_seed(4))
    gradients, kept = [], []
    for kind_of_linear in (RemadeRowParallelLinear, RowParallelLinear):
        linear = kind_of_linear(heads * dim, HIDDEN, **common)

        def project(x: torch.Tensor, linear=linear) -> torch.Tensor:
            out = sdpa.attend(x.view(ROWS, heads, dim), key, key, table, 0.3)
            return linear(reshaped(out, ROWS, 1, heads * dim))[0]

        x = torch.randn(ROWS, 1, heads * dim, generator=torch.Generator().manual_seed(5)).requires_grad_()
        project(x).square().sum().backward()
        gradients.append((x.grad, linear.weight.grad))
        kept.append(bytes_kept_by(project, linear, heads * dim))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] - kept[0] == 4 * ROWS * heads * dim


def test_the_mergers_activation_is_kept_once():
    """Claim: GELU keeps its input and the linear behind it nothing; the gradient is torch's."""
    second = RemadeRowParallelLinear(
        HIDDEN, HIDDEN, config=config(), init_method=torch.nn.init.ones_, bias=False, input_is_parallel=True,
        skip_bias_add=True,
    )  # fmt: skip
    assert bytes_kept_by(lambda x: second(gelu(x))[0], second) == 0
    found = []
    for function in (gelu, F.gelu):
        x = torch.randn(ROWS, 1, HIDDEN, generator=torch.Generator().manual_seed(6)).requires_grad_()
        second.weight.grad = None
        second(function(x))[0].square().sum().backward()
        found.append((x.grad, second.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize(("again", "said"), [(False, "modified by an inplace operation"), (True, "second backward")])
def test_a_second_backward_pass_through_an_activation_is_refused(again, said):
    """Claim: what wrote its gradient over its input, or let it go, says so rather than give a wrong gradient."""
    parts = mlp(RemadeColumnParallelLinear, RemadeRowParallelLinear, config())
    parts[1].remakes_output = again
    parts[3].weight.requires_grad_(False)
    loss = run(parts, torch.randn(ROWS, 1, HIDDEN, requires_grad=True)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=said):
        loss.backward()


@pytest.mark.parametrize("rows", [150, 0])
@pytest.mark.parametrize("gated", [False, True])
def test_activations_and_their_gradients_equal_autograds(gated, rows, monkeypatch):
    """Claim: outputs and gradients are those of the definition in double precision, over many blocks and a rest."""
    monkeypatch.setattr(activations, "BLOCK_ELEMENTS", 400)
    activation = SwiGLU(config()) if gated else quick_gelu
    x, grad = (torch.randn(rows, 1, width, generator=torch.Generator().manual_seed(3)) for width in (16, 16 >> gated))
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    out = activation(leaf)
    out.backward(grad)
    gate, up = exact.chunk(2, dim=-1) if gated else (exact, None)
    wanted = gate * torch.sigmoid(gate) * up if gated else exact * torch.sigmoid(1.702 * exact)
    wanted.backward(grad.double())
    # A handful of FP32 operations on values of order one to ten.
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_torchs_in_double_precision(dtype):
    """Claim: outputs and both gradients are those of torch's own norm, to the rounding of the dtype."""
    generator = torch.Generator().manual_seed(2)
    x, weight, grad = (torch.randn(size, generator=generator).to(dtype) for size in ((5, 3, 40), (40,), (5, 3, 40)))
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    out = _RMSNorm.apply(*leaves, 0.1)
    out.backward(grad)
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    wanted = F.rms_norm(exact[0], (40,), exact[1], 0.1)
    wanted.backward(grad.double())
    # A sum of 15 products in the dtype's own rounding; FP32 carries 24 bits, BF16 8.
    tolerance = 1e-5 if dtype is torch.float32 else 2**-7
    for mine, theirs in ((out, wanted), (leaves[0].grad, exact[0].grad), (leaves[1].grad, exact[1].grad)):
        assert mine.dtype is dtype
        assert (mine.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("skip_bias_add", [False, True])
def test_a_bias_is_added_whoever_should_have_added_it(skip_bias_add):
    """Claim: output and gradients are Megatron's with its bias, to the bit, and no bias is left to the caller."""
    found = []
    for linear_class in (ColumnParallelLinear, RemadeColumnParallelLinear):
        torch.manual_seed(0)
        linear = linear_class(
            HIDDEN, FFN, config=config(), init_method=torch.nn.init.normal_, bias=True, gather_output=False,
            skip_bias_add=skip_bias_add,
        )  # fmt: skip
        with torch.no_grad():
            linear.bias.copy_(torch.randn(FFN))
        x = torch.randn(ROWS, 1, HIDDEN).requires_grad_()
        output, bias = linear(x)
        if linear_class is RemadeColumnParallelLinear:
            assert bias is None
        output = output if bias is None else output + bias
        output.square().sum().backward()
        found.append([output.detach(), x.grad, linear.weight.grad, linear.bias.grad])
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(found[1], found[0]))


def test_swiglu_without_gradients_is_the_same():
    """Claim: what is written over its input has the bits of what training computes."""
    x = torch.randn(ROWS, 1, 2 * FFN)
    wanted = SwiGLU(config())(x.clone().requires_grad_()).detach()
    with torch.no_grad():
        assert torch.equal(SwiGLU(config())(x), wanted)
