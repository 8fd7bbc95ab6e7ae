"""Train the CoCoA stages: parse settings, run, exit.

Usually started through examples/pretrain_cocoa.sh; see --help for every setting.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_cocoa.settings.parse import parse_settings  # noqa: E402

EXIT_FAULT, EXIT_BAD_INPUT = 1, 2


def _say(message: str) -> None:
    """Print to the log, if it takes it: the disk that ended the run may be full for the log too."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def _tell_launcher(message: str) -> None:
    """Write ``message`` to the file from which torchrun takes the root cause that it prints last.

    The form is that of torch's own ``ErrorHandler``, which would write the whole stack instead.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        more = {"py_callstack": message, "timestamp": str(int(time.time()))}
        # As in ``_say``.
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": more}}), encoding="utf-8")


def main() -> int:
    started = time.monotonic()
    first = os.environ.get("RANK", "0") == "0"
    try:
        with contextlib.nullcontext() if first else contextlib.redirect_stdout(open(os.devnull, "w")):
            settings = parse_settings(sys.argv[1:])
        settings.parallel.data_parallel_size(int(os.environ.get("WORLD_SIZE", "1")))
        # Imported late, so that a mistyped key is reported without waiting for torch.
        warnings.filterwarnings("ignore", module="megatron.core")
        warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|deprecating ShardedTensor).*")
        from megatron_cocoa.parallel.topology import LaunchInfo
        from megatron_cocoa.recipes.run import run

        # What the imports made stays: collecting garbage would look through all of it, a quarter of a second each time.
        gc.freeze()
        run(settings, LaunchInfo.from_environment(), seconds_since_start=time.monotonic() - started)
    except (ValueError, FloatingPointError) as error:
        if first:
            _say(f"error: {error}")
        else:
            # torchrun ends all ranks when one has ended: give the first rank time to print the same error.
            time.sleep(3)
            _say(f"error on rank {os.environ['RANK']}: {error}")
        _tell_launcher(str(error))
        return EXIT_BAD_INPUT
    except Exception as error:
        _say(traceback.format_exc())
        _tell_launcher(f"{type(error).__name__}: {error}")
        return EXIT_FAULT
    return 0


def _end_at_once(status: int) -> NoReturn:
    """End without what Python and libraries do at an orderly end, in which a rank may wait for ever.

    Python would join workers that are deaf to its signal, and a background write that nobody will complete; NCCL would
    wait for collectives that the other ranks never join. Until the rank has ended, its launcher ends no other.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    # Where a rank was, when NCCL's watchdog ends it (SIGABRT) or somebody asks one that hangs (SIGUSR2).
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)
    ended_with = main()
    if ended_with:
        _end_at_once(ended_with)
