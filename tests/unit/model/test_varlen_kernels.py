"""The variable-length kernels as they are called, on stand-ins that compute what the kernels are documented to."""

import importlib.metadata
import importlib.util
import inspect
import itertools
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings

from megatron_cocoa.model import varlen, varlen_kernels
from megatron_cocoa.parallel import device
from tests.unit.model.test_attention_backends import check, problems, varlen_kernel


def described(cum_q, cum_k, max_q, max_k, causal) -> SimpleNamespace:
    return SimpleNamespace(cu_q=cum_q, cu_k=cum_k, max_q=max_q, max_k=max_k, causal=causal)


def flash_forward(
    query, key, value, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale, window_size_left,
    window_size_right, **others,
):  # fmt: skip
    assert dropout == 0 and not debug and not any(value is not None for value in others.values())
    assert (window_size_left, window_size_right) == (-1, 0 if causal else -1)
    out = varlen_kernel(query, key, value, described(cum_q, cum_k, max_q, max_k, causal), scale)
    empty = torch.empty(0)
    return out, torch.zeros(query.shape[1], query.shape[0]), torch.zeros(2, dtype=torch.uint64), empty, empty.clone()


def flash_backward(
    gradient, query, key, value, out, sums, cum_q, cum_k, max_q, max_k, dropout, causal, state, unused, *, scale,
    window_size_left, window_size_right,
):  # fmt: skip
    """The gradient of softmax attention, as the kernels compute it: Dao et al., FlashAttention, appendix B.4."""
    assert dropout == 0 and (window_size_left, window_size_right) == (-1, 0 if causal else -1)
    gradients = [torch.zeros_like(x) for x in (query, key, value)]
    for (a, b), (c, d) in zip(segments(cum_q), segments(cum_k)):
        visible = torch.ones(b - a, d - c, dtype=torch.bool)
        for head in range(query.shape[1]):
            group = head * key.shape[1] // query.shape[1]
            q, g, o = (x[a:b, head] for x in (query, gradient, out))
            k, v = (x[c:d, group] for x in (key, value))
            scores = (q @ k.T * scale).masked_fill(~(visible.tril() if causal else visible), float("-inf"))
            weights = scores.softmax(-1)
            score_gradient = weights * (g @ v.T - (g * o).sum(-1, keepdim=True)) * scale
            gradients[0][a:b, head] = score_gradient @ k
            gradients[1][c:d, group] += score_gradient.T @ q
            gradients[2][c:d, group] += weights.T @ g
    return tuple(gradients)


def segments(offsets) -> list[tuple[int, int]]:
    return list(itertools.pairwise(offsets.tolist()))


@pytest.fixture(scope="module")
def flash_operator():
    """torch's operators, which have GPU kernels alone, with a loop over dense attention on the CPU."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", flash_forward, "CPU")
        library.impl("_flash_attention_backward", flash_backward, "CPU")
        yield


@given(problem=problems())
@settings(max_examples=40)
def test_torchs_operator_is_dense_attention(flash_operator, problem):
    """Claim: this torch's operator takes what we hand it, and its own gradient formula hands on the same."""
    assert varlen_kernels._torch_has_flash()
    check(lambda *arguments: varlen.attend_with(varlen_kernels._torch_flash, *arguments), problem)


def varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    """With the arguments of flash-attn 3 (``hopper/flash_attn_interface.py``, August 2026)."""
    call = described(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    return varlen_kernel(q, k, v, call, softmax_scale)


def varlen_func_4(
    q, k, v, qv=None, gather_kv_indices=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None,
    causal=False, window_size=(None, None), softcap=0.0, num_splits=1, deterministic=False,
):  # fmt: skip
    """With the arguments of flash-attn 4 that are asked for here or come before them (4.0.0b36)."""
    call = described(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    return varlen_kernel(q, k, v, call, softmax_scale), None


@pytest.fixture
def installed(monkeypatch):
    """Makes flash-attn packages present, by module, with the function that they have."""
    present: dict[str, ModuleType] = {}
    distributions: dict[str, str] = {}
    find_spec, version = importlib.util.find_spec, importlib.metadata.version

    def install(name: str, function) -> None:
        present[name] = SimpleNamespace(flash_attn_varlen_func=function)
        if name == "flash_attn.cute":
            distributions["flash-attn-4"] = "4.0.0b36"
        monkeypatch.setitem(varlen_kernels.importlib.sys.modules, name, present[name])

    def spec(name):
        if name in present:
            return SimpleNamespace(origin="here")
        if name == "flash_attn" and "flash_attn.cute" in present:
            return SimpleNamespace(origin=None)
        return None if name.startswith("flash_attn") else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: distributions.get(name) or version(name))
    return install


@pytest.mark.parametrize(
    "module, function",
    [
        ("flash_attn_interface", varlen_func),
        ("flash_attn_interface", lambda *a, **k: (varlen_func(*a, **k), None)),
        ("flash_attn.cute", varlen_func_4),
    ],
    ids=["3", "early 3", "4"],
)
def test_flash_attn_is_dense_attention(installed, monkeypatch, module, function):
    """Claim: each flash-attn takes what we hand it, also where it returns the softmax's sums beside the output."""
    installed(module, function)
    monkeypatch.setattr(device, "compute_capability", lambda: (9, 0))
    kernel = varlen_kernels.flash_kernel()

    @given(problem=problems())
    @settings(max_examples=20)
    def run(problem):
        check(lambda *arguments: varlen.attend_with(kernel, *arguments), problem)

    run()


def test_the_fastest_flash_attn_that_can_run_is_taken(installed, monkeypatch):
    """Claim: of what is installed the fastest that serves the chip is taken: 3, 4, 2, then torch's own."""

    def chosen_on(capability: int) -> str:
        monkeypatch.setattr(device, "compute_capability", lambda: (capability, 0))
        kernel = varlen_kernels.flash_kernel()
        return kernel.__name__ if inspect.isfunction(kernel) else kernel.args[0]

    def chosen(*capabilities: int) -> list[str]:
        return [chosen_on(capability) for capability in capabilities]

    assert chosen(9) == ["_torch_flash"]
    # It brings a folder named like flash-attn 2, which is none.
    installed("flash_attn.cute", varlen_func_4)
    assert chosen(8, 9, 10) == ["_torch_flash", "flash_attn.cute", "flash_attn.cute"]
    installed("flash_attn_interface", varlen_func)
    assert chosen(8, 9, 10) == ["_torch_flash", "flash_attn_interface", "flash_attn.cute"]
    installed("flash_attn", varlen_func)
    assert chosen(8, 9, 10) == ["flash_attn", "flash_attn_interface", "flash_attn.cute"]


def on_hopper(monkeypatch, folder) -> None:
    """With the packages in ``folder``."""
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "compute_capability", lambda: (9, 0))
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)


def flash_attn_2(folder, code: str) -> None:
    """As 2.8.3 installs itself: with an early form of flash-attn 4's module, which lacks what that one depends on."""
    (folder / "flash_attn" / "cute").mkdir(parents=True)
    (folder / "flash_attn" / "__init__.py").write_text(code)
    (folder / "flash_attn" / "cute" / "__init__.py").write_text("import cutlass_of_another_distribution")


def test_what_flash_attn_2_brings_along_is_not_flash_attn_4(tmp_path, monkeypatch):
    """Claim: a machine with flash-attn 2.8 alone uses it, on a chip that flash-attn 4 would serve."""
    flash_attn_2(tmp_path, "__version__ = '2.8.3'")
    with monkeypatch.context() as patch:
        on_hopper(patch, tmp_path)
        found = device.optional_kernels()
        assert (found["flash-attn"], found["flash-attn 4"]) == ("2.8.3", None)
        assert varlen_kernels.flash_kernel().args == ("flash_attn",)
        sys.modules.pop("flash_attn")


def test_a_flash_attn_that_does_not_load_is_named(tmp_path, monkeypatch):
    """Claim: built for another torch, flash-attn 2 is named as what to repair, flash-attn 4's files beside or not."""
    flash_attn_2(tmp_path, "raise ImportError('undefined symbol')")
    described = tmp_path / "flash_attn_4-4.0.0b36.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0b36\n")
    on_hopper(monkeypatch, tmp_path)
    with pytest.raises(RuntimeError, match=r"flash_attn is installed but does not load \(undefined symbol\): repair"):
        device.optional_kernels()
