"""Ready configuration files that come with the package."""

from __future__ import annotations

from importlib.resources import files

from posttrain.errors import ConfigError

_FOLDER = files("posttrain") / "recipes"


def recipe_names() -> dict[str, str]:
    """Name and first line of every recipe."""
    texts = {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in _FOLDER.iterdir()
             if entry.name.endswith(".yaml")}  # fmt: skip
    return {name: text.splitlines()[0].lstrip("# ") for name, text in sorted(texts.items())}


def read_recipe(name: str) -> str:
    """The recipe's text. Raises ConfigError naming those there are."""
    entry = _FOLDER / f"{name}.yaml"
    if not name or "/" in name or not entry.is_file():
        raise ConfigError(f"there is no recipe {name!r}", hint=f"choose one of: {', '.join(recipe_names())}")
    return entry.read_text(encoding="utf-8")
