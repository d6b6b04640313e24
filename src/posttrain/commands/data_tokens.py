"""`posttrain data tokens`: what the model sees of a file's rows, every token of them; of a preference pair both answers
side by side."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from posttrain.commands import EXIT_CODES
from posttrain.commands.reading import add_reading, data_settings, open_tokenizer, template_name
from posttrain.terminal import wants_colour

ABOUT = "show every token of a row: trained, masked, special, cut off"


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    tokens = verbs.add_parser(
        "tokens", aliases=["preview"], parents=[common], help=ABOUT, description=ABOUT, epilog=EXIT_CODES
    )
    tokens.add_argument("file", help="a file of examples, or a folder of them")
    tokens.add_argument("--model", required=True, help="whose tokenizer: a folder, or smollm2-135m-instruct")
    tokens.add_argument("--rows", default="0", metavar="0,5-9", help="rows to show, counted from 0")
    tokens.add_argument("--max-length", type=int, metavar="N", help="show what this limit cuts off")
    tokens.add_argument(
        "--truncation", choices=("keep_start", "keep_end"), default="keep_start", help="which end is kept"
    )
    tokens.add_argument(
        "--mask",
        "--train-on",
        dest="mask",
        nargs="?",
        choices=("assistant", "completion", "all"),
        const="assistant",
        default="assistant",
        help="what is to be trained, by the names of dataset.train_on: assistant (its turns, or what follows a prompt; "
        "so is --mask alone), all; or completion (what follows a prompt, else all)",
    )
    tokens.add_argument("--chat-template", "--template", metavar="NAME",
                        help="another chat template than the model's: a name, a .jinja file, or a folder with a "
                        "tokenizer")  # fmt: skip
    add_reading(tokens)
    tokens.add_argument("--html", type=Path, metavar="OUT", help="write a page instead")
    tokens.set_defaults(command=_tokens)


def _tokens(options: argparse.Namespace) -> int:
    from posttrain.data.view import PairView, parse_rows, view_rows
    from posttrain.data.view.html import as_html
    from posttrain.data.view.text import as_text, legend
    from posttrain.data.writing import check_report

    rows = parse_rows(options.rows)
    if options.html is not None:
        check_report(options.html, "--html", [options.file])
    settings = data_settings(
        options,
        [options.file],
        max_length=options.max_length,
        truncation_mode=options.truncation,
        chat_template=template_name(options),
    )
    tokenizer = open_tokenizer(options)
    assert tokenizer is not None  # --model is required
    views = view_rows(options.file, rows, tokenizer, settings, options.mask)
    if options.html is not None:
        options.html.write_text(as_html(views, f"{options.file} as {options.model} sees it"), "utf-8")
    if options.json:
        print(json.dumps([view.to_dict() for view in views]))
    elif options.html is not None:
        print(f"written: {options.html}")
    else:
        encoding = sys.stdout.encoding or "ascii"
        color = wants_colour(options.color, sys.stdout)
        width = shutil.get_terminal_size((100, 24)).columns
        print(*(as_text(view, color, encoding, width) for view in views), sep="\n", end="")
        print(legend(color, encoding, pairs=any(isinstance(view, PairView) for view in views)))
    return 3 if any(view.error is not None for view in views) else 0
