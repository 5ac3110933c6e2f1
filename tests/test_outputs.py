"""Outputs: checked before the work, locked, whole or as they were, with modes of the umask; and what a full disk says."""

import errno
import json
import os
import subprocess
import sys
import time
import types

import pytest
import timm
import torch

import laconic
from laconic.cli import eval as eval_job
from laconic.cli import sweep as sweep_job
from laconic.cli import train as train_job
from laconic.cli.app import main
from laconic.core import files, signals
from laconic.core.files import PART, Refusal, Unwritable, append_line, check_output_file, write_atomically
from laconic.core.locks import locked_file, locked_folder
from laconic.data import workers
from laconic.training.state import save_weights

EVAL = ("eval", "scenes_vit_tiny", "--data", "scenes", "--limit", "8", "--workers", "0", "--device", "cpu")
SWEEP = ("sweep", *EVAL[1:], "--method", "tome", "--keep", "0.5")


@pytest.fixture
def full(monkeypatch):
    """Make the disk full for files whose names contain a text, once their temporary file is to be moved."""

    def fill(text, number=errno.ENOSPC):
        move = os.replace

        def replace(source, target):
            if text in str(target):
                raise OSError(number, os.strerror(number))
            move(source, target)

        monkeypatch.setattr(os, "replace", replace)

    return fill


@pytest.fixture
def small():
    return laconic.reduce_(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2), "evit", keep=0.5, at=[1])


def dead_process():
    return subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout.strip()


# ---------------------------------------------------------------------------------------------------- locks
def test_the_second_is_refused_and_told_by_whom(tmp_path):
    with locked_file(tmp_path / "r.csv"):
        note = json.loads((tmp_path / ".r.lock").read_text())
        assert note["pid"] == os.getpid()
        with (
            pytest.raises(Refusal, match=rf"r.json: process {os.getpid()} \(.*writes to it; wait"),
            locked_file(tmp_path / "r.json"),
        ):
            pass
        with locked_file(tmp_path / "other.csv"):
            pass
    with locked_file(tmp_path / "r.csv"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_command_refuses_a_locked_output(tmp_path, capsys):
    with locked_file(tmp_path / "r.csv"):
        assert main([*EVAL, "--output", str(tmp_path / "r.csv")]) == 1
    assert f"process {os.getpid()}" in capsys.readouterr().err
    with locked_folder(tmp_path / "run"):
        assert main(["train", "--output", str(tmp_path / "run")]) == 1
    assert f"process {os.getpid()}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_without_a_process_is_taken_over(tmp_path):
    (tmp_path / ".laconic.lock").write_text(
        json.dumps({"pid": int(dead_process()), "host": "here", "command": "laconic train"})
    )
    with locked_folder(tmp_path):
        assert json.loads((tmp_path / ".laconic.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_refused_command_leaves_no_folder(tmp_path, capsys):
    assert main(["train", "--recipe", "absent.toml", "--output", str(tmp_path / "a" / "b")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    dead, run = dead_process(), tmp_path / "run"
    (run / "best").mkdir(parents=True)
    gone = [run / f".checkpoint.pt.{dead}-abc{PART}", run / "best" / f".model.safetensors.{dead}-a_1{PART}"]
    stay = [run / f".checkpoint.pt.{os.getppid()}-abc{PART}", run / ".notes.123-abc", run / "best" / "mine"]
    for path in (*gone, *stay):
        path.write_text("x")
    folder = run / f".unfinished.{dead}-xyz{PART}"
    folder.mkdir()
    (folder / "model.safetensors").write_text("x")
    with locked_folder(run):
        pass
    assert not folder.exists()
    assert [path.exists() for path in (*gone, *stay)] == [False] * 2 + [True] * 3


def test_leftovers_next_to_a_file_are_removed_by_name(tmp_path):
    dead = dead_process()
    for name in ("r.csv", "r.json", "other.csv"):
        (tmp_path / f".{name}.{dead}-abc{PART}").write_text("x")
    with locked_file(tmp_path / "r.csv"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [f".other.csv.{dead}-abc{PART}"]


# ---------------------------------------------------------------------------------------------------- checked before the work
@pytest.mark.parametrize("command", [EVAL, SWEEP], ids=lambda command: command[0])
def test_nothing_is_computed_for_a_file_that_cannot_be_written(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setattr(eval_job, "open_eval_input", None)
    monkeypatch.setattr(sweep_job, "open_eval_input", None)

    def read_only(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.NamedTemporaryFile", read_only)
    assert main([*command, "--output", str(tmp_path / "r.csv")]) == 1
    assert "cannot be written: Read-only file system" in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path / "r.json").mkdir()
    assert main([*command, "--output", str(tmp_path / "r.csv")]) == 1
    assert "r.json: this is a folder" in capsys.readouterr().err


def test_a_device_is_no_output_and_stays():
    with pytest.raises(Refusal, match=r"/dev/null: this is no regular file.*--json"):
        check_output_file(files.Path("/dev/null"))
    assert not os.path.isfile("/dev/null")


def test_a_link_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "r.txt").write_text("old")
    (tmp_path / "r.txt").symlink_to(tmp_path / "there" / "r.txt")
    write_atomically(tmp_path / "r.txt", "new")
    assert (tmp_path / "r.txt").is_symlink()
    assert (tmp_path / "there" / "r.txt").read_text() == "new"


# ---------------------------------------------------------------------------------------------------- a full disk
def test_a_full_disk_says_file_and_sizes(tmp_path, full):
    full("r.bin")
    with pytest.raises(
        Unwritable, match=r"r\.bin cannot be written: No space left on device; 0\.3 MB are needed and .* are free"
    ):
        write_atomically(tmp_path / "r.bin", b"0" * 300_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_line_that_finds_no_room():
    with pytest.raises(Unwritable, match=r"/dev/full cannot be written: No space left on device; 6 bytes are needed"):
        append_line(files.Path("/dev/full"), "a row")


PER_CLASS = (*EVAL, "--per-class")


@pytest.mark.parametrize(
    ("command", "file"),
    [(EVAL, "r.csv"), (SWEEP, "r.csv"), (PER_CLASS, "r.classes.csv"), (PER_CLASS, "r.confusion.unreduced.png")],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_the_table_is_printed_anyway(tmp_path, capsys, full, command, file):
    full(file)
    assert main([*command, "--output", str(tmp_path / "r.csv")]) == 1
    out, err = capsys.readouterr()
    assert "unreduced" in out
    assert ("balanced accuracy" in out) == (command == PER_CLASS)
    (line,) = [line for line in err.splitlines() if "cannot be written" in line]
    assert f"{file} cannot be written: No space left on device" in line
    assert "Traceback" not in err
    assert not (tmp_path / file).exists()
    assert not list(tmp_path.glob(f"*{PART}"))


def test_the_report_is_pure_json_anyway(tmp_path, capsys, full):
    full(".csv")
    assert main([*EVAL, "--json", "--output", str(tmp_path / "r.csv")]) == 1
    assert json.loads(capsys.readouterr().out)["rows"][0]["name"] == "unreduced"


def test_a_library_that_finds_no_room_is_no_fault_of_the_program(tmp_path, capsys, monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("PytorchStreamWriter failed: No space left on device (os error 28)")

    monkeypatch.setattr(eval_job, "open_eval_input", failing)
    assert main([*EVAL, "--output", str(tmp_path / "r.csv")]) == 1
    err = capsys.readouterr().err.strip()
    assert err.startswith("laconic eval: ")
    assert "No space left on device" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("to", [("onnx", ".onnx"), ("torch-export", ".pt2"), ("openvino", ".xml")], ids=lambda to: to[0])
@pytest.mark.unchecked
def test_an_export_without_room(tmp_path, small, monkeypatch, to):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: types.SimpleNamespace(total=10**9, free=1000, used=10**9))
    with pytest.raises(
        Unwritable, match=rf"a\{to[1]} cannot be written: No space left.* MB are needed and 1,000 bytes are free"
    ):
        laconic.export(small, tmp_path / f"a{to[1]}", to[0])
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_room(tmp_path, small, monkeypatch):
    laconic.save(small, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(
        "laconic.checkpoints.saved_files.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(Unwritable, match=r"model\.safetensors cannot be written: No space left on device; .* MB are needed"):
        laconic.save(small, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of processes")
def test_a_real_limit_of_the_system(tmp_path, small):
    """The system refuses the bytes, as on a full disk, and the old file stays."""
    import resource

    path = tmp_path / "r.bin"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(Unwritable, match=r"r\.bin cannot be written: File too large; 0\.5 MB are needed"):
            write_atomically(path, b"0" * 500_000)
        with pytest.raises(Unwritable, match=r"model\.safetensors cannot be written: .*too large; .* MB are needed"):
            laconic.save(small, tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["r.bin"]


# ---------------------------------------------------------------------------------------------------- modes
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_modes_follow_the_umask(tmp_path, small, mask, mode):
    old = os.umask(mask)
    try:
        laconic.save(small, tmp_path / "reduced")
        save_weights(torch.nn.Linear(2, 2), tmp_path / "plain", {})
        write_atomically(tmp_path / "r.csv", "x")
    finally:
        os.umask(old)
    found = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == dict.fromkeys(("model.safetensors", "laconic.json", "r.csv"), oct(mode))


# ---------------------------------------------------------------------------------------------------- best after the checkpoint
SETTINGS = (
    "model.name=vit_tiny_patch16_224",
    "model.pretrained=false",
    *(f"model.options.{key}={value}" for key, value in {"img_size": 40, "patch_size": 8, "embed_dim": 48, "depth": 2}.items()),
    "data.train_images=16",
    "data.val_images=8",
    "optimization.batch_size=8",
    "optimization.epochs=2",
)


def go(output, **more):
    return train_job.train(set=SETTINGS, output=output, running=train_job.Running(device="cpu", log_every=1), **more)


def weights(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_no_room_for_the_best_weights_loses_no_step(tmp_path, full, monkeypatch):
    go(tmp_path / "whole")
    full("/best/")
    with pytest.raises(Unwritable, match=r"best.*cannot be written.*with --resume it continues from .*checkpoint\.pt"):
        go(tmp_path / "run")
    monkeypatch.undo()
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] == 2
    assert go(tmp_path / "run", resume=True).steps == 4
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_validation_that_a_signal_interrupts_is_done_on_resume(tmp_path, monkeypatch):
    go(tmp_path / "whole")
    monkeypatch.setattr("laconic.training.loop.evaluate", lambda *_, **__: signals.stop(15))
    with pytest.raises(signals.Stopped, match=r"after step 2 of 4.*--resume"):
        go(tmp_path / "run")
    monkeypatch.undo()
    assert go(tmp_path / "run", resume=True).steps == 4
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_no_room_is_said_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: types.SimpleNamespace(total=10**9, free=1000, used=10**9))
    with pytest.raises(Unwritable, match=r"checkpoint\.pt cannot be written: No space left.*1,000 bytes are free"):
        go(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- signals and workers
def test_an_interrupt_that_a_library_hides_is_still_one(monkeypatch, capsys):
    def hidden(*_, **__):
        try:
            os.kill(os.getpid(), signals.signal.SIGINT)
        except KeyboardInterrupt as error:
            raise RuntimeError("the library failed") from error

    monkeypatch.setattr(eval_job, "open_eval_input", hidden)
    before = signals.signal.getsignal(signals.signal.SIGINT)
    assert main(list(EVAL)) == 130
    assert capsys.readouterr().err.strip() == "interrupted"
    assert signals.signal.getsignal(signals.signal.SIGINT) is before


def test_an_interrupt_in_a_finalizer_is_not_lost(monkeypatch, capsys):
    class Held:
        def __del__(self):
            os.kill(os.getpid(), signals.signal.SIGINT)
            for _ in range(10):
                pass

    def long(*_, **__):
        held = Held()
        del held
        time.sleep(5)

    monkeypatch.setattr(eval_job, "open_eval_input", long)
    start = time.monotonic()
    assert main(list(EVAL)) == 130
    assert time.monotonic() - start < 4
    assert capsys.readouterr().err.strip() == "interrupted"


@pytest.mark.parametrize(
    "message",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory",
        "unable to allocate shared memory(shm) for file </torch_7_1_0>: No space left on device (28)",
        "unable to write to file </torch_7_1_0>: No space left on device (28)",
    ],
)
def test_shared_memory_that_runs_out(message):
    def loader():
        yield 1
        raise RuntimeError(message)

    read = workers.batches(loader())
    assert next(read) == 1
    with pytest.raises(Refusal, match="/dev/shm is too small.*use --workers 0"):
        next(read)


def test_workers_that_cannot_fit_are_refused_before_they_start(monkeypatch, capsys):
    monkeypatch.setattr(workers, "_free", lambda: 100_000)
    words = [word if word != "0" else "2" for word in EVAL]
    assert main(words) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "/dev/shm is too small (0.1 MB free)" in line
    assert "--workers 0" in line
    assert main(list(EVAL)) == 0


def test_other_errors_of_workers_stay():
    def loader():
        raise RuntimeError("something else")
        yield

    with pytest.raises(RuntimeError, match="something else"):
        next(workers.batches(loader()))


# ---------------------------------------------------------------------------------------------------- stdout
@pytest.mark.parametrize("json_", [(), ("--json",)], ids=["table", "json"])
def test_a_reader_that_has_closed_stdout_is_no_error(json_):
    script = f"import sys; from laconic.cli.app import main; sys.exit(main(['list', *{json_!r}]))"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run([sys.executable, "-c", script], stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_stdout_on_a_full_disk():
    script = "import sys; from laconic.cli.app import main; sys.exit(main(['list']))"
    with open("/dev/full", "w") as full_disk:
        done = subprocess.run([sys.executable, "-c", script], stdout=full_disk, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("laconic list: the report cannot be written to stdout: No space left on device")
    assert len(done.stderr.splitlines()) == 1


def test_a_worker_says_nothing_of_the_end_of_the_main_process(capsys, monkeypatch):
    monkeypatch.setattr(signals, "leave_to_main_process", lambda: None)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    workers.begin(0)
    for error in (ConnectionResetError(104, "reset"), EOFError(), BrokenPipeError()):
        sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == ""
    sys.excepthook(ValueError, ValueError("a fault"), None)
    assert "ValueError: a fault" in capsys.readouterr().err
