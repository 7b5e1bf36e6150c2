"""Writing files: whole or not at all, whatever is written and whatever ends it. The kills and the full disks are real."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from models import attached, image_batch, stir, vit
from safetensors.torch import save

import cobra
from cobra import storage
from cobra.report.run import append_step

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")
resource = pytest.importorskip("resource", reason="kills and limits forked processes")


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk-full", "killed"])
def test_broken_write_leaves_the_old_file(tmp_path, monkeypatch, call, error):
    """A write that ends in the middle leaves the file before it whole, and nothing beside it."""
    path = tmp_path / "scores.safetensors"
    storage.write_bytes(path, b"old")

    def fail(*args):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        storage.write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000], ids=["nested too deep", "a number too long"])
def test_json_that_python_cannot_hold(tmp_path, text):
    """As a file, and in a header of safetensors: foreign, like any other."""
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "a.safetensors").write_bytes(save({}, {"cobra": text}))
    for read, name in ((storage.read_json, "a.json"), (storage.read_tensors, "a.safetensors")):
        with pytest.raises(storage.FormatError, match=rf"{name}: expected a COBRA rank plan .*truncated or foreign file"):
            read(tmp_path / name, "rank plan")


# every file the library writes: its name, a writer of version 0 or 1 of it, and its reader


def scores_file(folder: Path) -> tuple[Path, Callable[[int], None], Callable[[], object]]:
    found = [cobra.calibrate(vit(), [image_batch(n)], steps=2, progress=False) for n in (2, 3)]
    path = folder / "scores.safetensors"
    return path, lambda version: found[version].save(path), lambda: cobra.LayerScores.load(path)


def plan_file(folder: Path):
    found = [attached(rank_budget=budget)[1].extract() for budget in (5, 9)]
    path = folder / "plan.json"
    return path, lambda version: found[version].save(path), lambda: cobra.RankPlan.load(path)


def checkpoint_file(folder: Path):
    adapters = [attached()[1] for _ in range(2)]
    stir(adapters[1])
    path = folder / "checkpoint.safetensors"
    return path, lambda version: adapters[version].save_checkpoint(path), lambda: attached()[1].load_checkpoint(path)


def adapter_folder(folder: Path, layout: str):
    loras = []
    for seed in range(2):
        _, adapter = attached(gate="mean")
        stir(adapter, seed)
        adapter.apply(adapter.extract())
        loras.append(adapter.to_lora())
    path = folder / "adapter"
    return path, lambda version: loras[version].save_pretrained(path, layout), lambda: cobra.load_adapter(path)


WRITERS = {
    "scores": scores_file,
    "plan": plan_file,
    "checkpoint": checkpoint_file,
    "compact adapter": lambda folder: adapter_folder(folder, "compact"),
    "padded adapter": lambda folder: adapter_folder(folder, "padded"),
}
EVERYTHING = pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)


def content(path: Path) -> dict[str, bytes]:
    """A file's bytes, or those of all files of a folder."""
    return {p.name: p.read_bytes() for p in (path.iterdir() if path.is_dir() else [path])}


def ended(action: Callable[[], None]) -> int:
    """How a forked process ends that does this: its exit code, or minus the signal that killed it."""
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(call: str, number: int) -> None:
    """SIGKILL instead of the n-th call of a function of os."""
    true, left = getattr(os, call), [number]

    def killing(*args):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return true(*args)

    setattr(os, call, killing)


def limit_file_size(size: int, *, kill: bool) -> None:
    """From this byte on every write fails; or the kernel kills the process in the middle of it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@EVERYTHING
def test_killed_in_mid_save(writer, tmp_path):
    """SIGKILL before each fsync and each rename, and the kernel's SIGXFSZ within a write: the old version is there, whole."""
    path, write, read = writer(tmp_path)
    write(1)
    new = content(path)
    write(0)
    old = content(path)
    assert old != new
    half = max(map(len, new.values())) // 2

    def killed(prepare: Callable[[], None]) -> int:
        return ended(lambda: (prepare(), write(1)))

    assert killed(lambda: limit_file_size(half, kill=True)) == -signal.SIGXFSZ
    assert content(path) == old
    for call in ("fsync", "replace"):
        for number in range(1, len(old) + 1):
            assert killed(lambda call=call, number=number: kill_at(call, number)) == -signal.SIGKILL
            assert content(path) == old, (call, number)
    read()
    left = [p for p in tmp_path.iterdir() if p != path]
    assert left and all(p.name.startswith(f".{path.name}.") and p.name.endswith(".tmp") for p in left)
    write(1)
    assert content(path) == new
    read()


@EVERYTHING
@pytest.mark.parametrize("there", [True, False], ids=["old version", "nothing"])
def test_full_disk(writer, there, tmp_path):
    """The error names the file; what was there is, whole, and nothing is beside it."""
    path, write, read = writer(tmp_path)
    write(1)
    size = max(map(len, content(path).values())) // 2
    write(0)
    if not there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    old = content(path) if there else None

    def on_a_full_disk() -> None:
        limit_file_size(size, kill=False)
        try:
            write(1)
        except OSError as error:
            said = str(error)
            named = error.errno == errno.EFBIG and str(path) in said and "what was there before is as it was" in said
            os._exit(3 if named else 4)

    assert ended(on_a_full_disk) == 3
    assert list(tmp_path.iterdir()) == ([path] if there else [])
    if there:
        assert content(path) == old
        read()


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 256 KiB, where the machine lets us mount one."""
    if sys.platform != "linux" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path]).returncode:
        pytest.skip("needs the right to mount a file system")
    yield tmp_path
    subprocess.check_call(["umount", tmp_path])


@EVERYTHING
def test_no_space_left(writer, tiny_disk):
    path, write, read = writer(tiny_disk)
    write(0)
    old, filler = content(path), tiny_disk / "filler"
    with pytest.raises(OSError, match="No space left"), open(filler, "wb", buffering=0) as f:
        while f.write(b"\0" * 512):
            pass
    with pytest.raises(OSError, match=rf"No space left on device; nothing was written, .*{path}") as raised:
        write(1)
    assert raised.value.errno == errno.ENOSPC
    assert content(path) == old and set(tiny_disk.iterdir()) == {path, filler}
    read()
    filler.unlink()
    write(1)
    assert content(path) != old


def test_killed_at_any_time(tmp_path):
    """Two versions written in turn, again and again, until a kill at some time: one of them is there."""
    path, write, read = plan_file(tmp_path)
    versions = []
    for version in range(2):
        write(version)
        versions.append(content(path))
    for i in range(20):
        child = os.fork()
        while not child:
            write(0)
            write(1)
        time.sleep(0.002 * i)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert content(path) in versions
        read()


def test_a_log_keeps_its_lines(tmp_path):
    """What training appends: a full disk or a kill costs the last line, and the report says so (tests/test_report_run.py)."""
    for step in range(3):
        append_step(tmp_path, step, nll=float(step))
    path = tmp_path / "history.jsonl"
    lines = path.read_bytes()

    def cut_short() -> None:
        limit_file_size(len(lines) + 5, kill=True)
        append_step(tmp_path, 3, nll=3.0)

    assert ended(cut_short) == -signal.SIGXFSZ
    assert path.read_bytes() == lines + b'{"ste'


def test_same_values_same_bytes(tmp_path):
    """So that a file's digest says what is in it."""
    path, write, _ = checkpoint_file(tmp_path)
    write(0)
    first = content(path)
    assert all((write(0), content(path) == first)[1] for _ in range(10))


# folders


def test_a_folder_is_exchanged_at_once(tmp_path):
    """There is no moment without it."""
    with storage.new_folder(tmp_path / "a") as fresh:
        (fresh / "one").write_text("1")
    if not storage._exchange(tmp_path / "a", tmp_path / "a"):
        pytest.skip("this file system cannot exchange names")
    replaced = []
    true, os.replace = os.replace, lambda *names: replaced.append(names)
    try:
        with storage.new_folder(tmp_path / "a") as fresh:
            (fresh / "two").write_text("2")
    finally:
        os.replace = true
    assert not replaced and content(tmp_path / "a") == {"two": b"2"} and [p.name for p in tmp_path.iterdir()] == ["a"]


# folders that stay: empty ones, mount points, the current directory


@pytest.fixture(params=["tmpfs", "bind"])
def mounted(request, tmp_path):
    """A folder that is a mount point, of a file system of its own or of the same one, where the machine lets us make one."""
    source, folder = tmp_path / "source", tmp_path / "mount point \\1"  # a name that the list of mounts escapes
    source.mkdir()
    folder.mkdir()
    how = ["-t", "tmpfs", "tmpfs"] if request.param == "tmpfs" else ["--bind", source]
    if sys.platform != "linux" or subprocess.run(["mount", *how, folder]).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.check_call(["umount", folder])


def test_a_mount_point(mounted, tmp_path):
    """A container's volume takes an adapter, and the next one."""
    path, write, read = adapter_folder(tmp_path, "compact")
    write(1)
    new = content(path)
    write(0)
    lora = read()
    lora.save_pretrained(mounted)
    assert content(mounted).keys() == new.keys()
    cobra.load_adapter(mounted)
    write(1)
    read().save_pretrained(mounted)
    assert content(mounted)["adapter_model.safetensors"] == new["adapter_model.safetensors"]
    assert {p.name for p in tmp_path.iterdir()} == {"source", mounted.name, "adapter"}


@pytest.mark.parametrize("there", [True, False], ids=["old version", "nothing"])
def test_the_current_directory(there, tmp_path, monkeypatch):
    """It stays the current directory: what is written next is where it looks to be."""
    path, write, read = adapter_folder(tmp_path, "compact")
    write(1)
    new = content(path)
    write(0)
    lora = read()
    write(1)
    if not there:
        shutil.rmtree(path)
        path.mkdir()
    monkeypatch.chdir(path)
    lora.save_pretrained(".")
    assert content(path).keys() == new.keys() and content(path) != new
    Path("next").write_text("1")
    assert (path / "next").read_text() == "1" and [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_an_empty_folder_is_filled(tmp_path):
    """With the rights and the owner that whoever made it gave it."""
    path, write, read = adapter_folder(tmp_path, "compact")
    path.mkdir(mode=0o700)
    before = path.stat()
    write(0)
    assert (path.stat().st_ino, path.stat().st_mode) == (before.st_ino, before.st_mode)
    read()


def test_killed_in_the_current_directory(tmp_path):
    """Before any of its moves: no byte of the old version is lost, what can be loaded is the old one or the new one, whole, and
    the next write goes through."""
    path, write, read = adapter_folder(tmp_path, "compact")
    write(1)
    new = content(path)
    write(0)
    old = content(path)
    for number in range(1, 3 * len(new) + 1):

        def killed(number=number) -> None:
            os.chdir(path)
            kill_at("replace", number)
            write(1)

        assert ended(killed) == -signal.SIGKILL
        for name, data in old.items():
            kept = [p for p in (path / name, *path.glob(f".adapter.*.old/{name}")) if p.is_file()]
            assert [p for p in kept if p.read_bytes() == data], (number, name)
        if (path / "adapter_config.json").is_file():
            assert {name: (path / name).read_bytes() for name in old} in (old, new), number
            read()
        ended(lambda: (os.chdir(path), write(1)))
        assert {name: (path / name).read_bytes() for name in new} == new, number
        write(0)  # from outside: the folder is exchanged, with all that was left in it
        assert content(path) == old and list(tmp_path.iterdir()) == [path]


def test_other_files_of_a_folder_that_stays(tmp_path, monkeypatch):
    """They are nobody's to delete: a program may write beside a save. The folder above the current one stays too."""
    (tmp_path / "a" / "below").mkdir(parents=True)
    (tmp_path / "a" / "one").write_text("old")
    monkeypatch.chdir(tmp_path / "a" / "below")
    with storage.new_folder(tmp_path / "a") as fresh:
        (fresh / "one").write_text("1")
        (fresh / "two").mkdir()
        (tmp_path / "a" / "log").write_text("kept")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"below", "log", "one", "two"}
    assert (tmp_path / "a" / "one").read_text() == "1" and (tmp_path / "a" / "below").samefile(Path.cwd())
