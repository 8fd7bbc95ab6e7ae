"""Settings that every test shares. Markers and the default selection stand in pyproject.toml."""

import os

# Before torch is imported: test processes share few cores, and results must not depend on the thread count.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.util  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# Claims here are about results: a busy machine must not fail them, and a red run must be red again.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True)
hypothesis.settings.load_profile("project")


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> Path:
    """A model folder and a data folder that a run trains on in seconds."""
    from tests.distributed.tiny_run import write_folders

    folder = tmp_path_factory.mktemp("tiny")
    write_folders(folder)
    return folder


def checked(item: pytest.Item) -> str | None:
    """The check among ``tests/distributed`` and ``tests/parity`` whose result the test waits for."""
    return item.callspec.params.get("check") if hasattr(item, "callspec") else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rehearse", action="store_true", help="run tests of a GPU on a CPU, as far as they go there")
    parser.addoption("--combinations", type=int, default=10, help="random combinations that the slow tests train")
    parser.addoption("--combinations-seed", type=int, default=0, help="number of the first of them")


def pytest_configure(config: pytest.Config) -> None:
    # Read by this process and by all ranks, which draw the same combinations.
    os.environ["COMBINATIONS"] = " ".join(str(config.getoption(f"--combinations{what}")) for what in ("-seed", ""))
    if config.getoption("--rehearse"):
        # Read where Triton is imported, and torch imports it where it is installed.
        os.environ["TRITON_INTERPRET"] = "1"
        rehearse_transformer_engine()


def rehearse_transformer_engine() -> None:
    """Let Transformer Engine run here and in all processes that tests start, if it is installed and a GPU is not."""
    import torch

    if torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None:
        return
    folder = str(Path(__file__).parent / "rehearsal")
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    from transformer_engine_on_cpu import rewrite_imports

    rewrite_imports()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that wait for ranks come last. Skip what needs a GPU where there is none, with that reason."""
    items.sort(key=lambda item: checked(item) is not None)
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    import torch

    if torch.cuda.is_available():
        return
    if config.getoption("--rehearse"):
        from megatron_cocoa.parallel.cpu_route import activate_cpu_route

        activate_cpu_route()
    else:
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device is available"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the ranks of the tests that are left once all selection is done."""
    names = {checked(item) for item in session.items} - {None}
    if names and not session.config.option.collectonly:
        from tests.distributed import launch

        launch.start(names)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave no ranks behind, also where the session was cut short."""
    if any(checked(item) for item in session.items):
        from tests.distributed import launch

        launch.stop()
