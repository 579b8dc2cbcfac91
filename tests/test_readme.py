"""README.md and docs/: every example runs, every link leads somewhere, every command exists."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tritonsparse.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
RECIPES = sorted(path.stem for path in (ROOT / "train" / "recipes").glob("*.toml"))
sys.path.append(str(ROOT / "benchmarks"))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(*pages: Path) -> list[list[str]]:
    lines = "".join(text for page in pages for text in blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [started(words) for line in lines if (words := shlex.split(line, comments=True))]


# Options of launchers, which come before the program's.
LAUNCHERS = {"--multi_gpu", "--cpu", "--num_processes", "--nproc_per_node"}


def started(words: list[str]) -> list[str]:
    """A command without its variables and its launcher."""
    words = words[next(place for place, word in enumerate(words) if "=" not in word) :]
    if words[0] not in ("accelerate", "torchrun"):
        return words
    program = words.index("-m")
    assert {word for word in words[:program] if word.startswith("--")} <= LAUNCHERS
    return ["python", *words[program:]]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
@pytest.mark.usefixtures("fresh_accelerate")
def test_every_example_runs_and_prints_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a reader would type the blocks of a page. What `print(...)  # number` says must be printed."""
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(page, "python"))
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^print\(.*\)  # ([\d.]+)$", code, flags=re.MULTILINE)
    assert [number for number in promised if number not in printed] == []


def test_the_readme_is_short_and_honest_and_every_method_has_its_row_where_methods_are_compared() -> None:
    lines = PAGES[0].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and len(blocks(PAGES[0], "python")) == 1
    assert "Training is not faster today" in "\n".join(lines[:39])
    assert all(f"]({name_of(page)})" in "\n".join(lines) for page in PAGES[1:])
    text = (ROOT / "docs" / "choosing-a-method.md").read_text(encoding="utf-8")
    assert [name for name in METHODS if f"| `{name}` |" not in text] == []


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_and_picture_leads_to_a_file_and_heading() -> None:
    for page in [*PAGES, ROOT / "ARCHITECTURE.md"]:
        links = re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8"))
        for path, anchor in links:
            target = (page.parent / path).resolve() if path else page
            assert target.is_file() and (not anchor or anchor in anchors(target)), (page, path, anchor)


@pytest.mark.parametrize("words", commands(*PAGES), ids=" ".join)
def test_every_command_exists_and_knows_its_options(words: list[str], helped: Callable[..., set[str]]) -> None:
    if words[0] == "make":
        assert re.search(rf"^(?:[\w -]+ )?{words[1]}(?: [\w -]+)?:", MAKEFILE, flags=re.MULTILINE)
        assert all(f"$({variable.partition('=')[0]})" in MAKEFILE for variable in words[2:])
    elif words[:2] == ["pip", "install"]:
        extras = re.fullmatch(r"\.(?:\[(\w+)\])?", words[2])
        assert extras and (extras[1] is None or extras[1] in PROJECT["optional-dependencies"])
    else:
        options = helped(words)
        assert [word for word in words if word.startswith("--") and word not in options] == []
        given = dict(pairwise(words))
        assert given.get("--method", "dense") in METHODS
        assert "--recipe" not in given or given["--recipe"] in RECIPES


def test_the_programs_page_names_every_recipe_and_no_unknown_option(helped: Callable[..., set[str]]) -> None:
    page = ROOT / "docs" / "programs.md"
    text = page.read_text(encoding="utf-8")
    known = set().union(*(helped(words) for words in commands(page) if words[0] == "python"))
    assert set(re.findall(r"(?<!\w)--\w+", text)) <= known | LAUNCHERS
    assert [name for name in RECIPES if f"`{name}`" not in text] == []


@pytest.fixture
def helped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., set[str]]:
    """The options in the `--help` of the program that a command starts."""

    def options(words: list[str]) -> set[str]:
        main, subcommand = program(words)
        # Wide enough that no name is broken.
        monkeypatch.setenv("COLUMNS", "10000")
        with pytest.raises(SystemExit) as ended:
            main([*subcommand, "--help"])
        assert ended.value.code == 0
        return set(re.findall(r"--[\w-]+", capsys.readouterr().out))

    return options


def program(words: list[str]) -> tuple[Callable[[list[str]], object], list[str]]:
    """The entry point that a command starts, and its subcommand."""
    if words[0] in PROJECT["scripts"]:
        module, _, function = PROJECT["scripts"][words[0]].partition(":")
        return getattr(importlib.import_module(module), function), words[1:2] if words[0] == "tritonsparse" else []
    if words[0] == "python" and words[1].startswith("benchmarks/"):
        return importlib.import_module(Path(words[1]).stem).main, []
    assert words[:2] == ["python", "-m"], words
    return importlib.import_module(words[words.index("-m") + 1]).main, []
