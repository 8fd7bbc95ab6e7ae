"""Rows in one buffer: the same rows come back, in a fraction of the memory, and nothing of them is an object before."""

import gc
import pickle
import tracemalloc
from dataclasses import replace

import pytest

from megatron_cocoa.data.row_store import RowStore
from megatron_cocoa.data.rows import CaptionRow, Content, PairRow
from megatron_cocoa.data.stored import StoredPicture

CELL = StoredPicture("root", "data.arrow", "cell", (3, 1), "image")
SLICE = StoredPicture("root", "shard.tar", "slice", (512, 9_000_000_000))
ROWS = [
    CaptionRow("0", "a.png", "a cat", "cat", "s"),
    CaptionRow("", SLICE, "ein Kätzchen 🐈"),
    PairRow("1", Content("q"), Content("t")),
    PairRow("2", Content("<|image_1|>", CELL), Content("<|image_2|><|image_1|>", "b.png", (SLICE, "c.png"))),
    PairRow("3", Content("q", ""), Content("t"), (Content("n"), Content("<|image_1|>", "n.png")), "source"),
]


def test_rows_come_back_as_they_were():
    """Claim: every field of every kind of row, references to pictures inside of other files among them."""
    store = RowStore(ROWS)
    assert list(store) == ROWS and store == ROWS and len(store) == len(ROWS)
    assert [store[i] for i in range(len(ROWS))] == ROWS
    assert store[-1] == ROWS[-1] and store[1:4] == ROWS[1:4] and store[::2] == ROWS[::2]
    assert [type(row.image_path) for row in store[:2]] == [str, StoredPicture]
    assert RowStore() == [] and not RowStore() and store != ROWS[:-1] and store != ROWS[::-1]
    for place in (5, -6):
        with pytest.raises(IndexError, match=f"row {place} of 5"):
            store[place]


def test_a_store_is_handed_over_in_arrays():
    """Claim: what is pickled beside the arrays holds no row, and the store on the other side has the same rows."""
    for rows in (ROWS, []):
        store, arrays = RowStore(rows), []
        pickled = pickle.dumps(store, protocol=5, buffer_callback=arrays.append)
        found = pickle.loads(pickled, buffers=[array.raw().toreadonly() for array in arrays])
        assert found == rows and found.digest() == store.digest() and found.nbytes == store.nbytes
        assert sum(array.raw().nbytes for array in arrays) == store.nbytes and b"a cat" not in pickled
        assert pickle.loads(pickle.dumps(found)) == rows


def test_the_digest_tells_rows_and_their_order_apart_but_not_where_they_lie():
    """Claim: any text, name, picture or order counts, the folders of pictures do not."""
    whole = RowStore(ROWS).digest()
    assert whole == RowStore(RowStore(ROWS)).digest()
    moved = [replace(ROWS[1], image_path=replace(SLICE, root="elsewhere")), ROWS[1]]
    assert RowStore(moved[:1]).digest() == RowStore(moved[1:]).digest()
    others = [
        [replace(ROWS[0], caption="a hat"), *ROWS[1:]],
        [replace(ROWS[0], row_id="9"), *ROWS[1:]],
        [replace(ROWS[0], image_path="b.png"), *ROWS[1:]],
        [replace(ROWS[0], source="other"), *ROWS[1:]],
        [ROWS[0], replace(ROWS[1], image_path=replace(SLICE, place=(0, 512))), *ROWS[2:]],
        [*ROWS[:2], replace(ROWS[2], target=Content("u")), *ROWS[3:]],
        [*ROWS[:3], replace(ROWS[3], query=Content("<|image_1|>", replace(CELL, column="other"))), ROWS[4]],
        [*ROWS[:4], replace(ROWS[4], negatives=ROWS[4].negatives[:1])],
        [ROWS[1], ROWS[0], *ROWS[2:]],
        ROWS[:4],
    ]
    assert len({whole, *(RowStore(rows).digest() for rows in others)}) == 1 + len(others)


def test_the_digest_is_stable_across_versions():
    """A recorded digest: a change, of Python's ``marshal`` too, would refuse to go on with every run under way."""
    assert RowStore(ROWS).digest() == "0b63802ec85db136acafffb3e4edb1ad"


def pair(index: int) -> PairRow:
    """As MMEB-train has them: an instruction, a path, a short answer."""
    text = f"<|image_1|>\nFind a caption for the news in the given photo number {index}."
    picture = StoredPicture("/data/MMEB-train", f"images/VisualNews_i2t/Train/{index:08d}.jpg")
    return PairRow(
        f"VisualNews_i2t/original-00000:{index}", Content(text, picture), Content(f"answer {index}"), (), "s"
    )


def test_memory_is_that_of_the_texts():
    """Claim: a pair takes less than half of what it takes as objects, and keeps no object alive."""
    number = 20_000

    def taken(make) -> tuple[int, int]:
        gc.collect()
        before = len(gc.get_objects())
        tracemalloc.start()
        held = make()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(held) == number
        return size // number, len(gc.get_objects()) - before

    objects, _ = taken(lambda: [pair(i) for i in range(number)])
    stored, alive = taken(lambda: RowStore(pair(i) for i in range(number)))
    assert stored < objects / 2, (stored, objects)
    assert alive < 100
