"""`posttrain chat`: talk to a model, or to two of them side by side."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from posttrain.commands import EXIT_CODES


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    chat = commands.add_parser(
        "chat", parents=[common], help="talk to a model", epilog=EXIT_CODES,
        description="Talk to a model: a line is a message; an empty line or the end of input ends it.",
    )  # fmt: skip
    chat.add_argument("model", help="a folder (of a model or an adapter), a hub id, or smollm2-135m-instruct")
    chat.add_argument("--compare", metavar="MODEL", help="another model that answers the same messages")
    chat.add_argument("--message", action="append", metavar="TEXT", help="say this instead of asking (repeatable)")
    chat.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    chat.add_argument("--max-tokens", type=int, default=512, help="most tokens of an answer (512)")
    chat.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (0.7)")
    chat.add_argument("--top-p", type=float, default=1.0)
    chat.add_argument("--top-k", type=int, default=0)
    chat.add_argument("--seed", type=int, default=0)
    chat.set_defaults(command=_chat)


def _chat(options: argparse.Namespace) -> int:
    from posttrain.rollout.sampling import Sampling
    from posttrain.runner.chat import open_speaker

    sampling = Sampling(options.max_tokens, options.temperature, options.top_k, options.top_p, seed=options.seed)
    names = [options.model, *([options.compare] if options.compare else [])]
    speakers = [open_speaker(name, options.system) for name in names]
    turns = []
    for turn, text in enumerate(_messages(options)):
        answers = {}
        for speaker in speakers:
            if not options.json and len(speakers) > 1:
                print(f"{speaker.name}:")
            said = []
            for piece in speaker.answer(text, sampling, turn):
                said.append(piece)
                if not options.json:
                    print(piece, end="", flush=True)
            answers[speaker.name] = "".join(said)
            if not options.json:
                print("\n" if len(speakers) > 1 else "", flush=True)
            if speaker.is_full:
                print(f"! {speaker.name} has {speaker.engine.places} places for tokens, and the conversation fills "
                      "them: this answer may be cut off, and no other can follow", file=sys.stderr)  # fmt: skip
        turns.append({"message": text, "answers": answers})
    if options.json:
        print(json.dumps({"turns": turns}, ensure_ascii=False))
    return 0


def _messages(options: argparse.Namespace) -> Iterator[str]:
    """Those that were given, or what is typed until an empty line."""
    if options.message:
        yield from options.message
        return
    while True:
        if sys.stdin.isatty() and not options.json:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.rstrip("\n")
