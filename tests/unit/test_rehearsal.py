"""What stands in for Transformer Engine's kernels in a rehearsal computes what torch's autograd does."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

FOLDER = Path(__file__).resolve().parents[1] / "rehearsal"
F32 = torch.float32


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"rehearsal_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stand_ins = load("stand_ins")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.fixture(autouse=True)
def known_dtypes(monkeypatch):
    """The library's names of dtypes need the library."""
    monkeypatch.setattr(stand_ins, "_dtype", lambda found: found)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norms(kind):
    """Claim: output and gradients of both norms are torch's, in float32 to its rounding."""
    x, weight, bias, grad = drawn(6, 8), drawn(8, seed=1), drawn(8, seed=2), drawn(6, 8, seed=3).detach()
    if kind == "rmsnorm":
        wanted, inputs = F.rms_norm(x, (8,), weight, 1e-5), (x, weight)
        out, _, inverse = stand_ins.rmsnorm_fwd(x, weight, 1e-5, None, None, F32, 0, False)
        found = stand_ins.rmsnorm_bwd(grad, x, inverse, weight, 0, False)
    else:
        wanted, inputs = F.layer_norm(x, (8,), weight, bias, 1e-5), (x, weight, bias)
        out, mean, inverse = stand_ins.layernorm_fwd(x, weight, bias, 1e-5, None, None, F32, 0, False)
        found = stand_ins.layernorm_bwd(grad, x, mean, inverse, weight, 0, False)
    assert_close(out, wanted)
    for mine, theirs in zip(found, torch.autograd.grad(wanted, inputs, grad)):
        assert_close(mine, theirs)


def test_products_of_a_linear():
    """Claim: the three products of a linear, as Transformer Engine asks for them, are output and gradients."""
    x, weight, bias, grad = drawn(5, 1, 4), drawn(3, 4, seed=1), drawn(3, seed=2), drawn(5, 1, 3, seed=3).detach()
    wanted = F.linear(x, weight, bias)
    of_x, of_weight, of_bias = torch.autograd.grad(wanted, (x, weight, bias), grad)

    def product(a, transa, b, transb, *, out=None, bias=None, grad=False, accumulate=False):
        workspace = torch.empty(1)
        return stand_ins.generic_gemm(
            a, transa, b, transb, out, None, None if out is not None else F32, bias, None, False, None, grad,
            workspace, 1, accumulate, False,
        )  # fmt: skip

    assert_close(product(weight, True, x, False, bias=bias)[0], wanted)
    assert_close(product(weight, False, grad, False, grad=True)[0], of_x)
    main_grad = torch.ones(3, 4)
    found, found_bias, *_ = product(x, False, grad, True, out=main_grad, bias=bias, grad=True, accumulate=True)
    assert found is main_grad
    assert_close(main_grad, 1 + of_weight)
    assert_close(found_bias, of_bias)


def test_a_source_that_changed_is_not_run(tmp_path, monkeypatch):
    """Claim: where a passage to be replaced is gone, the import fails and names it: no half of a rehearsal."""
    rewriting = load("transformer_engine_on_cpu")
    (tmp_path / "rehearsed.py").write_text("found = 'cuda'\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [rewriting._Finder(), *sys.meta_path])
    monkeypatch.setitem(rewriting.REWRITTEN, "rehearsed", [("'cuda'", "'cpu'")])
    assert __import__("rehearsed").found == "cpu"
    monkeypatch.delitem(sys.modules, "rehearsed")
    monkeypatch.setitem(rewriting.REWRITTEN, "rehearsed", [("'tpu'", "'cpu'")])
    with pytest.raises(ImportError, match="rehearsed has no .*'tpu'.* any more"):
        __import__("rehearsed")
