"""Commands that are killed or asked to stop at any moment leave a right state behind, and two never write one output."""

import functools
import json
import random
import signal
import time

import pytest
import torch
from PIL import Image

from forking import Forking
from laconic.core.files import PART, json_lines
from small_run import BASE, EVIT

SETTINGS = (*BASE, "optimization.ema=0.5", *EVIT)
TRAIN = (
    "train",
    *(word for setting in SETTINGS for word in ("--set", setting)),
    *("--device", "cpu", "--log-every", "1", "--checkpoint-every", "1"),
)
SCENES = ("scenes_vit_tiny", "--data", "scenes", "--limit", "24", "--workers", "0", "--device", "cpu", "--method", "tome")
EVAL, SWEEP = ("eval", *SCENES), ("sweep", *SCENES, "--keep", "0.9", "--keep", "0.5")
EXPORT = ("export", "scenes_vit_tiny", "--rounds", "0", "--to", "torch-export", "--method", "tome")


@pytest.fixture(scope="module")
def forking(tmp_path_factory):
    server = Forking(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(forking, tmp_path_factory):
    """Run a command undisturbed, once; return its folder and its seconds."""

    @functools.cache
    def run(command):
        folder = tmp_path_factory.mktemp(command[0])
        job = forking.run(*command, "--output", place(command, folder))
        assert job.code == 0, job.err
        return folder, job.seconds

    return run


def place(command, folder):
    return folder / ("out" if command[0] in ("train", "export", "embed") else "out.csv")


def files(folder):
    """All files under a folder, and their content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def plain(content):
    """The files of a run without what depends on time: the archive of a checkpoint, dates, plots, and traced programs."""
    return {name: data for name, data in content.items() if not name.endswith((".pt", ".json", ".png", ".pt2"))}


def check_between(command, folder, expected):
    """Nothing that a killed command left can be taken for more than it is."""
    found = {name: data for name, data in files(folder).items() if PART not in name and not name.endswith(".lock")}
    assert found.keys() <= expected.keys()
    for name, data in found.items():
        if name.endswith(".json"):
            json.loads(data)
        elif name.endswith(".pt"):
            assert torch.load(folder / name, weights_only=True)["step"] > 0
        elif name.endswith(".jsonl"):
            assert expected[name].startswith(data[: data.rfind(b"\n") + 1])
        elif name.endswith(".pt2"):
            torch.export.load(folder / name)
        elif name.startswith(("out/model/", "out/vectors-")) or (name.endswith(".csv") and command == EVAL):
            assert data == expected[name], name


def kill_often(forking, whole, command, kills, folder, number=signal.SIGKILL):
    """Kill a command again and again at random moments, then let it end; its files must be those of an undisturbed one."""
    undisturbed, seconds = whole(command)
    expected, moments = files(undisturbed), random.Random(0)
    for kill in range(kills):
        round_, output = folder / f"{kill // 5}", place(command, folder / f"{kill // 5}")
        round_.mkdir(exist_ok=True)
        resume = ("--resume",) * (output / "checkpoint.pt").is_file()
        job = forking.start(*command, "--output", output, *resume)
        time.sleep(moments.uniform(0.05, 1) * seconds)
        job.kill(number)
        code = job.wait()
        assert code in (0, -number), job.err
        check_between(command, round_, expected)
    for round_ in folder.iterdir():
        output = place(command, round_)
        resume = ("--resume",) * (output / "checkpoint.pt").is_file()
        job = forking.run(*command, "--output", output, *resume)
        assert job.code == 0, job.err
        found = files(round_)
        assert found.keys() == expected.keys()  # no leftovers either
        assert plain(found) == plain(expected)
        assert found == expected or command[0] != "embed"


@pytest.fixture(scope="module")
def embed_command(tmp_path_factory):
    """A command that embeds 96 pictures into 24 files."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(96):
        Image.effect_noise((40, 40), number).save(folder / f"{number}.png")
    words = ("embed", "scenes_vit_tiny", "--data", folder, "--device", "cpu", "--shard-size", "4", "--forward-size", "4")
    return (*words, "--method", "tome")


@pytest.mark.parametrize(("command", "kills"), [(TRAIN, 2), (SWEEP, 1), (EVAL, 1)], ids=lambda value: str(value)[:8])
def test_a_few_kills(forking, whole, command, kills, tmp_path):
    kill_often(forking, whole, command, kills, tmp_path)


def test_a_few_kills_of_embedding(forking, whole, embed_command, tmp_path):
    kill_often(forking, whole, (*embed_command, "--workers", "0"), 3, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), [(0, 40), (2, 10)])
def test_fifty_kills_of_embedding(forking, whole, embed_command, tmp_path, workers, kills):
    """A killed process leaves workers, which hold its lock until they notice."""
    kill_often(forking, whole, (*embed_command, "--workers", workers), kills, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "kills"), [(TRAIN, 20), (SWEEP, 10), (EVAL, 10), (EXPORT, 10)], ids=lambda value: str(value)[:8]
)
def test_fifty_kills(forking, whole, command, kills, tmp_path):
    kill_often(forking, whole, command, kills, tmp_path)


# ---------------------------------------------------------------------------------------------------- asked to stop
def begun(output, rows):
    """Wait until a run has logged so many rows."""
    for _ in range(6000):
        if len(json_lines(output / "metrics.jsonl")) >= rows:
            return
        time.sleep(0.01)
    raise AssertionError("the run has not begun")


@pytest.mark.parametrize(("number", "rows", "workers"), [(signal.SIGTERM, 1, 0), (signal.SIGUSR1, 3, 2)])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(forking, whole, tmp_path, number, rows, workers):
    """It reaches the workers too, as schedulers send it to all processes of a job."""
    command = (*TRAIN[:-1], "0", "--workers", workers, "--output", tmp_path / "out")
    job = forking.start(*command)
    begun(tmp_path / "out", rows)
    job.kill_group(number)
    assert job.wait() == 128 + number, job.err
    (line,) = [line for line in job.err.splitlines() if "stopped by" in line]
    assert f"stopped by {signal.Signals(number).name} after step" in line
    assert "--resume" in line
    assert "Traceback" not in job.err
    step = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"]
    assert rows <= step < 6
    assert forking.run(*command, "--resume").code == 0
    assert plain(files(tmp_path)) == plain(files(whole(TRAIN)[0]))


def test_a_signal_stops_other_commands_with_a_line(forking, tmp_path):
    job = forking.start(*SWEEP, "--output", tmp_path / "out.csv")
    wait_for(tmp_path / "out.json")
    job.kill(signal.SIGTERM)
    assert job.wait() == 143
    assert job.err.strip().splitlines()[-1] == "laconic sweep: stopped by SIGTERM"
    assert not list(tmp_path.glob(".*"))


def wait_for(path):
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} was not written")


def interrupt(forking, command, moments):
    for moment in moments:
        job = forking.start(*command)
        time.sleep(moment)
        job.kill_group(signal.SIGINT)
        assert job.wait() in (0, 130)
        assert "Traceback" not in job.err, (moment, job.err)
        assert "Error" not in job.err, (moment, job.err)


def test_ctrl_c_has_no_traceback(forking, tmp_path):
    job = forking.start(*TRAIN, "--workers", "2", "--output", tmp_path / "out")
    begun(tmp_path / "out", 1)
    job.kill_group(signal.SIGINT)
    assert job.wait() == 130
    assert job.err.strip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in job.err
    assert not list(tmp_path.glob("out/.*"))


@pytest.mark.slow
@pytest.mark.parametrize("command", [TRAIN, SWEEP, EVAL, EXPORT], ids=lambda command: command[0])
def test_ctrl_c_at_any_moment(forking, whole, command, tmp_path):
    """With workers, where the command has them."""
    moments, seconds = random.Random(1), whole(command)[1]
    workers = () if command == EXPORT else ("--workers", "2")
    words = [*command, *workers, "--output", place(command, tmp_path)]
    if "--workers" in command:
        words = [word for word in words if word != "0"]
        words.remove("--workers")
    for _ in range(8):
        resume = ("--resume",) * (tmp_path / "out" / "checkpoint.pt").is_file()
        interrupt(forking, (*words, *resume), [moments.uniform(0, 1.2) * seconds])


# ---------------------------------------------------------------------------------------------------- two processes
def test_the_second_process_is_refused_and_a_dead_one_is_not_waited_for(forking, whole, tmp_path):
    command = (*TRAIN, "--set", "optimization.epochs=50", "--output", tmp_path / "out")
    first = forking.start(*command)
    begun(tmp_path / "out", 1)
    wait_for(tmp_path / "out" / "checkpoint.pt")  # else there is nothing to resume
    second = forking.run(*command, "--resume")
    assert second.code == 1
    assert f"process {first.pid} (laconic train" in second.err
    assert "choose another --output" in second.err
    assert len(second.err.splitlines()) == 1
    first.kill(signal.SIGKILL)
    first.wait()
    third = forking.start(*command, "--resume")
    count = len(json_lines(tmp_path / "out" / "metrics.jsonl"))
    begun(tmp_path / "out", count + 1)
    third.kill(signal.SIGTERM)
    assert third.wait() == 143


@pytest.mark.slow
def test_two_sweeps_do_not_lose_rows(forking, tmp_path):
    one, two = (("sweep", *SCENES[:-1], method, "--keep", "0.5", "--output", tmp_path / "r.csv") for method in ("tome", "topk"))
    jobs = [forking.start(*one), forking.start(*two)]
    codes = [job.wait() for job in jobs]
    assert sorted(codes) == [0, 1]
    assert [forking.run(*command).code for command in (one, two)] == [0, 0]
    names = {row["name"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert {"tome", "topk"} <= names
