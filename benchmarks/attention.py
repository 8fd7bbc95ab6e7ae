"""Collaborative attention by segments beside dense-mask SDPA, forward and backward, on the same numbers.

    python benchmarks/attention.py [--lengths 256 512 1024 2048 4096 8192 16384] [--samples 1] [--heads 16 --groups 2]

One JSON line. For each length ``n``: packs of ``--samples`` samples of ``n`` tokens (with ``--mixed``, of n/2 to n),
each with its bridge at 0.7 of its length. The reference is SDPA with a mask made once, outside of the timing, on
contiguous ``(samples, heads, n, dim)``; of its forms (boolean or additive mask, ``enable_gqa`` or keys repeated inside
of the timing, on a GPU also cuDNN's kernel instead of the one that torch chooses) the fastest of a trial counts.
Outputs and gradients are compared first. On a GPU every backend that is present takes its turn, FlexAttention among
them, in BF16; ``kernel_seconds`` are those of both sides' kernels alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.side_by_side import hardware, kernel_seconds, measure_pairs, peak_bytes, versions  # noqa: E402
from megatron_cocoa.batch import MaskKind  # noqa: E402
from megatron_cocoa.model.attention import attend_function  # noqa: E402
from megatron_cocoa.model.segments import compile_segments  # noqa: E402
from megatron_cocoa.parallel import device  # noqa: E402
from megatron_cocoa.parallel.device_memory import release_memory  # noqa: E402

BRIDGE_AT = 0.7
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative root mean square: FP32 sums in another order, BF16 rounds each product to 8 bits."""
GPU_BACKENDS = ("sdpa", "flash", "transformer_engine", "flex")


class Problem:
    """One pack and what both sides compute on it."""

    def __init__(self, lengths: list[int], heads: int, groups: int, dim: int, dtype: torch.dtype):
        self.lengths, self.heads, self.groups, self.scale = lengths, heads, groups, dim**-0.5
        starts = np.cumsum([0, *lengths])
        bridges = [int(start + BRIDGE_AT * length) for start, length in zip(starts, lengths)]
        self.table = compile_segments(MaskKind.EOS_BRIDGED, lengths, bridges)
        generator = torch.Generator().manual_seed(0)
        shapes = [(self.table.length, n, dim) for n in (heads, groups, groups, heads)]
        *inputs, weight = [torch.randn(s, generator=generator).to(device.device(), dtype) for s in shapes]
        self.packed, self.weight = [x.requires_grad_() for x in inputs], weight
        self.padded = [self.pad(x.detach()).requires_grad_() for x in inputs]
        self.padded_weight = self.pad(weight)

    def pad(self, x: Tensor) -> Tensor:
        """``(tokens, heads, dim)`` to contiguous ``(samples, heads, longest, dim)``, zero where padded."""
        samples = torch.nn.utils.rnn.pad_sequence(x.split(self.lengths), batch_first=True)
        return samples.transpose(1, 2).contiguous()

    def unpad(self, x: Tensor) -> Tensor:
        return torch.cat([sample[:, :length].transpose(0, 1) for sample, length in zip(x, self.lengths)])

    def dense_mask(self) -> Tensor:
        """Boolean ``(samples, 1, longest, longest)``; padding rows see themselves, so that no row is empty."""
        low, high = self.table.key_ranges()
        longest, start = max(self.lengths), 0
        mask = torch.eye(longest, dtype=torch.bool).repeat(len(self.lengths), 1, 1, 1)
        columns = torch.arange(longest)
        for index, length in enumerate(self.lengths):
            rows = slice(start, start + length)
            first, last = (torch.from_numpy(x[rows] - start)[:, None] for x in (low, high))
            mask[index, 0, :length] = (first <= columns) & (columns < last)
            start += length
        return mask.to(device.device())

    def segments(self, attend) -> Callable[[], list[Tensor]]:
        """Forward and backward by a backend of ours, on the pack."""

        def run() -> list[Tensor]:
            out = attend(*self.packed, self.table, self.scale)
            return [out.detach(), *torch.autograd.grad(out, self.packed, self.weight)]

        return run

    def dense(self, mask: Tensor, *, repeat: bool, by_cudnn: bool) -> Callable[[], list[Tensor]]:
        """Forward and backward by SDPA with a mask, with the kernel that torch chooses or with cuDNN's."""
        ratio = self.heads // self.groups

        def run() -> list[Tensor]:
            query, key, value = self.padded
            if repeat:
                key, value = (x.repeat_interleave(ratio, dim=1) for x in (key, value))
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if by_cudnn else contextlib.nullcontext():
                out = scaled_dot_product_attention(
                    query, key, value, attn_mask=mask, scale=self.scale, enable_gqa=not repeat and ratio > 1
                )
            return [out.detach(), *torch.autograd.grad(out, self.padded, self.padded_weight)]

        return run


def dense_forms(problem: Problem) -> dict[str, Callable[[], list[Tensor]]]:
    """The ways to write the reference, by name."""
    mask = problem.dense_mask()
    dtype = problem.weight.dtype
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    masks = {"bool": mask, "additive": additive}
    # torch prefers cuDNN's from a version of cuDNN on, and Transformer Engine may have loaded another than torch's.
    return {
        f"{name}, {'repeated keys' if repeat else 'enable_gqa'}{', cuDNN' if by_cudnn else ''}": problem.dense(
            masks[name], repeat=repeat, by_cudnn=by_cudnn
        )
        for name in masks
        for repeat in (False, True)
        for by_cudnn in ((False, True) if device.has_gpu() else (False,))
    }


def fastest(forms: dict[str, Callable[[], list[Tensor]]], calls: int) -> str:
    """By the best of three trials each, in turn with one form; a form that cannot run here is out."""
    names = [name for name, run in forms.items() if _fits(run)]
    best = dict.fromkeys(names, float("inf"))
    for first, second in ((names[0], other) for other in names[1:]):
        found = measure_pairs(forms[first], forms[second], repeats=3, calls=calls)
        best[first] = min(best[first], found["ours_spread"][0])
        best[second] = found["reference_spread"][0]
    return min(best, key=best.__getitem__)


def _fits(run: Callable[[], list[Tensor]]) -> bool:
    try:
        run()
    except torch.OutOfMemoryError:
        return False
    except RuntimeError as error:
        # cuDNN may find out at the first call, or in its backward pass, that it has no plan for a form.
        if not any(refusal in str(error) for refusal in ("No available kernel", "cuDNN Frontend error")):
            raise
        return False
    finally:
        release_memory()
    return True


def largest_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Of outputs and gradients: root mean square of the difference over that of the reference."""
    pairs = [(x.float(), y.float()) for x, y in zip(found, wanted)]
    return max(float((x - y).square().mean().sqrt() / y.square().mean().sqrt()) for x, y in pairs)


def check(problem: Problem, ours: Callable[[], list[Tensor]], wanted: list[Tensor], name: str) -> float:
    error = largest_error(ours(), [problem.unpad(x) for x in wanted])
    if not error <= TOLERANCE[problem.weight.dtype]:
        raise SystemExit(f"{name} differs from dense SDPA by {error:.2g} at lengths {problem.lengths}")
    return error


def lengths_of(n: int, samples: int, mixed: bool) -> list[int]:
    return [n // 2 + (n // 2) * i // max(1, samples - 1) for i in range(samples)] if mixed else [n] * samples


def measure(n: int, args: argparse.Namespace) -> dict[str, object]:
    """All backends against the reference at one length."""
    dtype = torch.bfloat16 if device.has_gpu() else torch.float32
    problem = Problem(lengths_of(n, args.samples, args.mixed), args.heads, args.groups, args.dim, dtype)
    forms = dense_forms(problem)
    # Enough calls for a tenth of a second on one CPU core, and for a hundredth on a GPU.
    work = sum(length**2 for length in problem.lengths) * args.heads * args.dim
    calls = min(200, max(1, int((2e11 if device.has_gpu() else 2e8) // work)))
    name = fastest(forms, calls)
    reference = forms[name]
    wanted = reference()
    row: dict[str, object] = {"n": n, "tokens": problem.table.length, "reference_form": name}
    row["score_entries_ratio"] = round(len(problem.lengths) * n**2 / problem.table.num_score_entries(), 3)
    row["reference_peak_bytes"] = peak_bytes(reference)
    for backend in args.backends:
        try:
            attend = attend_function(backend, on_gpu=device.has_gpu(), half_precision=dtype == torch.bfloat16)
        except ValueError as reason:
            row[backend] = {"absent": str(reason)}
            continue
        ours = problem.segments(compiled(attend) if backend == "flex" else attend)
        try:
            error = check(problem, ours, wanted, backend)
        except (ValueError, torch.OutOfMemoryError) as reason:
            row[backend] = {"absent": str(reason)}
            continue
        found = measure_pairs(ours, reference, repeats=args.repeats, calls=calls)
        row[backend] = {**found, "ours_peak_bytes": peak_bytes(ours), "largest_error": float(f"{error:.2g}")}
        row[backend]["kernel_seconds"] = [kernel_seconds(side) for side in (ours, reference)]
    return row


def compiled(attend):
    """FlexAttention is a kernel only under torch.compile; by itself it materialises all scores."""
    import torch.nn.attention.flex_attention as library

    from megatron_cocoa.model import flex

    flex.flex_attention = torch.compile(library.flex_attention, dynamic=False)
    return attend


def main(arguments: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--samples", type=int, default=1, help="of each pack")
    parser.add_argument("--mixed", action="store_true", help="samples of n/2 to n tokens; the reference pads them")
    parser.add_argument("--heads", type=int, default=16, help="query heads")
    parser.add_argument("--groups", type=int, default=2, help="key-value heads")
    parser.add_argument("--dim", type=int, default=128, help="of a head")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of each length")
    parser.add_argument("--threads", type=int, help="of both sides")
    backends = GPU_BACKENDS if device.has_gpu() else ("sdpa",)
    parser.add_argument("--backends", nargs="+", choices=backends, default=backends)
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    for n in args.lengths:
        rows.append(measure(n, args))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {
        "benchmark": "attention",
        "mask": "eos_bridged",
        "bridge_at": BRIDGE_AT,
        "shape": {"heads": args.heads, "groups": args.groups, "dim": args.dim},
        "samples": args.samples,
        "mixed": args.mixed,
        "results": rows,
        "versions": versions(),
        "hardware": hardware(),
    }


if __name__ == "__main__":
    print(json.dumps(main()))
