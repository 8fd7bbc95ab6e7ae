"""What the two converters' command lines share: options' types, the report, one message for whatever goes wrong."""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from megatron_cocoa.checkpoint.export import ExportReport
    from megatron_cocoa.checkpoint.import_hf import ImportReport

DTYPES = ("auto", "bf16", "fp32")
DIALECT_NAMES = ("sharded", "megatron-bridge")
EXIT_DIFFERENT = 1
EXIT_BAD_INPUT = 2
REPORT_SECONDS = 30

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_count(text: str) -> int:
    """``500MB`` or ``2GiB`` in bytes."""
    match = re.fullmatch(r"(\d+)\s*([KMG]?I?B|)", text.strip().upper())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: needed a number with KB, MB, GB, KiB, MiB or GiB")
    return int(match[1]) * _UNITS.get(match[2], 1)


def dtype_of(word: str) -> torch.dtype | None:
    """None for ``auto``."""
    import torch

    return {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}[word]


def add_verify_options(parser: argparse.ArgumentParser) -> None:
    """``--verify`` and ``--verify-only``."""
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--verify",
        action="store_true",
        help="read both sides back and compare them bit for bit, then run both models in fp32 on text and pictures, "
        "causal and bidirectional, one after the other: the memory of the weights on disk, of their embeddings and one "
        "layer in fp32, and 1 GiB more, which is checked first",
    )
    choice.add_argument(
        "--verify-only", action="store_true", help="write nothing: run that comparison on two folders that exist"
    )


def check_verify_memory(args: argparse.Namespace, *, source: Literal["huggingface", "megatron"]) -> None:
    """Refuse a comparison that was asked for and that memory cannot hold, before anything is written.

    Raises:
        ValueError: with what is needed, what was found, and what to do instead.
    """
    if not (args.verify or args.verify_only):
        return
    from megatron_cocoa.conversion.memory import check_fp32_memory, size_of_checkpoint, size_of_huggingface

    readers = {"huggingface": (size_of_huggingface, args.hf_path), "megatron": (size_of_checkpoint, args.mcore_path)}
    sizes = [read(path) for side, (read, path) in readers.items() if args.verify_only or side == source]
    if args.verify and (cast := dtype_of(args.dtype)) is not None:
        sizes.append(replace(sizes[0], itemsize=cast.itemsize))
    check_fp32_memory(
        sizes[0].num_parameters,
        what="--verify" if args.verify else "--verify-only",
        instead="convert without it, and compare with --verify-only where there is more memory"
        if args.verify
        else "run it where there is more memory",
        host_bytes=max(size.verify_bytes() for size in sizes),
    )


def verified(args: argparse.Namespace, *, source: Literal["huggingface", "megatron"]) -> bool:
    """Run the comparison if it was asked for; ``source`` is the side that the other was made from."""
    if not (args.verify or args.verify_only):
        return True
    from megatron_cocoa.conversion.verify import verify

    return verify(args.hf_path, args.mcore_path, source=source, progress=ProgressLines("compared"))


class ProgressLines:
    """Prints how far a step has come, each time that ``REPORT_SECONDS`` have passed.

    Args:
        done: the word for it, such as ``converted``.
    """

    def __init__(self, done: str) -> None:
        self.word = done
        self.start = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= REPORT_SECONDS:
            self.last, took = now, now - self.start
            # A batch system's log is a file, where lines would wait for thousands more.
            print(
                f"{self.word}: {done} of {total} tensors after {took:.0f} s, about {took * (total / done - 1):.0f} s "
                f"more",
                flush=True,
            )


def run_command(action: Callable[[], bool], *, target: str) -> int:
    """Run ``action`` on the first rank and turn what it does into an exit status.

    Args:
        action: does the work; False where a comparison failed.
        target: folder that it writes.

    Returns:
        0, ``EXIT_DIFFERENT``, or ``EXIT_BAD_INPUT`` after one message on stderr.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        # Other ranks have nothing to wait for: torchrun ends when the first one does.
        return 0
    _quiet_libraries()
    # What a batch system sends when time is up must clean up as an interrupt does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start = time.monotonic()
    try:
        from megatron_cocoa.checkpoint.placement import leftovers

        for folder in leftovers(Path(target).absolute()):
            print(f"note: {folder} is being written, or was left by a conversion that was killed; then delete it")
        passed = action()
    except ValueError as error:
        return _fail(str(error))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = f": free space or choose another place than {target}" if full else ""
        return _fail(f"{error}{hint}")
    except KeyboardInterrupt:
        return _fail(f"interrupted: {target} is as it was, or whole if a line above says that it was written")
    print(f"{'done' if passed else 'FAILED: the two models differ'} after {time.monotonic() - start:.1f} s")
    return 0 if passed else EXIT_DIFFERENT


def _quiet_libraries() -> None:
    """Deprecations inside of Megatron-Core and torch are no concern of whoever converts a model."""
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|DTensor).*")
    warnings.filterwarnings("ignore", module=r"megatron\.")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return EXIT_BAD_INPUT


def report_import(report: ImportReport) -> None:
    """Print what an import wrote and what it ignored."""
    print(
        f"{report.path}: {report.num_hf_tensors} Hugging Face tensors in {report.num_tensors} Megatron tensors, "
        f"{report.num_bytes / 1e9:.3f} GB",
        flush=True,
    )
    for name, reason in report.ignored.items():
        print(f"ignored {name}: {reason}")
    if report.own is not None:
        print(report.own)


def report_export(report: ExportReport) -> None:
    """Print what an export wrote and what it left out."""
    size = f"{report.num_bytes / 1e9:.3f} GB"
    print(f"{report.path}: {report.num_tensors} tensors in {len(report.files)} file(s), {size}", flush=True)
    for line in report.beside:
        print(f"beside it: {line}")
    for line in report.left_out:
        print(f"left out: {line}")
