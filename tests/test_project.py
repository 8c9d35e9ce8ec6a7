"""The package as others get it: the wheel, what `fedmpi init` writes, the command line's words, light imports."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedmpi
from fedmpi import config, project
from fedmpi.cli import arguments_of, main
from fedmpi.errors import ConfigError
from fedmpi.methods import METHODS

from .test_layers import LAYERS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]


def parsers(
    parser: argparse.ArgumentParser, words: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """A command's words and its parser, of all commands."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from parsers(inner, f"{words} {name}".strip())


COMMANDS = dict(parsers(arguments_of()))


def python(*words: str, cwd: Path = ROOT, **env: str) -> str:
    """The output of a Python process."""
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, **env},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_help_and_version_import_nothing_heavy() -> None:
    said = python(
        "-c",
        f"""
import sys
import fedmpi
from fedmpi.cli import main
for words in [*{list(COMMANDS)!r}, "--version"]:
    try:
        main([*words.split(), *([] if words == "--version" else ["--help"])])
    except SystemExit as end:
        assert not end.code, words
heavy = {{"torch", "numpy", "numba", "pydantic", "yaml", "rich", "sklearn", "matplotlib", "mpi4py"}}
print("imported:", sorted(heavy & sys.modules.keys()))
""",
    )
    assert said.endswith(f"fedmpi {fedmpi.__version__}\nimported: []\n")


@pytest.mark.parametrize("words", COMMANDS)
def test_every_argument_is_explained(words: str) -> None:
    for action in COMMANDS[words]._actions:
        assert action.help or isinstance(action, argparse._SubParsersAction), action
        for choice in getattr(action, "_choices_actions", ()):
            assert choice.help, choice.dest


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, as pip lays them out. It is built of the source distribution, as `python -m build` does."""
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("dist")
    (archive,) = SdistBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    subprocess.run(["tar", "-xzf", archive, "-C", folder], check=True)
    (source,) = (path for path in folder.iterdir() if path.is_dir())
    (wheel,) = WheelBuilder(str(source)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "site")
    return folder / "site"


def test_the_changelog_tells_of_this_version() -> None:
    (newest, *_) = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest in (fedmpi.__version__, "Unreleased")


def test_the_wheel_holds_the_package_its_types_and_what_init_writes(site: Path) -> None:
    files = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert "fedmpi/py.typed" in files
    assert files >= {str(path.relative_to(ROOT)) for path in ROOT.glob("fedmpi/**/*.py")}
    rest = {name.split("/")[0] for name in files} - {"fedmpi"}
    assert rest == {f"fedmpi-{fedmpi.__version__}.dist-info"}, "neither tests nor anything else beside it"
    for pattern in project.FILES | project.PAPERS:
        wanted = {f"fedmpi/share/{path.relative_to(ROOT)}" for path in ROOT.glob(pattern)}
        assert wanted, pattern
        assert wanted <= files


def test_the_wheel_alone_trains_on_what_it_wrote(site: Path, tmp_path: Path) -> None:
    def run(*words: str) -> str:
        return python(*words, cwd=tmp_path, PYTHONPATH=str(site))

    assert run("-c", "import fedmpi; print(fedmpi.__file__)").strip() == str(site / "fedmpi" / "__init__.py")
    assert str(tmp_path) in run("-m", "fedmpi", "init")
    assert "accuracy" in run("-m", "fedmpi", "train", "configs/own.yaml", "rounds=2", "--out", "own")
    assert (tmp_path / "own" / "summary.json").exists()


def test_init_writes_files_that_fit_and_says_what_each_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "lab"), "--papers"]) == 0
    assert f"cd {tmp_path / 'lab'} && fedmpi train configs/quickstart.yaml" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "lab")
    explained = re.findall(r"^\| `(.+)` \| .+ \|$", Path("README.md").read_text(), re.MULTILINE)
    assert {path for pattern in explained for path in Path().glob(pattern)} == {
        path for path in Path().rglob("*") if path.is_file() and path != Path("README.md")
    }
    for path in Path("configs").rglob("*.yaml"):
        for base in re.findall(r"^base: (.+)$", path.read_text(), re.MULTILINE):
            assert (path.parent / base).exists()
    config.load("configs/own.yaml")
    config.load("configs/csv.yaml")
    pointed = {
        path: found for path in Path().rglob("*") if path.is_file() and (found := _pointers(path.read_text()))
    }
    assert pointed == {}, "no pointer to files that are not there"
    script = Path("launch/mpirun.sh")
    assert script.read_text() == (ROOT / script).read_text()
    assert os.access(script, os.X_OK)


def _pointers(text: str) -> list[str]:
    """Files named in a text and missing here, but for those that it says are the repository's."""
    lines = " ".join(line for line in text.splitlines() if "of the repository" not in line)
    named = re.findall(r"(?<![\w./{-])(?:configs|docs|launch|slurm|tests)/[\w./-]*\w", lines)
    return sorted(
        path for path in set(named) if not Path(path).exists() and not Path(f"slurm/{path}").exists()
    )


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "cpu.sbatch").write_text("mine")
    with pytest.raises(ConfigError, match=r"FOLDER: .* without slurm/cpu.sbatch, but .* nothing was written"):
        project.write(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["cpu.sbatch"]
    assert (tmp_path / "slurm" / "cpu.sbatch").read_text() == "mine"


def test_init_leaves_nothing_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "slurm").write_text("a file where a folder should go")
    with pytest.raises(ConfigError, match="FOLDER: cannot write to"):
        project.write(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "slurm"]


def code_of(page: str) -> list[str]:
    """The lines of a page's code blocks and its inline code."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`]+)`", prose)
    return [*"\n".join(blocks).splitlines(), *(" ".join(words.split()) for words in inline)]


def called(line: str) -> list[tuple[str, list[str]]]:
    """The commands of fedmpi in a line of code, with the options that they are given."""
    found = re.split(r"(?<![\w./-])(?<!from )(?<!import )fedmpi (?=[a-z])", line)[1:]
    parts = [re.split(r" # | \|\| | && ", part)[0] for part in found]
    return [(re.match(r"[a-z]+", part)[0], re.findall(r"(?<!\S)(--[a-z-]+)", part)) for part in parts]  # type: ignore[index]


def missing(page: Path) -> list[str]:
    """Files that a page names and that are not there."""
    text = page.read_text()
    code = "\n".join(code_of(text))
    named = {
        ROOT / path
        for path in re.findall(r"(?<![\w./-])(?:configs|docs|launch|slurm|tests|fedmpi)/[\w./-]*\w", code)
    }
    linked = {page.parent / path for path in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)}
    return sorted(str(path) for path in named | linked if "yours" not in path.name and not path.exists())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_commands_options_and_files_that_exist(page: Path) -> None:
    for line in code_of(page.read_text()):
        for command, options in called(line):
            assert command in COMMANDS, line
            below = [parser for words, parser in COMMANDS.items() if words.split()[:1] == [command]]
            known = {word for parser in below for action in parser._actions for word in action.option_strings}
            assert set(options) <= known, line
    assert missing(page) == []


def test_what_is_wrong_in_a_page_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`fedmpi fly` and `configs/none.yaml`, [there](gone.md#part)\n"
        "```sh\nmpirun -n 2 fedmpi train a --fast # --slow\n```\n"
    )
    lines = code_of(page.read_text())
    assert [one for line in lines for one in called(line)] == [("train", ["--fast"]), ("fly", [])]
    assert missing(page) == sorted([str(ROOT / "configs/none.yaml"), str(tmp_path / "gone.md")])


def test_the_pages_together_name_every_command() -> None:
    code = [line for page in PAGES for line in code_of(page.read_text())]
    named = {command for line in code for command, _ in called(line)}
    assert {words for words in COMMANDS if words and " " not in words} <= named


def test_every_method_stands_in_the_tables() -> None:
    for page, row in (("README.md", r"^\| (`.*)$"), ("docs/methods.md", r"^\| (`[^|]*)\|")):
        rows = re.findall(row, (ROOT / page).read_text(), re.MULTILINE)
        named = {name for line in rows for name in re.findall(r"`(\w+)`", line.split("|")[0])}
        assert METHODS.keys() <= named, page


def test_every_page_is_reached_from_the_readme() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    reached: set[Path] = set()
    left = [ROOT / "README.md"]
    while left:
        page = left.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", page.read_text())
        left += [path for link in links if (path := (page.parent / link).resolve()) not in reached]
    assert set(PAGES) <= reached


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    python(
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path),
        NO_MKDOCS_2_WARNING="true",
    )
    assert "fedmpi.train" in (tmp_path / "python" / "index.html").read_text()
    assert "overwrite" in (tmp_path / "api" / "index.html").read_text()


def test_the_map_agrees_with_the_layers() -> None:
    """Its lines name every part of the package once, and each part imports from lines below its own only."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = re.search(r"^fedmpi/\n(.*?)^$", text, re.MULTILINE | re.DOTALL)
    assert drawn is not None
    lines = [line[2:].split("  ")[0].split(" · ") for line in drawn[1].splitlines() if "↓" not in line]
    level = {part: row for row, parts in enumerate(lines) for part in parts}
    assert sum(map(len, lines)) == len(level)
    assert level.keys() == {part for part in LAYERS if not part.startswith("__")}
    up = [(part, used) for part in level for used in LAYERS[part] if level[used] <= level[part]]
    assert up == []


def test_the_diagram_has_the_bytes_of_today() -> None:
    spec = importlib.util.spec_from_file_location("message", ROOT / "docs" / "message.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.draw() == script.SVG.read_text(), "python docs/message.py draws it anew"
