"""The parity cases as checks for the ranks."""

from __future__ import annotations

import functools

from tests.distributed.check import Check
from tests.parity.cases import CASES
from tests.parity.compare import run_case

CHECKS = {name: Check(case.world_size, functools.partial(run_case, case)) for name, case in CASES.items()}
