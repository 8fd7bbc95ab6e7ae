"""The launch script as users type it: its three forms, and mistakes that must end at once in one clear message."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.processes import environment

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path("examples") / "pretrain_cocoa.sh"
SECONDS = 300
"""Far above what any case needs (2 to 10 s, a whole run a minute or two on a busy machine): only a hang gets there."""

STAND_IN = '''
import multiprocessing, os, sys
from megatron_cocoa.settings.parse import parse_settings

def child(queue):
    queue.put("child")

if __name__ == "__main__":
    settings = parse_settings(sys.argv[1:])
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    answer = queue.get(timeout=60)
    process.join()
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    print(f"rank {rank} of {size}: {settings.stages[0]} {answer}\\n", end="", flush=True)
'''

FAULT = """
import multiprocessing, os, runpy, signal, sys, time, types

def deaf(parent, is_deaf):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    is_deaf.set()
    while os.getppid() == parent:
        time.sleep(0.1)

def run(*args, **kwargs):
    context = multiprocessing.get_context("fork")
    is_deaf = context.Event()
    context.Process(target=deaf, args=(os.getpid(), is_deaf), daemon=True).start()
    is_deaf.wait()
    os.kill(os.getpid(), signal.SIGUSR2)
    raise ERROR

sys.modules["megatron_cocoa.recipes.run"] = types.SimpleNamespace(run=run)
launch = types.SimpleNamespace(from_environment=lambda: None)
sys.modules["megatron_cocoa.parallel.topology"] = types.SimpleNamespace(LaunchInfo=launch)
sys.argv = ["tools/train.py"]
runpy.run_path("tools/train.py", run_name="__main__")
"""


def launch(
    *command: str, cwd: Path, preexec_fn: Callable[[], None] | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` with this interpreter's ``torchrun`` first on PATH and no launcher variables of the outside."""
    return subprocess.run(
        command, cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=SECONDS,
        preexec_fn=preexec_fn,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the repository whose tools/train.py only says on which rank it ran, after spawning a process."""
    root = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "megatron_cocoa", root / "megatron_cocoa", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("examples", "tools"):
        (root / folder).mkdir()
    shutil.copy(ROOT / SCRIPT, root / SCRIPT)
    (root / "tools" / "train.py").write_text(STAND_IN)
    return root


@pytest.mark.parametrize(
    ("command", "ranks"),
    [
        (["torchrun", "{script}", "--stages", "bridge"], 1),
        (["torchrun", "--nproc-per-node", "2", "{script}", "--stages", "bridge"], 2),
        (["bash", "{script}", "--stages", "bridge"], 1),
        (["sh", "{script}", "--stages=bridge"], 1),
    ],
    ids=["torchrun", "torchrun-2", "bash", "sh"],
)
def test_each_form_runs_every_rank_once(tree, tmp_path, command, ranks):
    """Claim: the file is valid Python and valid shell, from any folder, and spawned processes do not re-run it."""
    done = launch(*(part.format(script=tree / SCRIPT) for part in command), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = sorted(re.findall(r"^rank .*$", done.stdout, flags=re.MULTILINE))
    assert said == [f"rank {rank} of {ranks}: bridge child" for rank in range(ranks)]


def test_shell_form_takes_the_number_of_ranks_from_the_environment(tree, tmp_path):
    """Claim: NPROC_PER_NODE reaches torchrun."""
    done = launch("bash", str(tree / SCRIPT), cwd=tmp_path, NPROC_PER_NODE="2")
    assert done.stdout.count("of 2: warmup child") == 2, done.stderr


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
    ],
)
def test_settings_of_the_allocator_that_are_given_are_kept(tmp_path, given, found):
    """Claim: GPU segments grow unless the environment says something of the allocator, by either name."""
    for folder in ("examples", "tools"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / SCRIPT, tmp_path / SCRIPT)
    shows = "import json, os\nprint(json.dumps({n: v for n, v in os.environ.items() if n.endswith('ALLOC_CONF')}))\n"
    (tmp_path / "tools" / "train.py").write_text(shows)
    done = launch(sys.executable, str(SCRIPT), cwd=tmp_path, **given)
    assert json.loads(done.stdout) == found, done.stderr


def test_the_script_is_valid_shell_to_its_end():
    """Claim: shells, editors and linters that read the whole file find no syntax error."""
    subprocess.run(["bash", "-n", str(ROOT / SCRIPT)], check=True)


@pytest.mark.parametrize("script", ["examples/quickstart.sh", "examples/setup_env.sh", "tests/run.sh", ".ci/run"])
def test_the_other_scripts_are_valid_shell(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


@pytest.mark.parametrize(
    ("ranks", "arguments", "message"),
    [
        (1, ["--warmpu.lr", "1e-4"], "unknown setting --warmpu.lr, did you mean --warmup.lr?"),
        (1, ["--warmup.steps", "many"], "--warmup.steps is 'many', needed a whole number"),
        (1, ["--stages", "contrastive,bridge"], "in this order, each once"),
        (3, ["--parallel.tensor_model_parallel_size", "2"], "3 rank(s) cannot be divided into replicas of 2"),
    ],
    ids=["key", "type", "order", "ranks"],
)
def test_a_mistake_ends_in_one_message(tmp_path, ranks, arguments, message):
    """Claim: a wrong setting is told once, on rank 0, without a traceback of ours, and the exit is not zero; what
    torchrun prints at the end names it as the root cause."""
    output = str(tmp_path / "output")
    done = launch(
        "torchrun", f"--nproc-per-node={ranks}", str(ROOT / SCRIPT), "--output_dir", output, *arguments, cwd=tmp_path
    )
    text = done.stdout + done.stderr
    assert done.returncode != 0
    said, _, root_cause = text.partition("Root Cause")
    assert said.count(message) == 1, text
    assert message in root_cause and "To enable traceback" not in root_cause, text
    assert "tools/train.py\", line" not in text, "the message must not come with our own stack"


def end_with(error: Exception, log: Path, told: Path) -> int:
    """Exit status of a rank that ``error`` ends; all that it prints goes to ``log``."""
    with log.open("a") as stream:
        return subprocess.run(
            [sys.executable, "-c", FAULT.replace("ERROR", repr(error))], cwd=ROOT, stdout=stream,
            stderr=subprocess.STDOUT, env=environment(TORCHELASTIC_ERROR_FILE=str(told)), timeout=60,
        ).returncode  # fmt: skip


def told_to_launcher(told: Path) -> str:
    return json.loads(told.read_text())["message"]["message"]


def test_a_rank_with_a_fault_ends_although_its_workers_do_not(tmp_path):
    """Claim: a worker that is deaf to signals, as those that read data are, keeps no rank that has failed from ending.

    Its launcher ends the other ranks only then. The error is printed and handed to torchrun; where the rank was is told
    to whoever sends SIGUSR2.
    """
    log, told = tmp_path / "log", tmp_path / "error.json"
    assert end_with(RuntimeError("a GPU is lost"), log, told) == 1
    text = log.read_text()
    assert "RuntimeError: a GPU is lost" in text, text
    assert told_to_launcher(told) == "RuntimeError: a GPU is lost"
    assert re.search(r"most recent call first\):\n.* in run$", text, flags=re.MULTILINE), text


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [(ValueError("no space is left"), 2, "no space is left"), (OSError("lost"), 1, "OSError: lost")],
)
def test_a_rank_whose_log_takes_nothing_ends_too(tmp_path, error, status, message):
    """Claim: a full disk under the log, which may be what ended the run, changes neither the status nor the end."""
    assert end_with(error, Path("/dev/full"), tmp_path / "error.json") == status
    assert told_to_launcher(tmp_path / "error.json") == message
