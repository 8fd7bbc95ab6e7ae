"""Starts the runs that the selected tests look at, before the first of this folder's tests."""

from concurrent.futures import ThreadPoolExecutor

import pytest


@pytest.fixture(scope="session", autouse=True)
def runs(request, tiny_folders, tmp_path_factory):
    """Each run's output folder, as a future: what a run raises, its test raises."""
    # Not at the top: in a rehearsal the package must not be imported before pytest is configured.
    from tests.gpu.runs import AT_ONCE, start_all

    items = [item for item in request.session.items if hasattr(item, "callspec") and not skipped(item)]
    names = {item.callspec.params["run"] for item in items if "run" in item.callspec.params}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield start_all(pool, names | ({"bf16"} if names else set()), tiny_folders, tmp_path_factory.mktemp)
        pool.shutdown(cancel_futures=True)


def skipped(item: pytest.Item) -> bool:
    return item.get_closest_marker("skip") is not None
