"""What README and docs say is true: commands parse, Python runs, links lead somewhere, mistakes print their lines."""

import dataclasses
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import ddfast
from bench.__main__ import commands as benchmarks
from bench.__main__ import load_entries
from bench.studies.__main__ import STUDIES
from ddfast.cli import build_parser, main
from ddfast.commands.parser import check_flags, commands_of
from ddfast.methods import get_method, list_methods
from ddfast.settings import fields

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MISTAKES = ROOT / "docs" / "when-it-goes-wrong.md"
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
COLOURS = {"bottle": (200, 60, 40), "cup": (40, 180, 60), "spoon": (50, 60, 210)}


def blocks(page, *languages):
    """The fenced blocks of a page in these languages, "" for one that names none."""
    fences = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in fences if language in languages]


def commands(page):
    """The command lines of a page that call ddfast, as words behind `ddfast`."""
    found = []
    for block in blocks(page, "", "sh", "bash", "console"):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True) if "ddfast " in line else []
            if words[:1] == ["ddfast"]:
                found.append(words[1:])
            elif words[:1] == ["torchrun"]:
                found.append(words[words.index("ddfast") + 1 :])
    return found


def pictures(folder, count, size=16):
    """`count` noisy pictures a class, each class of its own colour."""
    draws = torch.Generator().manual_seed(count)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noise = torch.randn(size, size, 3, generator=draws) * 30 + torch.tensor(colour)
            image = Image.fromarray(noise.clamp(0, 255).to(torch.uint8).numpy())
            image.save(folder / name / f"{number:03d}.png")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with all that the examples of the documents name."""
    place = tmp_path_factory.mktemp("documents")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for data in ("photos", "renamed"):
            pictures(Path(data) / "train", 20)
            pictures(Path(data) / "test", 6)
        for split in ("train", "test"):
            (place / "renamed" / split / "cup").rename(place / "renamed" / split / "mug")
        teacher = ddfast.train_teacher(
            "photos",
            out="teacher.safetensors",
            arch="convnet3",
            epochs=4,
            batch_size=16,
            arch_options={"width": 8},
            quiet=True,
        )
        torch.save(teacher.model.state_dict(), "weights.pt")
        run = {"data": "photos", "ipc": 2, "quiet": True}
        ddfast.distill("infoutil", teacher="teacher.safetensors", out="distilled", **run)
        ddfast.distill("infoutil", teacher="teacher.safetensors", out="half", until="score", **run)
        ddfast.distill("dm", out="dm", iterations=1, real_batch=8, **run)
    return place


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_parses(page, capsys):
    for words in commands(page):
        parser = build_parser(words)
        try:
            check_flags(parser, words, lambda: build_parser([]))
            rest = parser.parse_known_args(words)[1]
        except SystemExit as stop:
            # Of the examples of mistakes some are refused here already; their own test says how.
            if stop.code == 0 or page == MISTAKES:
                continue
            pytest.fail(f"ddfast {' '.join(words)}: {capsys.readouterr().err}")
        assert not rest, f"ddfast {' '.join(words)}: {rest} is left over"


def test_every_command_of_the_script_parses():
    script = (ROOT / "examples" / "igds.sh").read_text("utf-8")
    lines = re.sub(r"\\\n\s*", "", script).splitlines()
    assert len(lines) < 40
    found = [
        shlex.split(re.sub(r"\$\{\w+:-(\w+)\}", r"\1", line)) for line in lines if line.startswith("ddfast ")
    ]
    assert [words[1] for words in found] == ["train-prior", "train-estimator", "distill", "evaluate"]
    for _, *words in found:
        parser = build_parser(words)
        check_flags(parser, words, lambda: build_parser([]))
        assert not parser.parse_known_args(words)[1]


def test_commands_are_found():
    assert len(commands(ROOT / "README.md")) >= 8
    assert sum(len(commands(page)) for page in PAGES) >= 40
    for method in ("infoutil", "rded", "coresets", "dm", "dsa", "idc", "idm", "udd", "mtt", "sre2l", "igds"):
        assert commands(ROOT / "docs" / "methods" / f"{method}.md")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_flag_that_is_named_exists(page):
    known = {"--own-sets", "--held-out", "--option", "--no-build-isolation"}  # of the studies, and of pip
    for method in list_methods():
        for parser in commands_of(build_parser(["distill", method])).values():
            known |= set(parser._option_string_actions)
    prose = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    spans = [span for span in re.findall(r"`([^`\n]+)`", prose) if not span.startswith(("python", "pip"))]
    named = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert not named - known


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_benchmark_that_is_named_exists(page):
    known = {"all", *load_entries(), *benchmarks()}
    named = set(re.findall(r"python -m bench ([a-z]\w*)", page.read_text("utf-8")))
    assert not named - known
    studied = set(re.findall(r"python -m bench\.studies ([a-z]\w*)", page.read_text("utf-8")))
    assert not studied - set(STUDIES)


@pytest.mark.parametrize(
    ("page", "methods"),
    [
        ("infoutil", ["infoutil"]),
        ("rded", ["rded"]),
        ("coresets", ["herding", "k_means", "forgetting"]),
        ("dm", ["dm"]),
        ("sre2l", ["sre2l"]),
        ("igds", ["igds"]),
        ("udd", ["udd"]),
        ("dsa", ["dsa", "dc"]),
        ("idc", ["idc"]),
        ("idm", ["idm"]),
    ],
)
def test_tables_of_options_tell_the_defaults(page, methods):
    """Rows `| flags | ... | defaults | what |`: each flag is an option, and has the default that is told."""
    held = {field.name: {field.default} for field in fields()}
    for name in methods:
        for field in dataclasses.fields(get_method(name).Options):
            held.setdefault(field.name, set()).add(field.default)
    text = (ROOT / "docs" / "methods" / f"{page}.md").read_text("utf-8")
    rows = [line.strip("| \n").split("|") for line in text.splitlines() if line.startswith("| `--")]
    assert rows
    for flags, *_, defaults, _ in rows:
        names = [name.replace("-", "_") for name in re.findall(r"`--([\w-]+)`", flags)]
        told = [word.strip(" `") for word in defaults.split(",")]
        for name, default in zip(names, told, strict=True):
            if default:
                value = {"off": "False"}.get(default, default)
                assert value in {f"{known:g}" if default == "0" else str(known) for known in held[name]}
            else:
                assert None in held.get(name, ()) or held[name.removeprefix("no_")] == {True}


def test_presets_that_are_named_exist():
    text = (ROOT / "docs" / "methods" / "dm.md").read_text("utf-8")
    named = dict(re.findall(r"`(\w+_cmi)` \((?:weight )?(\d+)\)", text))
    assert {name: str(int(p["cmi"])) for name, p in get_method("dm").presets.items() if "cmi" in p} == named
    assert set(re.findall(r"`((?:cifar|svhn|tiny)\w+)`", text)) - {"cifar100"} <= set(
        get_method("dm").presets
    )
    text = (ROOT / "docs" / "methods" / "sre2l.md").read_text("utf-8")
    presets = text.partition("**Presets**")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", presets)) == set(get_method("sre2l").presets)
    assert "--preset paper" in (ROOT / "docs" / "methods" / "infoutil.md").read_text("utf-8")


@pytest.mark.parametrize(("page", "methods"), [("dsa", ["dc", "dsa"]), ("idc", ["idc"]), ("idm", ["idm"])])
def test_presets_of_the_methods_in_training_are_told(page, methods):
    """Every preset with a name that the page tells, and those with CMI with their weights."""
    text = (ROOT / "docs" / "methods" / f"{page}.md").read_text("utf-8").partition("**Presets**")[2]
    text = " ".join(text.partition("\n## ")[0].split()).replace(
        "the same for `cifar100`", "`cifar100_ipc1`, `cifar100_ipc10`, `cifar100_ipc50`"
    )
    presets = {name: preset for method in methods for name, preset in get_method(method).presets.items()}
    assert set(re.findall(r"`([a-z]+\d*(?:_\w+)?)`", text)) - set(methods) == set(presets)
    weights = dict(re.findall(r"`(\w+_cmi)` \((?:weight )?(\d+)\)", text))
    assert weights == {name: f"{preset['cmi']:.0f}" for name, preset in presets.items() if "cmi" in preset}


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ("dm", "--iterations 1"),
        ("dsa", "--iterations 1 --inner-loop 1"),
        ("dsa", "--method dc --iterations 1 --inner-loop 1"),
        ("idc", "--iterations 1 --inner-loop 2 --net-samples 8"),
    ],
)
def test_examples_run(example, words, workplace, monkeypatch, tmp_path, capsys):
    path = ROOT / "examples" / f"{example}.py"
    assert len(path.read_text("utf-8").splitlines()) < 40
    shared = ["photos", "--ipc", "2", "--real-batch", "8", "--epochs", "1", "--out", str(tmp_path / "out")]
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", [str(path), *shared, *words.split()])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out
    assert len(ddfast.DistilledSet(tmp_path / "out")) == 6


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text("utf-8")):
        path = "".join(target).partition("#")[0]
        if path and not path.startswith("http"):
            assert (page.parent / path).exists(), f"{page.name} links to {path}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


def mistakes():
    """The examples of the page of mistakes: command, and the line that it prints."""
    return [block.rstrip("\n").split("\n") for block in blocks(MISTAKES, "console")]


def test_ten_mistakes_are_shown():
    assert len(mistakes()) == 10
    assert all(len(example) == 2 and example[0].startswith("$ ddfast ") for example in mistakes())


@pytest.mark.parametrize(("command", "line"), mistakes(), ids=lambda text: text[:40])
def test_a_mistake_prints_the_line_that_is_shown(command, line, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    before = sorted(path.relative_to(workplace) for path in workplace.rglob("*"))
    try:
        code = main(shlex.split(command)[2:])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out, err) == (2, "", f"{line}\n")
    assert sorted(path.relative_to(workplace) for path in workplace.rglob("*")) == before


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


def test_pages_have_python():
    assert ROOT / "README.md" in WITH_PYTHON
    assert ROOT / "docs" / "python.md" in WITH_PYTHON


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_runs(page, workplace, monkeypatch, tmp_path):
    """Every block of a page, one after another, on images of 16 px and with an epoch for each training."""
    code = blocks(page, "python")
    for name in ("photos", "teacher.safetensors", "distilled"):
        (tmp_path / name).symlink_to(workplace / name)
    monkeypatch.chdir(tmp_path)
    names = examples()
    for block in code:
        small = re.sub(r"epochs=\d+", "epochs=1", block)
        small = re.sub(r"image_size=\d+", "image_size=16", small)
        for made in re.findall(r"out=\"([^\"]+)\"", small):
            (tmp_path / made).unlink(missing_ok=True)
        exec(compile(small, str(page), "exec"), names)
        for made in re.findall(r"out=\"([^\"]+)\"", small):
            assert (tmp_path / made).exists(), (page, made)


def examples():
    """What the blocks of Python take as given."""
    torch.manual_seed(0)
    model = ddfast.create_model("convnet3", num_classes=3, image_size=16, width=8).eval()
    return {
        "model": model,
        "convnet": ddfast.create_model("convnet3_in", num_classes=3, image_size=16, width=8),
        "images": torch.rand(2, 3, 16, 16),
        "labels": torch.tensor([0, 2]),
        "features": torch.rand(4, 8)[:2],
    }
