"""The pictures of docs/masks.md are what the code draws today, and the guide shows each of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_masks", ROOT / "scripts" / "draw_masks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


@pytest.mark.parametrize("name", SCRIPT.PICTURES)
def test_a_picture_is_what_is_drawn(name: str) -> None:
    kept = (SCRIPT.FOLDER / f"masks-{name}.svg").read_text("utf-8")
    assert kept == SCRIPT.draw(name), "draw it again: python scripts/draw_masks.py"


def test_the_guide_shows_every_picture() -> None:
    guide = (ROOT / "docs" / "masks.md").read_text("utf-8")
    kept = {path.name for path in SCRIPT.FOLDER.glob("masks-*.svg")}
    assert kept == {f"masks-{name}.svg" for name in SCRIPT.PICTURES}
    assert {name for name in kept if f"images/{name}" not in guide} == set()
