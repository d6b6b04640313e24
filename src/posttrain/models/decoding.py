"""One token at a time: keys and values of what was read are kept, so that a new token costs a forward of itself alone.

`Memory` stands in the layout's place. First prompts are read, packed as always (`reading`), and each prompt's keys and
values are put aside once; `admit` then lets any number of rows go on from a prompt. A step computes one new token for
every row, `(1, B)` tokens with `decoding` as their layout: a row attends to its prompt's keys, which its group shares,
and to its own. Rows that are done leave (`keep`), and others may enter in their place.

Shape suffixes: `B` rows, `K` key heads, `G` query heads of a key head, `E` head size, `P` a prompt's tokens, `T` places
for a row's own tokens, of which `N` are in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from posttrain.types import Layout


@dataclass(frozen=True)
class Reading(Layout):
    """A layout whose segments are prompts to be remembered."""

    memory: Memory | None = None


@dataclass
class Group:
    """Rows `[start, stop)` go on from prompt `prompt`."""

    prompt: int
    start: int
    stop: int


@dataclass
class Memory:
    """At most `room` tokens of its own for a row. `lengths` are those of the prompts that were read, by number;
    `counts_B` how many own tokens each row has."""

    room: int
    lengths: dict[int, int] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    counts_B: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    _prompts: dict[tuple[Any, int], tuple[torch.Tensor, ...]] = field(default_factory=dict)
    _own: dict[Any, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _signals: dict[Any, torch.Tensor] = field(default_factory=dict)
    _reading: tuple[int, ...] = ()

    # --- prompts ------------------------------------------------------------------------------------------------------

    def reading(self, lengths: Sequence[int], numbers: Sequence[int]) -> Reading:
        """The layout of a forward that reads prompts `numbers`, laid end to end."""
        self._reading = tuple(numbers)
        self.lengths |= dict(zip(numbers, lengths, strict=True))
        starts = tuple(sum(lengths[:i]) for i in range(len(lengths)))
        return Reading(starts, tuple(lengths), memory=self)

    def remember(self, layer: Any, key_1KTE: torch.Tensor, value_1KTE: torch.Tensor, layout: Layout) -> None:
        """What layer `layer` has computed for the prompts that are read."""
        for number, (own, _) in zip(self._reading, layout.segments(), strict=True):
            kept = key_1KTE[0, :, own].mT.contiguous(), value_1KTE[0, :, own].contiguous()
            self._prompts[layer, number] = kept

    def prompt(self, layer: Any, number: int) -> tuple[torch.Tensor, ...]:
        """What layer `layer` keeps of prompt `number`: keys `(K, E, P)` and values `(K, P, E)`."""
        return self._prompts[layer, number]

    def forget(self, number: int) -> None:
        """Prompt `number`, from which no row goes on any more."""
        del self.lengths[number]
        for place in [place for place in self._prompts if place[1] == number]:
            del self._prompts[place]

    # --- rows ---------------------------------------------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        return len(self.counts_B)

    def admit(self, number: int, rows: int) -> None:
        """`rows` more rows, behind the others, that go on from prompt `number`."""
        self.groups.append(Group(number, self.num_rows, self.num_rows + rows))
        self.counts_B = torch.cat([self.counts_B, torch.zeros(rows, dtype=torch.long)])

    def keep(self, rows: Sequence[int]) -> None:
        """Only these, in order; the others are done."""
        index = torch.tensor(rows, dtype=torch.long)
        for place, (keys, values) in self._own.items():
            for kept in (keys, values):
                kept[: len(index)] = kept[index.to(kept.device)]
            self._own[place] = keys, values
        self._signals = {layer: kept[index.to(kept.device)] for layer, kept in self._signals.items()}
        self.counts_B = self.counts_B[index]
        remaining, position = [], 0
        for group in self.groups:
            count = sum(group.start <= row < group.stop for row in rows)
            if count:
                remaining.append(Group(group.prompt, position, position + count))
            position += count
        self.groups = remaining

    def positions(self) -> torch.Tensor:
        """`(B,)`: of each row's next token."""
        lengths = [self.lengths[group.prompt] for group in self.groups for _ in range(group.start, group.stop)]
        return torch.tensor(lengths, dtype=torch.long) + self.counts_B

    def advance(self) -> None:
        """Every row has one token more."""
        self.counts_B = self.counts_B + 1

    # --- attention ----------------------------------------------------------------------------------------------------

    def attend(
        self,
        layer: Any,
        query_1HBE: torch.Tensor,
        key_1KBE: torch.Tensor,
        value_1KBE: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """`(1, B, H, E)`: each row's new token over its prompt, its own tokens and itself."""
        rows, size = query_1HBE.shape[2:]
        heads = key_1KBE.shape[1]
        keys_BKET, values_BKTE = self._places(layer, key_1KBE, value_1KBE)
        used = int(self.counts_B.max()) + 1
        place_B = torch.arange(rows), self.counts_B
        keys_BKET[place_B[0], :, :, place_B[1]] = key_1KBE[0].transpose(0, 1)
        values_BKTE[place_B[0], :, place_B[1]] = value_1KBE[0].transpose(0, 1)
        query_BKGE = (query_1HBE[0] * scale).transpose(0, 1).reshape(rows, heads, -1, size)
        score_BKGN = query_BKGE @ keys_BKET[:rows, :, :, :used]
        out_BKGE = torch.empty_like(query_BKGE, dtype=value_1KBE.dtype)
        for group in self.groups:
            part = slice(group.start, group.stop)
            keys_KEP, values_KPE = self._prompts[layer, group.prompt]
            stacked_KRE = query_BKGE[part].transpose(0, 1).reshape(heads, -1, size)
            score_BKGP = (stacked_KRE @ keys_KEP).view(heads, group.stop - group.start, -1, keys_KEP.shape[-1])
            weight_BKGS = self._weights(torch.cat([score_BKGP.transpose(0, 1), score_BKGN[part]], -1), part,
                                        keys_KEP.shape[-1], window, softcap).to(value_1KBE.dtype)  # fmt: skip
            on_prompt, on_own = weight_BKGS.split([keys_KEP.shape[-1], used], -1)
            stacked_KRP = on_prompt.transpose(0, 1).reshape(heads, -1, keys_KEP.shape[-1])
            seen_KRE = stacked_KRP @ values_KPE
            out_BKGE[part] = seen_KRE.view(heads, group.stop - group.start, -1, size).transpose(0, 1)
            out_BKGE[part] += on_own @ values_BKTE[part, :, :used]
        return out_BKGE.reshape(1, rows, -1, size)

    def _weights(
        self, score_BKGS: torch.Tensor, rows: slice, prompt: int, window: int | None, softcap: float | None
    ) -> torch.Tensor:
        """The soft-max of scores over a prompt and own tokens, in fp32; what a row does not have, or what lies before
        its window, is left out."""
        score_BKGS = score_BKGS.float()
        if softcap is not None:
            score_BKGS = softcap * torch.tanh(score_BKGS / softcap)
        last_B1 = prompt + self.counts_B[rows, None]
        place_S = torch.arange(score_BKGS.shape[-1])
        hidden_BS = place_S > last_B1
        if window is not None:
            hidden_BS |= place_S <= last_B1 - window
        if bool(hidden_BS.any()):
            score_BKGS = score_BKGS.masked_fill(hidden_BS[:, None, None].to(score_BKGS.device), -torch.inf)
        return score_BKGS.softmax(-1)

    def _places(
        self, layer: Any, key_1KBE: torch.Tensor, value_1KBE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the own tokens of all rows lie in layer `layer`; with more rows than ever before, they move."""
        _, heads, rows, size = key_1KBE.shape
        there = self._own.get(layer)
        if there is None or len(there[0]) < rows:
            keys = key_1KBE.new_empty(rows, heads, size, self.room)
            values = value_1KBE.new_zeros(rows, heads, self.room, value_1KBE.shape[-1])
            if there is not None:
                keys[: len(there[0])], values[: len(there[1])] = there
            self._own[layer] = there = keys, values
        return there

    # --- convolutions (LFM2) ------------------------------------------------------------------------------------------

    def remember_signal(self, layer: Any, signal_1TD: torch.Tensor, taps: int, layout: Layout) -> None:
        """The last values of each prompt that is read, as many as `taps` look back on; zeros before its beginning."""
        for number, (own, _) in zip(self._reading, layout.segments(), strict=True):
            padded = torch.nn.functional.pad(signal_1TD[0, own], (0, 0, taps - 1, 0))
            self._prompts[layer, number] = (padded[len(padded) - (taps - 1) :].clone(),)

    def signals(self, layer: Any, signal_1BD: torch.Tensor) -> torch.Tensor:
        """`(B, taps, D)`: the values that each row's convolution looks at, the new one last."""
        before = self._signals.get(layer, signal_1BD.new_zeros(0))
        entered = [
            self._prompts[layer, group.prompt][0]
            for group in self.groups
            for row in range(group.start, group.stop)
            if row >= len(before)
        ]
        if entered:
            before = torch.cat([*([before] if len(before) else []), torch.stack(entered)])
        seen_BQD = torch.cat([before, signal_1BD[0, :, None]], 1)
        self._signals[layer] = seen_BQD[:, 1:]
        return seen_BQD
