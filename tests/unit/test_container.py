"""The container file installs what is pinned, and nothing that would replace the image's torch."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
PINNED = (ROOT / "requirements" / "pinned.txt").read_text(encoding="utf-8")
COMMANDS = re.sub(r"\\\n", " ", "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#")))


def pinned() -> list[tuple[str, str]]:
    lines = [line.split(";")[0].strip() for line in PINNED.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split("==")) for line in lines]


def test_base_image_is_pinned():
    """Claim: two builds start from the same image: a release tag, never ``latest``."""
    (base,) = re.findall(r"^FROM (\S+)", COMMANDS, flags=re.MULTILINE)
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", base)
    assert base.rsplit("/", 1)[1] in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_container_installs_the_pinned_versions_and_no_others():
    """Claim: packages come from ``requirements/pinned.txt`` alone, each with a version, without their dependencies."""
    installs = re.findall(r"pip install ([^&\n]*)", COMMANDS)
    assert len(installs) == 2
    for arguments in installs:
        assert "--no-deps" in arguments
        named = [word for word in arguments.split() if not word.startswith("-")]
        assert named in (["requirements/pinned.txt"], ["."])
    assert all(len(pair) == 2 for pair in pinned())


def test_nothing_pinned_replaces_what_the_image_brings():
    """Claim: torch and the kernels compiled against it stay the image's."""
    names = {name.lower() for name, _ in pinned()}
    brought = {"torch", "torchvision", "triton", "transformer-engine", "transformer_engine", "apex", "flash-attn"}
    assert not names & brought
    assert not [name for name in names if name.startswith("nvidia")]


def test_documented_megatron_versions_are_the_pinned_ones():
    """Claim: the install matrix names the versions that are installed."""
    versions = {version for name, version in pinned() if name == "megatron-core"}
    lines = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith("| megatron-core"))
    assert versions and all(version in row for version in versions)
