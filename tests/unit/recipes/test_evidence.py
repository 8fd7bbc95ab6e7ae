"""Which rows of a pool the evidence of the reconstruction stages is measured on."""

import json
from types import SimpleNamespace

import pytest

from megatron_cocoa.recipes.context import POOLS
from megatron_cocoa.recipes.evidence import pool_rows


@pytest.mark.parametrize("num", [1, 3, 6, 9, 11, 12, 40])
def test_rows_are_spread_over_the_whole_pool(tmp_path, num):
    """Claim: no more rows than the limit, and no part of the file is left out: neighbours are alike in distance."""
    lines = [json.dumps({"id": str(i), "image_path": "a.png", "caption": f"name {i}"}) + "\n" for i in range(num)]
    (tmp_path / POOLS["heldout"]).write_text("".join(lines))
    context = SimpleNamespace(settings=SimpleNamespace(data=SimpleNamespace(path=str(tmp_path))))
    found = [int(row.row_id) for row in pool_rows(context, "heldout", 6)]
    assert len(found) == min(num, 6)
    gaps = [after - before for before, after in zip(found, [*found[1:], num])]
    assert sum(gaps) == num and max(gaps) - min(gaps) <= 1
