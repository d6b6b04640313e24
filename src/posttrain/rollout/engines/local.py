"""Sampling in the training process, on the very weights that are trained: no copy to keep in step, nothing to wait for.

Prompts are read packed, each once for its whole group; from then on a step computes one token of every row. A row that
ends leaves at once, and a waiting one takes its place. Which rows happen to share a step does not change what they say,
but for the rounding of products of another shape.

Log-probabilities are those of the whole vocabulary at the temperature, as training computes them.

Shape suffixes: `B` rows, `V` vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from posttrain.errors import ConfigError, NonFiniteError, Stopped
from posttrain.models.capabilities import learned_places
from posttrain.models.decoding import Memory
from posttrain.models.forward import Policy
from posttrain.models.head import HeadShape
from posttrain.models.lean_decoding import LeanRows, SharedRows, forward, lean_rows, lean_weights
from posttrain.models.lean_weights import LeanWeights
from posttrain.models.paged_decoding import PagedRows
from posttrain.rollout.engines import Completion, Request
from posttrain.rollout.sampling import Sampling, choose

logger = logging.getLogger("posttrain")
MAX_ROWS = 64
"""Rows of a step, where nobody says otherwise."""
READ_TOKENS = 4096
"""Tokens of prompts that are read in one forward."""
SAID_TAIL = 16
"""A stop string is looked for in the text of this many tokens more than it has characters."""


@dataclass
class _Row:
    """A completion in the making: `request` and `place` say which."""

    request: int
    place: int
    numbers: list[float]
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


class LocalEngine:
    """`end_ids` are the tokens that end a completion; `decode` turns tokens into text, for stop strings."""

    def __init__(
        self,
        policy: Policy,
        end_ids: Sequence[int],
        decode: Callable[[list[int]], str] | None = None,
        max_rows: int = MAX_ROWS,
    ):
        self.policy, self.end_ids, self.decode, self.max_rows = policy, frozenset(end_ids), decode, max_rows

        self._lean: LeanWeights | None = None
        self._is_tried = False

    @cached_property
    def places(self) -> int | None:
        """For how many tokens in a row, prompts included, the model has learned positions."""
        return learned_places(self.policy.base)

    def update_weights(self) -> None:
        """They are the same tensors; those that are laid out for decoding are laid out anew."""
        if self._lean is not None:
            self._lean.take(self.max_rows)

    def health(self) -> str | None:
        return None

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        stopped: Callable[[], bool] = lambda: False,
        landed: Callable[[int], object] = lambda count: None,
    ) -> list[list[Completion]]:
        """`landed` is told how many completions are done, whenever some are. A completion ends where the model has no
        more places. Raises ConfigError for a model that does not honour the packed layout (keys and values cannot be
        kept for it), and for prompts that it cannot read."""
        self._check(requests)
        with _sampling(self.policy):
            flight = _Flight(self, requests, sampling)
            while flight.is_flying:
                if stopped():
                    raise Stopped
                flight.admit()
                flight.step()
                if flight.landed:
                    landed(flight.landed)
                    flight.landed = 0
        if flight.num_cut:
            logger.warning("sampling %d of %d completions end early: the model has places for %d tokens, prompts "
                           "included", flight.num_cut, sum(one.count for one in requests), self.places)  # fmt: skip
        return flight.done

    def _check(self, requests: Sequence[Request]) -> None:
        if not self.policy.is_packed:
            raise ConfigError(f"{type(self.policy.base).__name__} does not honour packed sequences: completions cannot "
                              "be sampled from it in this process", hint="to train, give a rollout_func")  # fmt: skip
        name = self.policy.base.config._name_or_path or type(self.policy.base).__name__
        rows = self.policy.base.get_input_embeddings().weight.shape[0]
        for request in requests:
            if (highest := max(request.prompt_ids, default=0)) >= rows:
                raise ConfigError(f"a prompt has token {highest}, and {name} embeddings for {rows} tokens only",
                                  hint="give the tokenizer that belongs to the model")  # fmt: skip
            if self.places is not None and len(request.prompt_ids) >= self.places:
                raise ConfigError(f"a prompt has {len(request.prompt_ids)} tokens, and {name} {self.places} places: "
                                  "there is none for a completion", hint="give less to read")  # fmt: skip

    def stream(self, request: Request, sampling: Sampling) -> Iterator[int]:
        """The tokens of one completion as they are sampled, without the one that ends it; it ends early, and raises
        ConfigError, as in `generate`."""
        self._check([request])
        with _sampling(self.policy):
            flight = _Flight(self, [request], sampling)
            told = 0
            while flight.is_flying:
                flight.admit()
                flight.step()
                said = flight.rows[0].ids if flight.rows else flight.done[0][0].ids.tolist()
                for token in said[told:]:
                    if token not in self.end_ids:
                        yield token
                told = len(said)

    def lean(self) -> LeanWeights | None:
        """Weights for lean decoding, if the model is of a kind that can be decoded so."""
        if not self._is_tried:
            self._lean, self._is_tried = lean_weights(self.policy), True
            if self._lean is None:
                logger.info("sampling %s is decoded by its own forward: its layers are not of the usual kind",
                            type(self.policy.base).__name__)  # fmt: skip
            self.update_weights()
        return self._lean


class _Flight:
    """One call of `generate`: which rows are on their way, and what they have said."""

    def __init__(self, engine: LocalEngine, requests: Sequence[Request], sampling: Sampling):
        self.engine, self.requests, self.sampling = engine, requests, sampling
        self.memory = Memory(room=sampling.max_tokens)
        self.waiting: deque[tuple[int, int]] = deque(
            (number, place) for number, request in enumerate(requests) for place in range(request.count)
        )
        lean, room = engine.lean(), min(engine.max_rows, len(self.waiting))
        longest = max((len(request.prompt_ids) for request in requests), default=0) + sampling.max_tokens
        reaches = lean is not None and (lean.reach is None or longest <= lean.reach)
        self.lean = lean if reaches else None
        self.places: LeanRows | PagedRows | SharedRows = (
            SharedRows(engine.policy, self.memory) if self.lean is None else lean_rows(self.lean, self.memory, room)
        )
        self.rows: list[_Row] = []
        self.first: dict[int, torch.Tensor] = {}
        """Of each prompt that was read and that rows still wait for: the logits of the first token after it."""
        self.landed = self.num_cut = 0
        self.left = [request.count for request in requests]
        self.done: list[list[Completion]] = [[None] * request.count for request in requests]  # type: ignore[list-item]

    @property
    def is_flying(self) -> bool:
        return bool(self.rows or self.waiting)

    # --- entering -----------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Waiting rows, as many as there is room for, and the first token of each."""
        while self.waiting and len(self.rows) < self.engine.max_rows:
            entering = [self.waiting.popleft() for _ in range(min(self._room, len(self.waiting)))]
            self._read(sorted({number for number, _ in entering} - set(self.first)))
            fresh = [_Row(number, place, self._numbers(number, place)) for number, place in entering]
            logits_BV = torch.stack([self.first[row.request] for row in fresh])
            self._say(fresh, logits_BV)
            still_waited_for = {number for number, _ in self.waiting}
            for number in [number for number in self.first if number not in still_waited_for]:
                del self.first[number]
            self._enter([row for row in fresh if not self._land(row)])

    @property
    def _room(self) -> int:
        return self.engine.max_rows - len(self.rows)

    def _numbers(self, number: int, place: int) -> list[float]:
        return self.sampling.numbers(self.requests[number].key, place).tolist()

    def _enter(self, rows: list[_Row]) -> None:
        self.places.make_room(len(rows))
        for number in dict.fromkeys(row.request for row in rows):
            self.places.admit(number, sum(row.request == number for row in rows))
        self.rows += rows

    def _read(self, numbers: list[int]) -> None:
        """Prompts, as many at a time as `READ_TOKENS` allow."""
        while numbers:
            part = [numbers.pop(0)]
            total = len(self.requests[part[0]].prompt_ids)
            while numbers and total + len(self.requests[numbers[0]].prompt_ids) <= READ_TOKENS:
                total += len(self.requests[numbers[0]].prompt_ids)
                part.append(numbers.pop(0))
            prompts = [self.requests[number].prompt_ids for number in part]
            lengths = [len(prompt) for prompt in prompts]
            ids = [token for prompt in prompts for token in prompt]
            positions_T = torch.cat([torch.arange(length) for length in lengths])
            hidden_TD = forward(self.engine.policy, ids, positions_T, self.memory.reading(lengths, part))
            last = torch.tensor(lengths).cumsum(0) - 1
            for number, logits_V in zip(part, self._logits(hidden_TD[last.to(hidden_TD.device)]), strict=True):
                self.first[number] = logits_V

    # --- a step -------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One token more of every row; those that end leave."""
        if not self.rows:
            return
        hidden_BD = self.places.step([row.ids[-1] for row in self.rows])
        self._say(self.rows, self._logits(hidden_BD))
        staying = [place for place, row in enumerate(self.rows) if not self._land(row)]
        if len(staying) < len(self.rows):
            self.places.keep(staying)
            self.rows = [self.rows[place] for place in staying]
            self._forget()

    def _forget(self) -> None:
        """Prompts that nobody goes on from."""
        for number in [number for number in self.memory.lengths if not self.left[number]]:
            self.memory.forget(number)

    def _say(self, rows: list[_Row], logits_BV: torch.Tensor) -> None:
        number_B = torch.tensor([row.numbers[len(row.ids)] for row in rows], dtype=torch.float64)
        said = None
        if self.sampling.repetition_penalty != 1.0:
            said = [torch.tensor([*self.requests[row.request].prompt_ids, *row.ids]) for row in rows]
        token_B, logp_B = choose(logits_BV, number_B.to(logits_BV.device), self.sampling, said)
        logps = logp_B.tolist()
        if bad := sum(not math.isfinite(logp) for logp in logps):
            raise NonFiniteError(
                f"sampling: what the model says of the next token is no finite number in {bad} of {len(rows)} rows",
                hint="lower the learning rate, or train in fp32 (bf16=False)",
            )
        for row, token, logp in zip(rows, token_B.tolist(), logps, strict=True):
            row.ids.append(token)
            row.logps.append(logp)

    def _land(self, row: _Row) -> bool:
        """Whether it is done; if so it is put down."""
        text = self._stopped_text(row) if self.sampling.stop else None
        is_ended = text is not None or row.ids[-1] in self.engine.end_ids
        if not is_ended and len(row.ids) < self.sampling.max_tokens:
            if self._has_place(row):
                return False
            self.num_cut += 1
        logps = np.array(row.logps, dtype=np.float32)
        self.done[row.request][row.place] = Completion(np.array(row.ids, dtype=np.int64), logps, is_ended, text)
        self.left[row.request] -= 1
        self.landed += 1
        return True

    def _has_place(self, row: _Row) -> bool:
        places = self.engine.places
        return places is None or len(self.requests[row.request].prompt_ids) + len(row.ids) < places

    def _stopped_text(self, row: _Row) -> str | None:
        """What stands before a stop string, if the last token has completed one."""
        assert self.engine.decode is not None, "stop strings need a tokenizer"
        tail = self.engine.decode(row.ids[-(SAID_TAIL + max(map(len, self.sampling.stop))) :])
        if not any(stop in tail for stop in self.sampling.stop):
            return None
        text = self.engine.decode(row.ids)
        ends = [text.index(stop) for stop in self.sampling.stop if stop in text]
        return text[: min(ends)] if ends else None

    # --- the model ----------------------------------------------------------------------------------------------------

    def _logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """`(B, V)`, before the temperature."""
        head = self.engine.policy.base.get_output_embeddings()
        logits_BV = (
            torch.nn.functional.linear(hidden_BD, head.weight) if self.lean is None else self.lean.head(hidden_BD)
        )
        shape, bias = replace(self.engine.policy.shape, temperature=1.0), getattr(head, "bias", None)
        if shape != HeadShape() or (self.lean is None and bias is not None):
            logits_BV = logits_BV.float()
            shape.apply_(logits_BV, bias if self.lean is None else None)
        return logits_BV


@contextmanager
def _sampling(policy: Policy) -> Iterator[None]:
    """Evaluation mode without gradients; the mode it was in comes back."""
    was_training = policy.model.training
    policy.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        policy.model.train(was_training)
