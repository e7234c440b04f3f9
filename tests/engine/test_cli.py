"""Every option is turned once, and seen in what comes out. A stand-in edits; all else is real."""

import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageOps

from step1x.engine.caches import cache_folder
from step1x.engine.cli import Job, program
from step1x.engine.errors import InputError
from step1x.engine.picture import Picture
from step1x.engine.progress import Progress, terminal
from step1x.engine.request import Edit

ROOT = Path(__file__).parents[2]


def default_interrupt() -> None:
    """A job in a shell's background has SIGINT ignored, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Engine:
    """Inverts pictures, and remembers what it was asked."""

    loaded: list[tuple[Any, dict[str, Any]]]
    asked: list[tuple[Picture, str, dict[str, Any]]]
    error: BaseException | None

    @classmethod
    def load(cls, model: Any = None, **options: Any) -> "Engine":
        cls.loaded.append((model, options))
        return cls()

    def edit(self, source: Picture, instruction: str, **options: Any) -> Edit:
        self.asked.append((source, instruction, options))
        options["on_stage"]("denoise")
        for step in (1, 2):
            options["on_step"](step, 2)
        if self.error:
            raise self.error
        image = ImageOps.invert(source.rgb)
        if source.alpha:
            image.putalpha(source.alpha)
        metadata: dict[str, str | int | float] = {"instruction": instruction, "seed": 5}
        return Edit(image, 5, {"denoise": 0.5}, [0.2, 0.3], metadata)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    """The stand-in, in place of step1x.engine.pipeline."""
    Engine.loaded, Engine.asked, Engine.error = [], [], None
    module = types.ModuleType("step1x.engine.pipeline")
    module.Engine = Engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "step1x.engine.pipeline", module)
    return Engine


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with photo.png (red) and logo.png (half transparent) in it."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 6), (255, 0, 0)).save("photo.png")
    Image.new("RGBA", (8, 6), (255, 0, 0, 128)).save("logo.png")
    return tmp_path


def run(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(program, arguments, prog_name="step1x-engine", **options)


def left() -> list[str]:
    return sorted(path.name for path in Path.cwd().iterdir())


def test_an_edit(engine, folder):
    result = run("edit", "photo.png", "invert it")
    assert (result.exit_code, result.stdout) == (0, "photo-edited.png\n")
    assert re.fullmatch(r"edited in \d+\.\d s, seed 5\n", result.stderr)
    with Image.open("photo-edited.png") as image:
        assert image.getpixel((0, 0)) == (0, 255, 255)
        assert image.info == {"instruction": "invert it", "seed": "5"}
    loaded = {"profile": None, "device": None, "variant": None, "fix_quotes": False}
    loaded |= {"kernels": None, "attention": None, "products": None, "compiled": None, "calibration": None}
    loaded |= {"backend": None, "trust_engine": False}
    [(model, given)] = engine.loaded
    kept, say, progress = (given.pop(name) for name in ("cache", "say", "progress"))
    assert (model, given) == (None, loaded)
    assert kept.folder == cache_folder() / "embeddings"
    assert isinstance(progress, Progress)
    assert say is kept.say
    assert engine.asked[0][2]["exact_algebra"] is True


def test_what_the_cache_says_is_a_note(engine, folder, capsys):
    run("edit", "photo.png", "invert it")
    engine.loaded[0][1]["cache"].say("it is damaged")
    assert capsys.readouterr().err == "note: it is damaged\n"


def test_every_option_reaches_the_engine(engine, folder):
    words = "--model m --variant v1.1 --profile cpu --steps 3 --guidance 2.5 --size 128 --seed 9"
    words += " --negative-prompt fog --strength 0.5 --fix-quotes --device cuda:1 -q -o out.webp"
    words += " --branches sequential --exact-algebra off --kernels on --attention merged --compile --no-cache"
    words += " --products torch --speed fast --mask logo.png --calibration c.json"
    result = run("edit", "photo.png", "make it blue", *words.split())
    assert (result.exit_code, result.stdout, result.stderr) == (0, "out.webp\n", "")
    loaded = {"profile": "cpu", "device": "cuda:1", "variant": "v1.1", "fix_quotes": True}
    loaded |= {"cache": False, "kernels": "on", "attention": "merged", "compiled": True, "calibration": "c.json"}
    loaded |= {"products": "torch"}
    [(model, given)] = engine.loaded
    assert (model, {name: given[name] for name in loaded}) == ("m", loaded)
    source, instruction, options = engine.asked[0]
    assert (source.name, source.rgb.size, instruction) == ("photo.png", (8, 6), "make it blue")
    del options["on_step"], options["on_stage"]
    expected = {
        "steps": 3,
        "guidance": 2.5,
        "size": 128,
        "seed": 9,
        "negative_prompt": "fog",
        "strength": 0.5,
        "branches": "sequential",
        "exact_algebra": False,
        "speed": "fast",
        "mask": "logo.png",
    }
    assert options == expected


def test_json(engine, folder):
    result = run("edit", "photo.png", "把它变蓝", "--json", "-q")
    printed = json.loads(result.stdout)
    assert printed["timings"].pop("save") > 0
    assert printed == {
        "output": "photo-edited.png",
        "width": 8,
        "height": 6,
        "seed": 5,
        "timings": {"denoise": 0.5},
        "steps": [0.2, 0.3],
        "metadata": {"instruction": "把它变蓝", "seed": 5},
    }


def test_pipes(engine, folder):
    result = run("edit", "-", "invert it", "-o", "-", input=Path("photo.png").read_bytes())
    assert result.exit_code == 0
    with Image.open(io.BytesIO(result.stdout_bytes)) as image:
        assert (image.format, image.getpixel((0, 0))) == ("PNG", (0, 255, 255))
        assert image.info["instruction"] == "invert it"
    assert left() == ["logo.png", "photo.png"]


def test_no_metadata(engine, folder):
    assert run("edit", "photo.png", "invert it", "--no-metadata").exit_code == 0
    with Image.open("photo-edited.png") as image:
        assert image.info == {}


def test_transparency(engine, folder):
    assert run("edit", "logo.png", "invert it").exit_code == 0
    with Image.open("logo-edited.png") as image:
        assert (image.mode, image.getchannel("A").getpixel((0, 0))) == ("RGBA", 128)
    result = run("edit", "logo.png", "invert it", "-o", "logo.jpg")
    assert result.stderr.startswith("note: JPEG has no transparency; the result is on white\n")
    assert run("edit", "photo.png", "invert it", "-o", "photo.jpg", "-q").stderr == ""


def test_an_existing_result_is_kept_unless_forced(engine, folder):
    Path("photo-edited.png").write_bytes(b"mine")
    result = run("edit", "photo.png", "invert it")
    assert result.exit_code == 2
    assert result.stderr == "error: cannot write 'photo-edited.png': it exists; --force (overwrite=True) replaces it\n"
    assert not engine.loaded
    assert Path("photo-edited.png").read_bytes() == b"mine"
    assert run("edit", "photo.png", "invert it", "--force").exit_code == 0
    assert run("edit", "photo.png", "invert it", "--force", "-o", "photo.png").exit_code == 2


def test_names_of_results():
    rest = dict.fromkeys(("model", "variant", "profile", "steps", "guidance", "size", "seed", "strength", "device"))
    flags = dict.fromkeys(
        ("force", "no_cache", "fix_quotes", "no_metadata", "as_json", "quiet", "exact_algebra", "trust_engine"), False
    )
    rest |= dict.fromkeys(("branches", "kernels", "attention", "products", "compiled", "backend", "speed"))
    rest |= dict.fromkeys(("mask", "calibration"))

    def target(img: str, output: str | None = None) -> str:
        words = {**rest, **flags, "img": img, "output": output}
        return Job(**words, instruction="x", negative_prompt="").target  # type: ignore[arg-type]

    assert target("a/b.c.jpg") == "a/b.c-edited.png"
    assert target("noext") == "noext-edited.png"
    assert target(".jpg") == ".jpg-edited.png"
    assert target("a.png", "b.webp") == "b.webp"
    assert target("-", "-") == "-"


def test_a_name_that_is_not_utf8(engine, folder):
    name = os.fsdecode(b"gr\xfcn.png")
    Path("photo.png").rename(name)
    result = run("edit", name, "invert it", "-q")
    assert (result.exit_code, result.stdout_bytes) == (0, b"gr\xfcn-edited.png\n")
    assert json.loads(run("edit", name, "x", "-q", "--force", "--json").stdout)["output"] == "gr\udcfcn-edited.png"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("the picture is too thin"), 2, "error: the picture is too thin"),
        (InputError("two\nlines\x1b[31m"), 2, r"error: two\nlines\x1b[31m"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (ValueError("a bug\nof ours"), 1, "error: ValueError: a bug of ours (--debug shows where)"),
        (MemoryError(), 1, "error: MemoryError (--debug shows where)"),
        (
            OSError(28, "No space left on device", "x"),
            1,
            "error: no space left on device: 'x' (--debug shows where)",
        ),
        (EOFError(), 1, "error: EOFError: a file ended early"),
    ],
)
def test_errors_become_one_line_and_a_code(engine, folder, error, code, line):
    engine.error = error
    result = run("edit", "photo.png", "invert it", "-q")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.strip() == line
    assert left() == ["logo.png", "photo.png"]


def test_debug_shows_the_traceback(engine, folder):
    engine.error = ValueError("a bug of ours")
    result = run("edit", "photo.png", "invert it", "--debug")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("error: ValueError: a bug of ours\n")


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        ("--steps 0", "'--steps': 0 is not in the range"),
        ("--steps 2.5", "'2.5' is not a valid integer"),
        ("--guidance nan", "nan is not a finite number"),
        ("--guidance inf", "not in the range"),
        ("--guidance -1", "not in the range"),
        ("--size 8", "not in the range"),
        ("--seed -1", "not in the range"),
        ("--seed 9223372036854775808", "not in the range"),
        ("--strength 0", "not in the range"),
        ("--strength 1.01", "not in the range"),
        ("--strength NaN", "not a finite number"),
        ("--device gpu", "'gpu' is not one of auto, cpu, cuda, cuda:N, mps"),
        ("--device cuda:x", "is not one of"),
        ("--device cpu:1", "is not one of"),
        ("--variant v9", "'v9' is not one of"),
        ("--exact-algebra no", "'no' is neither on nor off"),
        ("--branches both", "'both' is not one of"),
        ("--kernels some", "'some' is not one of"),
        ("--attention none", "'none' is not one of"),
        ("--profile fp9", "unknown profile 'fp9'; known: bf16-24gb, bf16-80gb, cpu"),
        ("--frobnicate", "--frobnicate"),  # click 8.5 puts it in quotes
        ("more", "unexpected extra argument"),
        ("-o - --json", "both write to standard output"),
    ],
)
def test_options_out_of_range(engine, folder, words, needle):
    result = run("edit", "photo.png", "invert it", *words.split())
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert needle in result.stderr.lower() or needle in result.stderr
    assert result.stderr.count("\n") == 1
    assert not engine.loaded


def test_the_limits_themselves_pass(engine, folder):
    words = f"--steps 1 --guidance 0 --size 16 --seed {2**63 - 1} --strength 1 --device cuda:0 --force"
    assert run("edit", "photo.png", "x", *words.split()).exit_code == 0


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:12", "mps"])
def test_devices(engine, folder, device):
    assert run("edit", "photo.png", "x", "--device", device).exit_code == 0
    assert engine.loaded[0][1]["device"] == device


def test_no_command_shows_help():
    result = run()
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: step1x-engine")
    assert run("--help").exit_code == 0
    assert re.fullmatch(r"step1x-engine \d+\.\d+\.\d+\n", run("--version").stdout)
    assert run("-h").stdout == run("--help").stdout


BENCH = ("bench", "bench compare", "bench gate", "bench accept", "bench paired")
ENGINES = ("build", "engines list", "engines verify", "engines prune")


@pytest.mark.parametrize(
    "command", ["", "edit", "info", "convert", "doctor", "plan", "profiles", "calibrate", *BENCH, *ENGINES]
)
def test_the_docs_hold_the_help(command):
    if version("click") < "8.5":
        pytest.skip("click before 8.5 lays help out otherwise; the page is 8.5's")
    text = run(*command.split(), "--help", terminal_width=80).stdout
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert " ".join(text.split()) in " ".join(page.split()), text
    assert "Exit codes: 0 done, 1 we failed" in text


def test_progress_names_stages_and_counts_steps():
    from rich.console import Console

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with Progress(console) as progress:
        progress.stage("load")
        progress._bar.refresh()
        progress.stage("denoise")
        progress.step(3, 28)
        progress._bar.refresh()
        progress.stage("something new")
        progress._bar.refresh()
    shown = screen.getvalue()
    for needle in ("Loading the model", "Editing", "3/28", "ETA", "something new"):
        assert needle in shown
    assert shown.endswith("\x1b[1A\x1b[2K")  # nothing is left of it


def test_progress_is_for_people_only(monkeypatch):
    assert terminal(quiet=False) is None  # pytest's stderr is no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert terminal(quiet=True) is None
    assert terminal(quiet=False) is not None


def test_ctrl_c_while_waiting_for_the_picture(tmp_path):
    command = [sys.executable, "-m", "step1x.engine", "edit", "-", "x", "-o", "out.png"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=pipe, stdout=pipe, stderr=pipe, preexec_fn=default_interrupt
    ) as process:
        assert process.stdin is not None
        process.stdin.write(b"\x89PNG" * 100_000)  # more than a pipe holds: when this returns, it is reading
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=20)
    assert (process.returncode, out, error.strip()) == (130, b"", b"error: interrupted")
    assert not list(tmp_path.iterdir())


def test_doctor():
    result = run("doctor")
    assert result.exit_code == 0
    assert re.search(r"^(runs|no) +cpu: ", result.stdout, re.MULTILINE)
    found = json.loads(run("doctor", "--json").stdout)
    assert found["cores"] >= 1
    assert found["memory_gb"] > 0
    assert found["versions"]["torch"].startswith("2.")
    profiles = {item["profile"]: item for item in found["profiles"]}
    assert profiles["cpu"]["fits"]
    assert profiles["bf16-80gb"]["fits"] == any(d["memory_gb"] >= 80 for d in found["devices"])


def test_info_and_convert(official, tmp_path):
    source = official("v1.1")
    result = run("info", str(source))
    assert result.exit_code == 0, result.stderr
    assert "v1.1, official layout, preset official-v1.1" in result.stdout
    assert re.search(r"^dit: [\d,]+ parameters", result.stdout, re.MULTILINE)
    assert "text_encoder: not there" in result.stdout
    found = json.loads(run("info", str(source), "--json").stdout)
    assert found["version"] == "v1.1"
    target = tmp_path / "converted"
    result = run("convert", str(source), str(target), "--layout", "diffusers")
    assert (result.exit_code, result.stdout) == (0, f"{target}\n")
    assert (target / "model_index.json").is_file()
    for words in (("convert", str(source), str(target)), ("info", str(tmp_path / "gone"))):
        result = run(*words)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1


def test_the_real_engine_takes_what_we_pass(engine, folder, monkeypatch):
    run("edit", "photo.png", "x")
    monkeypatch.delitem(sys.modules, "step1x.engine.pipeline")
    from step1x.engine.pipeline import Engine as Real

    inspect.signature(Real.load).bind(engine.loaded[0][0], **engine.loaded[0][1])
    source, instruction, options = engine.asked[0]
    inspect.signature(Real.edit).bind(None, source, instruction, **options)


def test_a_real_edit_and_the_same_bytes_again(folder):
    ramp = np.linspace(0, 255, 160).round().astype(np.uint8)
    Image.fromarray(np.stack([ramp[None].repeat(120, 0)] * 3, -1)).save("ramp.png")
    for name in ("a.png", "b.png"):
        result = run("edit", "ramp.png", "invert the colours", "-o", name, "--seed", "1", "--steps", "2", "-q")
        assert result.exit_code == 0, result.stderr
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    with Image.open("a.png") as image:
        assert image.info["seed"] == "1"
        assert image.info["instruction"] == "invert the colours"
