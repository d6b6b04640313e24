"""Plain text, in one column (`text`, or whatever `dataset_text_field` says)."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.data.codes import Row
from posttrain.data.formats.build import build, filled_text
from posttrain.types import Example, Origin


@dataclass(frozen=True)
class TextFormat:
    column: str

    @property
    def SHAPE(self) -> str:  # as the modules' constant
        return f"`{self.column}`"

    def matches(self, row: Row) -> bool:
        return isinstance(row.get(self.column), str)

    def describe(self, row: Row) -> str:
        return f"read as text: column `{self.column}`"

    def parse(self, row: Row, origin: Origin) -> Example:
        return build(row, origin, None, filled_text(row, self.column, origin, "E-DATA-0014"), {self.column})
