"""CPU functions in place of Transformer Engine's kernels: norms, products, and rounding to FP8 by a scale per tensor.

Products and norms are computed in float32 and rounded once, FP8 numbers are those of torch's FP8 dtypes, and a product
in FP8 refuses operands that the kernels of a Hopper would: widths or rows that are no multiple of 16, and data in the
orientation that it does not read. ``blockwise`` and ``mxfp8`` have no stand-in.
"""

from __future__ import annotations

import contextlib
import os
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 16


def install() -> None:
    """Replace kernels of the extension, and what asks the driver for a device."""
    import transformer_engine_torch as extension

    for function in (
        rmsnorm_fwd, rmsnorm_bwd, layernorm_fwd, layernorm_bwd, generic_gemm, quantize, bgrad_quantize, fp8_transpose,
        compute_amax, multi_tensor_scale, multi_tensor_compute_scale_and_scale_inv,
    ):  # fmt: skip
        setattr(extension, function.__name__, function)
    # Delayed scaling has a form in Python beside its kernel.
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"
    hopper = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="none")
    torch.cuda.get_device_properties = lambda *_: hopper
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.is_current_stream_capturing = lambda: False


def gather_apart(module: ModuleType) -> None:
    """gloo coalesces tensors of several dtypes wrongly; weights in FP8 and in BF16 are gathered together."""
    together, gather = module._coalescing_manager, module.dist_all_gather_func
    start = module._ParamAndGradBucketGroup.start_param_sync

    @contextlib.contextmanager
    def apart(*args, **kwargs):
        yield SimpleNamespace(wait=lambda: None)

    def start_param_sync(self, *args, **kwargs):
        module._coalescing_manager = apart
        module.dist_all_gather_func = lambda *of, **more: gather(*of, **{**more, "async_op": False})
        try:
            return start(self, *args, **kwargs)
        finally:
            module._coalescing_manager, module.dist_all_gather_func = together, gather

    module._ParamAndGradBucketGroup.start_param_sync = start_param_sync


def _dtype(found) -> torch.dtype:
    from transformer_engine.pytorch.constants import DType, TE_DType_To_Torch

    return found if isinstance(found, torch.dtype) else TE_DType_To_Torch[DType.cast(found)]


def _normalized(out: Tensor, given, quantizer):
    if quantizer is not None:
        return quantize(out, quantizer, given)
    return out if given is None else given.copy_(out)


def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, margin, zero_centered):
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1) + eps)
    found = wide * inverse.unsqueeze(-1) * (weight.float() + zero_centered)
    return _normalized(found.to(_dtype(dtype)), out, quantizer), None, inverse


def rmsnorm_bwd(grad, x, inverse, weight, margin, zero_centered):
    normal, wide = x.float() * inverse.unsqueeze(-1), grad.float()
    scaled = wide * (weight.float() + zero_centered)
    found = inverse.unsqueeze(-1) * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    return found.to(x.dtype), _rows(wide * normal).sum(0).to(weight.dtype)


def layernorm_fwd(x, weight, bias, eps, out, quantizer, dtype, margin, zero_centered):
    wide = x.float()
    mean = wide.mean(-1)
    centered = wide - mean.unsqueeze(-1)
    inverse = torch.rsqrt(centered.square().mean(-1) + eps)
    found = centered * inverse.unsqueeze(-1) * (weight.float() + zero_centered) + bias.float()
    return _normalized(found.to(_dtype(dtype)), out, quantizer), mean, inverse


def layernorm_bwd(grad, x, mean, inverse, weight, margin, zero_centered):
    normal, wide = (x.float() - mean.unsqueeze(-1)) * inverse.unsqueeze(-1), grad.float()
    scaled = wide * (weight.float() + zero_centered)
    inner = scaled - scaled.mean(-1, keepdim=True) - normal * (scaled * normal).mean(-1, keepdim=True)
    of_weight, of_bias = (_rows(x).sum(0).to(weight.dtype) for x in (wide * normal, wide))
    return (inverse.unsqueeze(-1) * inner).to(x.dtype), of_weight, of_bias


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def generic_gemm(
    a, transa, b, transb, out, quantizer, out_dtype, bias, bias_dtype, gelu, gelu_in, grad, workspace, size,
    accumulate, split_accumulator, *, comm_overlap=None, comm_type=None, extra_output=None, bulk_overlap=False,
    alpha=1.0, beta=None,
):  # fmt: skip
    """``b' @ a'`` of row-major matrices, each transposed if told; bias added, or its gradient summed over ``b``."""
    assert comm_overlap is None and not gelu
    left, right = _operand(b, by_columns=transb), _operand(a, by_columns=not transa)
    shape = left.shape[:-1]
    left, right = _rows(left), _rows(right)
    bias_grad = None
    if grad and bias is not None and bias.numel():
        bias_grad = left.sum(0).to(bias.dtype)
    found = alpha * ((left.T if transb else left) @ (right.T if transa else right))
    if not grad and bias is not None and bias.numel():
        found = found + bias.float()
    if not transb:
        found = found.reshape(*shape, found.shape[-1])
    if out is not None:
        target = out.view(found.shape)
        target.copy_(target + found.to(out.dtype) if accumulate else found)
        return out, bias_grad, None, extra_output
    found = found.to(torch.bfloat16 if out_dtype is None and _is_rounded(a) else _dtype(out_dtype or a.dtype))
    return found if quantizer is None else quantize(found, quantizer), bias_grad, None, extra_output


def _is_rounded(x) -> bool:
    return hasattr(x, "_fp8_dtype")


def _operand(x, *, by_columns: bool) -> Tensor:
    """float32, in its logical shape; in FP8 from the data that the kernel reads, which must be there."""
    if not _is_rounded(x):
        return x.float()
    data = x._transpose if by_columns else x._data
    assert data is not None and not (by_columns and x._transpose_invalid), "the product reads data that is not there"
    width = data.shape[0 if by_columns else -1]
    assert width % ALIGNMENT == 0 == data.numel() // width % ALIGNMENT, f"a product in FP8 of {tuple(data.shape)}"
    wide = data.view(_dtype(x._fp8_dtype)).float() * x._scale_inv
    return wide.movedim(0, -1) if by_columns else wide


@torch.no_grad()
def quantize(tensor, quantizer, output=None, noop=None):
    """Round by ``quantizer``, into ``output`` if given; its columns lie in front in the transposed data."""
    values = (tensor.dequantize() if _is_rounded(tensor) else tensor).detach().float()
    dtype = _dtype(quantizer.dtype)
    largest = torch.finfo(dtype).max
    scale = _scale(quantizer, values, largest)
    data = (values * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
    by_columns = data.movedim(-1, 0).contiguous() if quantizer.columnwise_usage else None
    if output is None:
        return _made(tensor, quantizer, data, by_columns, 1 / scale)
    if output._data is not None:
        output._data.copy_(data.view(output._data.shape))
    output._scale_inv.copy_((1 / scale).view(output._scale_inv.shape))
    if by_columns is not None:
        output._transpose, output._transpose_invalid = by_columns, False
    return output


def _scale(quantizer, values: Tensor, largest: float) -> Tensor:
    found = values.abs().max().reshape(1) if values.numel() else torch.zeros(1)
    if hasattr(quantizer, "scale"):
        if quantizer.amax.numel():
            quantizer.amax.copy_(torch.maximum(quantizer.amax, found))
        return quantizer.scale.clone().reshape(1)
    if quantizer.with_amax_reduction:
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    return _scale_of(found, largest, quantizer.force_pow_2_scales, quantizer.amax_epsilon)


def _scale_of(amax: Tensor, largest: float, power_of_two: bool, epsilon: float) -> Tensor:
    amax = amax.clamp_min(epsilon)
    scale = torch.where(amax > 0, largest / amax, torch.ones_like(amax))
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_two else scale


def _made(tensor, quantizer, data: Tensor, by_columns: Tensor | None, inverse: Tensor):
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    common = dict(
        data=data if quantizer.rowwise_usage else None,
        data_transpose=by_columns,
        fp8_scale_inv=inverse,
        fp8_dtype=quantizer.dtype,
        quantizer=quantizer,
    )
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=tensor.dtype, **common)
    return Float8Tensor(shape=tensor.shape, dtype=tensor.dtype, device=tensor.device, requires_grad=False, **common)


def bgrad_quantize(grad, quantizer):
    return _rows(grad).float().sum(0).to(grad.dtype), quantize(grad, quantizer)


def fp8_transpose(data, dtype, out=None):
    found = data.movedim(-1, 0).contiguous()
    return found if out is None else out.copy_(found)


def compute_amax(tensor, amax) -> None:
    amax.copy_(tensor.float().abs().max().reshape(amax.shape))


def multi_tensor_scale(chunk, overflow, lists, scale) -> None:
    for source, target in zip(*lists):
        target.copy_(source * scale)


def multi_tensor_compute_scale_and_scale_inv(chunk, overflow, lists, largest, power_of_two, epsilon) -> None:
    for amax, scale, inverse in zip(*lists):
        scale.copy_(_scale_of(amax, largest, power_of_two, epsilon))
        inverse.copy_(1 / scale)
