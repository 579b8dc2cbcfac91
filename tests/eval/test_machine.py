"""The machine's name and the code's commit, where there are any and where there are none."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

import tritonsparse
from tritonsparse.eval import machine


def test_the_processor_is_named_as_linux_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz: x\nmodel name\t: other\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert machine.processor() == "Some CPU @ 3 GHz: x"


def test_elsewhere_it_is_the_platform_s_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert machine.processor() == (platform.processor() or platform.machine()) != ""


def test_the_commit_is_that_of_the_checkout_and_says_when_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tritonsparse"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(tritonsparse, "__file__", str(package / "__init__.py"))
    assert machine.commit() is None  # an installation
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert machine.commit() == head[:12]
    (package / "__init__.py").write_text("x = 1\n")
    assert machine.commit() == f"{head[:12]}-dirty"
