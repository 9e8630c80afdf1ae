"""Screenshots: one a page, width and colour scheme, and one line where there is no browser."""

import shutil
from pathlib import Path

import pytest
import shots
from PIL import Image


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("vitlib", "params", "notebooks", "outputs/demo"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "demo"
    style = "body{background:#fff} @media (prefers-color-scheme: dark){body{background:#000}}"
    for name in ("index", "2_evaluate"):
        (folder / f"{name}.html").write_text(f"<style>{style}</style><div style='height: 2000px'>x</div>")
    return folder


def test_every_page_is_shot_at_each_width_and_scheme(folder, capsys):
    if not any(map(shutil.which, shots.NAMES)):
        pytest.skip("no Chromium here")
    pytest.importorskip("playwright")
    assert shots.main(folder) == 0
    sizes = {path.name: Image.open(path).size for path in (folder / "shots").iterdir()}
    names = [
        f"{page}-{width}-{scheme}.png"
        for page in ("index", "2_evaluate")
        for width in (1280, 390)
        for scheme in ("light", "dark")
    ]
    assert sorted(sizes) == sorted(names) == sorted(line.rpartition("/")[2] for line in capsys.readouterr().out.split())
    assert {size[0] for size in sizes.values()} == {1280, 390} and all(size[1] > 2000 for size in sizes.values())
    corners = [
        Image.open(folder / "shots" / f"index-390-{scheme}.png").getpixel((1, 1))[:3] for scheme in ("light", "dark")
    ]
    assert corners == [(255, 255, 255), (0, 0, 0)]


def test_what_is_missing_is_said_in_one_line(folder, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert shots.main(folder) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert "chromium, chromium-browser, google-chrome" in said or "playwright is not installed" in said
    assert shots.main(Path("outputs/none")) == 1
    assert "there is no page in outputs/none" in capsys.readouterr().err
