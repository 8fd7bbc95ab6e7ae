"""What a run needs before a model is built."""

from dataclasses import replace

import pytest

from megatron_cocoa.recipes.context import prepare_context
from tests.distributed.tiny_run import tiny_settings


def test_evaluation_without_a_pool_is_refused(tiny_folders, tmp_path):
    """Claim: a run that is asked for measurements does not train without them and say nothing."""
    settings = tiny_settings(tiny_folders, evaluate=True)
    assert prepare_context(settings).settings == settings
    nothing = replace(settings, data=replace(settings.data, path=str(tmp_path)))
    message = "has neither eval_heldout.jsonl nor eval_train.jsonl .* or set evaluate to false"
    with pytest.raises(ValueError, match=message):
        prepare_context(nothing)
    prepare_context(replace(nothing, evaluate=False))
