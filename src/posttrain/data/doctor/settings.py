"""Every threshold of the doctor, in one place; `--set name=value` on the command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from posttrain.errors import ConfigError

SHARES = ("near_similarity", "repeated_answer_share", "label_share", "longer_share", "other_language_share")


@dataclass(frozen=True)
class DoctorSettings:
    """`near_*`: near duplicates are rows whose sets of `near_words` words in a row are alike by `near_similarity`
    (Jaccard, estimated by MinHash with `near_permutations`), of texts cut to `near_characters`. Of more than
    `near_rows` rows a sample drawn by `seed` is looked at; 0 leaves it out. `repeated_answer_*`: an answer of so many
    characters, in so many rows and such a share of them. `longer_share`: of pairs whose chosen answer is the longer;
    `label_share`: of ratings that say the same; `other_language_share`: the rest beside the main language; shares are
    judged from `min_rows` on. `language_words`: how many words have to speak for a language. `parallel_bytes`: JSONL
    files from this size on are read by several processes."""

    near_similarity: float = 0.8
    near_words: int = 3
    near_permutations: int = 128
    near_characters: int = 4000
    near_rows: int = 50_000
    seed: int = 0
    repeated_answer_share: float = 0.05
    repeated_answer_rows: int = 5
    repeated_answer_characters: int = 20
    min_rows: int = 30
    longer_share: float = 0.7
    label_share: float = 0.9
    other_language_share: float = 0.1
    language_words: int = 4
    parallel_bytes: int = 16 * 2**20

    def __post_init__(self) -> None:
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint="a share lies between 0 and 1")
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ConfigError(f"{field.name} is {getattr(self, field.name)}", hint="give a number from 0 on")
        if not 16 <= self.near_permutations <= 4096:
            raise ConfigError(f"near_permutations is {self.near_permutations}", hint="give a number from 16 to 4096")
        for name in ("near_words", "near_characters", "parallel_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint="give a number from 1 on")

    def cut(self, text: str) -> str:
        """The beginning and the end of it, where it is longer than what is looked at."""
        half = self.near_characters // 2
        return text if len(text) <= 2 * half else f"{text[:half]} {text[-half:]}"


def parse_settings(overrides: Iterable[str]) -> DoctorSettings:
    """The settings with `name=value` overrides. Raises ConfigError for an unknown name, suggesting one."""
    known: dict[str, type] = {name: type(value) for name, value in vars(DoctorSettings()).items()}
    given: dict[str, float] = {}
    for override in overrides:
        name, equals, text = (part.strip() for part in override.partition("="))
        if not equals:
            raise ConfigError(f"--set {override!r} is not of the form name=value", hint=f"names: {', '.join(known)}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"--set {name}: there is no such setting of the check", hint=hint)
        try:
            given[name] = known[name](text)
        except ValueError:
            wanted = {int: "a whole number", float: "a number"}[known[name]]
            raise ConfigError(f"--set {name}={text!r} is not {wanted}") from None
    return DoctorSettings(**given)  # type: ignore[arg-type]
