"""The command line: JSON, exit codes, help, refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image

import laconic
from laconic.cli import app as cli
from laconic.cli import image_io
from laconic.play import runtime

TINY = "deit_tiny_patch16_224"
WEIGHTS = Path(laconic.__file__).parent / "weights" / "scenes_vit_small.safetensors"


pytestmark = pytest.mark.usefixtures("no_pretrained_weights")


@pytest.fixture
def laconic_(capsys):
    def call(*words):
        code = cli.main(list(words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def photographs(folder):
    """Write two things and three backgrounds, for `laconic data cutouts`."""
    (folder / "things" / "fruit").mkdir(parents=True)
    for name, colour in (("fig", "purple"), ("kiwi", "green")):
        Image.new("RGBA", (20, 20), colour).save(folder / "things" / "fruit" / f"{name}.png")
    (folder / "grounds").mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / "grounds" / f"{number}.png")


def image():
    return str(next(iter(image_io.shipped(1))))


# ---------------------------------------------------------------------------------------------------- all commands
COMMANDS = {
    "list": [],
    "doctor": [TINY, "--all"],
    "bench": [TINY, "--method", "etps", "--batch-size", "1", "--rounds", "1", "--threads", "1"],
    "plan": [
        "scenes_vit_small",
        "--method",
        "etps",
        "--target",
        "1.5x-macs",
        "--batch-size",
        "1",
        "--rounds",
        "1",
        "--threads",
        "1",
    ],
    "show": [image(), "--model", TINY, "--method", "etps", "--output", "{tmp}"],
    "eval": ["scenes_vit_small", "--data", "scenes", "--limit", "8", "--method", "etps", "--keep", "0.5"],
    "sweep": [
        "scenes_vit_small",
        "--data",
        "scenes",
        "--limit",
        "8",
        "--method",
        "etps",
        "--keep",
        "0.5",
        "--output",
        "{tmp}/s.csv",
    ],
    "tune": [
        *("scenes_vit_small", "--target", "1.3x-macs", "--data", "scenes", "--limit", "8"),
        *("--methods", "topk", "--batch-size", "2", "--threads", "1", "--weights", str(WEIGHTS)),
    ],
    "embed": ["scenes_vit_small", "--data", "{tmp}/pictures", "--output", "{tmp}/vectors", "--workers", "0"],
    "export": [TINY, "--method", "topk", "--to", "torch-export", "--rounds", "0", "--output", "{tmp}"],
    "train": [
        *(
            "--set",
            "model.pretrained=false",
            "--set",
            "data.train_images=8",
            "--set",
            "data.val_images=8",
            "--set",
            "optimization.batch_size=4",
        ),
        *("--output", "{tmp}/run", "--device", "cpu"),
    ],
    "data": [
        *("cutouts", "{tmp}/made", "--objects", "{tmp}/things", "--backgrounds", "{tmp}/grounds"),
        *("--views", "1", "1", "1", "--pixels", "32"),
    ],
    "report": [
        *("scenes_vit_small", "--data", "scenes", "--limit", "8", "--weights", str(WEIGHTS), "--method", "topk"),
        *("--keep", "0.5", "--rounds", "1", "--threads", "1", "--pictures", "1", "--output", "{tmp}/report.html"),
    ],
    "play": [
        *("scenes_vit_small", "--weights", str(WEIGHTS), "--method", "topk", "--keep", "0.5", "--pictures", "1"),
        *("--export", "{tmp}/site", "--runtime", "{tmp}"),
    ],
    "demo": [
        "--model",
        "scenes_vit_small",
        "--images",
        "8",
        "--method",
        "etps",
        "--keep",
        "0.5",
        "--pictures",
        "1",
        "--rounds",
        "1",
        "--output",
        "{tmp}",
    ],
}


LONG = ("doctor", "sweep", "export", "play")  # other files have shorter ones: test_jobs, test_eval, test_export, test_play
CASES = [pytest.param(command, marks=pytest.mark.slow if command in LONG else ()) for command in cli.COMMANDS]


@pytest.mark.parametrize("command", CASES)
def test_json_is_all_there_is_on_stdout(laconic_, tmp_path, command):
    if command == "data":
        photographs(tmp_path)
    if command == "embed":
        (tmp_path / "pictures").mkdir()
        Image.new("RGB", (50, 40), "purple").save(tmp_path / "pictures" / "fig.png")
    if command == "play":
        for name in runtime.FILES:
            (tmp_path / name).write_bytes(b"")
    code, out, _ = laconic_(command, *(word.format(tmp=tmp_path) for word in COMMANDS[command]), "--json")
    assert code == 0
    assert isinstance(json.loads(out), dict)


def test_a_moved_command_names_its_new_place(laconic_):
    code, out, err = laconic_("evidence", "--claim", "7-toy")
    assert (code, out) == (2, "")
    assert "python -m benchmarks.evidence" in err


def test_list_as_a_table(laconic_):
    code, out, err = laconic_("list")
    assert (code, err) == (0, "")
    for name, row in laconic.methods().items():
        assert name in out
        assert row.paper in out
    assert "timm.models.vision_transformer.VisionTransformer" in out


def test_list_as_json_has_every_fact_of_a_method(laconic_):
    rows = {row["name"]: row for row in json.loads(laconic_("list", "--json")[1])["methods"]}
    assert rows["dtps"] | {"phase": "before", "trained": True, "learns": True, "paper": "2304.10716"} == rows["dtps"]
    assert rows["etps"]["options"]["score"]["default"] == "class"


@pytest.mark.slow
def test_doctor_as_a_table(laconic_):
    code, out, _ = laconic_("doctor", TINY)
    assert code == 0
    assert 'laconic.reduce_(model, "etps", keep=0.7)' in out
    assert "passed" in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_examples(laconic_, command):
    code, out, _ = laconic_(command, "--help")
    assert code == 0
    assert "--json" in out
    for example in cli.COMMANDS[command].examples:
        assert example in out
        assert example.startswith(f"laconic {command}")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_examples_parse(command):
    for example in cli.COMMANDS[command].examples:
        job, as_json = cli.parse(f"laconic {command}", cli.COMMANDS[command], example.split()[2:])
        assert callable(job)
        assert as_json == ("--json" in example)


def test_usage_and_version(laconic_):
    code, out, _ = laconic_("--help")
    assert code == 0
    assert all(command in out for command in cli.COMMANDS)
    assert laconic_("--version") == (0, f"laconic {laconic.__version__}\n", "")


def test_options_of_measuring_reach_the_job():
    words = [TINY, "--rounds", "3", "--threads", "2", "--compile", "--keep", "0.5", "--keep", "0.7"]
    job, _ = cli.parse("laconic bench", cli.COMMANDS["bench"], words)
    setting = job.keywords["setting"]
    assert (setting.rounds, setting.threads, setting.compile) == (3, 2, True)
    assert job.keywords["keep"] == (0.5, 0.7)
    assert job.args == (TINY,)


# ---------------------------------------------------------------------------------------------------- wrong usage: 2
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: laconic COMMAND"),
        (["bnech"], "Did you mean 'bench'"),
        (["bench"], "MODEL"),
        (["bench", TINY, "--metod", "etps"], "--method"),
        (["bench", TINY, "--rounds", "many"], "many"),
        (["list", "everything"], "everything"),
    ],
)
def test_wrong_usage(laconic_, words, message):
    code, out, err = laconic_(*words)
    assert (code, out) == (2, "")
    assert message in err


# ---------------------------------------------------------------------------------------------------- refusals: 1
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["doctor", "diet_tiny_patch16_224"], f"did you mean {TINY}"),
        (["doctor", "resnet18"], "resnet18 cannot be reduced: its attention is between channels or its convolutions"),
        (["bench", TINY, "--method", "etsp"], "no method is called 'etsp'. Did you mean 'etps'"),
        (["bench", TINY, "--method", "etps", "--keep", "1.5"], "keep rate must be in (0, 1], got 1.5"),
        (["bench", TINY, "--method", "etps", "--options", "simlarity=cosine"], "Did you mean 'similarity'"),
        (["bench", TINY, "--batch-size", "0"], "at least 1"),
        (["bench", TINY, "--output", "results.json"], "give the name of a .csv file"),
        (["bench", "resnet18"], "timm.models.resnet.ResNet cannot be reduced: its"),
        (["show", __file__, "--model", TINY], "test_cli.py is not an image"),
        (["show", "absent.jpg", "--model", TINY], "absent.jpg cannot be read as an image: No such file or directory"),
        (["show"], "at least one image"),
        (["show", image(), "--model", TINY, "--method", "bta"], "Did you mean 'bat'"),
        (["demo", "--weights", "absent.safetensors"], "absent.safetensors: there is no such file"),
        (["demo", "--pictures", "0"], "at least 1"),
        (["demo", "--images", "-1"], "limit must be at least 0"),
        (["demo", "--data", "scense"], "Did you mean 'scenes'"),
        (["demo", "--data", "scenes", "--split", "tset"], "scenes have the splits train, val, test, not 'tset'"),
        (["demo", "--model", "."], "the demo takes timm names"),
        (["demo", "--model", "resnet18", "--weights", __file__], "does not hold the weights of resnet18"),
    ],
)
def test_refusals_are_one_paragraph_on_stderr(laconic_, words, message):
    code, out, err = laconic_(*words)
    assert (code, out) == (1, "")
    said = [line for line in err.splitlines() if line.startswith(f"laconic {words[0]}: ")]
    assert len(said) == 1
    assert message in said[0]
    assert err.rstrip().endswith(said[0])
    assert "Traceback" not in err


@pytest.mark.parametrize(("module", "extra"), [("tyro", "cli"), ("timm", "cli"), ("tqdm", "cli")])
def test_a_missing_library_names_the_extra(laconic_, monkeypatch, module, extra):
    for loaded in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setitem(sys.modules, module, None)  # loaded or not
    code, _, err = laconic_("bench", TINY, "--rounds", "1", "--batch-size", "1")
    assert code == 1
    assert f'pip install "laconic[{extra}]"' in err


@pytest.mark.parametrize("module", ["matplotlib", "skimage"])
def test_the_demo_names_its_extra(laconic_, monkeypatch, tmp_path, module):
    words = [*(word.format(tmp=tmp_path) for word in COMMANDS["demo"]), "--model", TINY]  # which looks at photographs
    for loaded in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = laconic_("demo", *words)
    assert code == 1
    assert 'pip install "laconic[demo]"' in err


def test_a_fault_of_the_program_is_not_hidden(monkeypatch):
    monkeypatch.setattr(cli, "parse", lambda *_: (lambda: {}["a fault"], False))
    with pytest.raises(KeyError, match="a fault"):
        cli.main(["list"])


def test_an_interrupt_is_no_traceback(laconic_, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", lambda *_: (interrupted, False))
    assert laconic_("list") == (130, "", "interrupted\n")


def test_the_installed_command():
    out = subprocess.run([sys.executable, "-m", "laconic.cli", "--version"], capture_output=True, text=True, check=True).stdout
    assert out == f"laconic {laconic.__version__}\n"


# ---------------------------------------------------------------------------------------------------- light to start
START = """
import sys
from pathlib import Path
from laconic.cli import app
code = app.main(sys.argv[1:])
heavy = {"torch", "numpy", "tyro", "timm"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), (["--version"], 0), (["bnech"], 2), ([], 2)],
)
def test_help_and_wrong_commands_import_no_torch(words, code):
    done = subprocess.run([sys.executable, "-c", START, *words], capture_output=True, text=True)
    assert (done.returncode, "imported" in done.stderr) == (code, False), done.stderr


# ---------------------------------------------------------------------------------------------------- outputs, values
@pytest.mark.parametrize(
    "words",
    [
        ["plan", TINY, "--method", "etps", "--target", "2.3G", "--output", "{file}"],
        ["bench", TINY, "--output", "{file}"],
        ["sweep", TINY, "--data", "scenes", "--output", "{file}"],
        ["eval", TINY, "--data", "scenes", "--output", "{file}"],
        ["export", TINY, "--output", "{tmp}", "--record", "{file}"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("kind", ["absent", "a file"])
def test_an_output_is_refused_before_the_work(laconic_, monkeypatch, tmp_path, words, kind):
    def work(*_):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("laconic.cli.models.create", work)
    folder = tmp_path / "folder"
    if kind == "a file":
        folder.write_text("")
    code, out, err = laconic_(*(word.format(tmp=tmp_path, file=folder / "out.csv") for word in words))
    assert (code, out) == (1, "")
    assert f"there is no folder {folder}" in err


@pytest.mark.parametrize("words", [["demo"], ["export", TINY], ["show", image()], ["train"]], ids=lambda words: words[0])
def test_an_output_folder_below_a_file_is_refused(laconic_, tmp_path, words):
    (tmp_path / "file").write_text("")
    code, _, err = laconic_(*words, "--output", str(tmp_path / "file" / "new"))
    assert code == 1
    assert "is a file; --output takes a directory" in err
    assert "opening" not in err


def test_an_option_of_a_wrong_value_is_told_which_there_are(laconic_):
    code, _, err = laconic_("bench", TINY, "--method", "etps", "--options", "similarity=euclid")
    assert code == 1
    assert "similarity of etps must be cosine or previous-attention, not euclid" in err
    _, _, err = laconic_("bench", TINY, "--method", "bat", "--options", "steps=9", "--options", "clusters=many")
    assert "Literal" not in err


def test_list_starts_with_a_shortlist_of_known_methods(laconic_):
    out = laconic_("list")[1]
    assert out.startswith("Shortlist")
    found = json.loads(laconic_("list", "--json")[1])["shortlist"]
    assert found
    assert {name for one in found for name in one["methods"]} <= set(laconic.methods())


def test_doctor_tries_one_method_of_each_kind_and_says_so(laconic_, monkeypatch, caplog):
    from laconic.cli import doctor as job

    small = timm.create_model(TINY, img_size=96, depth=4).eval()
    monkeypatch.setattr(job, "open_model", lambda _: small)
    code, out, _ = laconic_("doctor", TINY)
    assert code == 0
    rows = laconic.methods()
    facts = [(rows[name].count, rows[name].learns, rows[name].full_attention) for name in job.KINDS]
    assert {"variable"} <= {count for count, _, _ in facts}
    assert any(learns for _, learns, _ in facts)
    assert any(full for _, _, full in facts)
    for number, name in enumerate(job.KINDS, 1):
        assert f"trying {name} ({number} of {len(job.KINDS)})" in caplog.text
        assert f"laconic.reduce_(model, {json.dumps(name)}" in out
    assert "--all tries all" in out
    assert [t["method"] for t in json.loads(laconic_("doctor", TINY, "--json")[1])["trials"]] == list(job.KINDS)
