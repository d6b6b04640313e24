"""`posttrain recipes`: ready configuration files."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    recipes = commands.add_parser("recipes", parents=[common], help="list or print ready configuration files")
    recipes.add_argument("action", choices=("list", "show"), nargs="?", default="list")
    recipes.add_argument("name", nargs="?", help="recipe to show")
    recipes.set_defaults(command=_recipes)


def _recipes(options: argparse.Namespace) -> int:
    from posttrain.runner.recipes import read_recipe, recipe_names

    if options.action == "show":
        text = read_recipe(options.name or "")
        print(json.dumps({"name": options.name, "text": text}) if options.json else text, end="")
    elif options.json:
        print(json.dumps(recipe_names()))
    else:
        for name, first_line in recipe_names().items():
            print(f"{name:12} {first_line}")
    return 0
