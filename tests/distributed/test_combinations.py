"""Random combinations of settings train at two layouts, one after the other, as in one plain process.

    bash tests/run.sh tests/distributed/test_combinations.py -m slow --combinations 300 --combinations-seed 1000

runs numbers 1000 to 1299. What fails is run alone by its number.
"""

import numpy as np
import pytest

from tests.distributed.combinations import COMBINATIONS, DRAWN, parts_of
from tests.distributed.drawing import STEPS
from tests.distributed.launch import result_of, some_slow


@pytest.mark.parametrize("check", some_slow(COMBINATIONS, set(DRAWN)))
def test_a_combination_stopped_and_moved_trains_as_one_process(request, check):
    """Claim: layout, packs, recompute, data workers and a stop change neither loss, gradient nor weights.

    Bounds are those of test_gradients.py for the first step, at both layouts; of test_resuming.py for losses and final
    weights, although the run that never stopped is one of another layout and other packs here; and of
    test_training.py for gradient norms.
    """
    if check in DRAWN:
        command = "bash tests/run.sh tests/distributed/test_combinations.py -m slow --combinations 1"
        print(f"{command} --combinations-seed {check.rpartition('-')[2]}")
        print(f"after {DRAWN[check][1]} that were refused: {DRAWN[check][0]}")
    alone, stopped, resumed = (result_of(request, part) for part in parts_of(check))
    assert len(alone["loss"]) == len(resumed["loss"]) == STEPS
    assert len(set(alone["loss"])) == STEPS, "losses that stand still compare nothing"
    assert resumed["loss"][: len(stopped["loss"])] == stopped["loss"] != []
    errors = {
        # Not Python's max, which passes over what is no number.
        name: float(np.max(np.abs(1 - np.array(resumed[name]) / np.array(alone[name]))))
        for name in ("loss", "grad_norm")
    }
    print(errors := errors | {"stopped": stopped, "resumed": resumed})
    for part in (stopped, resumed):
        assert part["gradient"] < 1e-5 and part["first_loss"] < 1e-6, errors
    assert errors["loss"] < 1e-5 and errors["grad_norm"] < 1e-3, (errors, alone)
    assert resumed["worst"] < 1e-5 and resumed["compared"] > 20, errors
