"""Data sets on the Hugging Face hub, loaded with `datasets`.

`datasets` asks a hub that it cannot reach again and again, which takes half a minute. So the hub is asked once before,
and what is neither there nor was downloaded before is said within seconds. What the hub answers otherwise (no such
split, no rights), `datasets` is left to find.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from posttrain.errors import DataError
from posttrain.hub import OFFLINE, answer, first_line, is_an_answer, without_retries_told

logger = logging.getLogger("posttrain")


def load_from_hub(name: re.Match[str], given: str) -> Any:
    """The `datasets.Dataset` of that `path`, `config` and `split`. Raises DataError."""
    try:
        import datasets
    except ImportError as error:
        message = f"{given}: no such file; if it is on the hub, it needs the datasets library"
        raise DataError(message, hint="pip install 'posttrain[data]'") from error
    if not datasets.config.HF_HUB_OFFLINE:
        _ask_first(name["path"], given)
    split = name["split"] or "train"
    try:
        with without_retries_told():
            return datasets.load_dataset(name["path"], name["config"], split=split)
    except Exception as error:  # of a dozen kinds: no such config or split, no rights, the network
        raise DataError(
            f"{given}: no such file, and not to be had from the hub as split {split!r}: {first_line(error)}",
            hint="check the name (owner/name:config@split) and the network, or give a file",
        ) from error


def _ask_first(path: str, given: str) -> None:
    """Raises DataError where the hub does not know the data set or cannot be reached, unless it was downloaded
    before."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    error = answer(lambda seconds: _about(path, seconds))
    is_unknown = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
    if error is None or (is_an_answer(error) and not is_unknown):
        return
    what = "the hub has no data set of that name" if is_unknown else f"the hub cannot be reached: {first_line(error)}"
    if _is_cached(path):
        logger.warning("data     %s: %s; reading what was downloaded before (%s)", given, what, OFFLINE)
        return
    hint = "check the name (owner/name:config@split); a private one needs a token: hf auth login"
    if not is_unknown:
        hint = f"check the network, or give a file; what was downloaded before can be read ({OFFLINE})"
    raise DataError(f"{given}: no such file, and {what}", hint=hint) from error


def _about(path: str, seconds: float) -> None:
    import datasets
    from huggingface_hub import HfApi

    HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(path, timeout=seconds, expand=["sha"])


def _is_cached(path: str) -> bool:
    """Whether `datasets` has it, which it uses where the hub fails."""
    from datasets.load import CachedDatasetModuleFactory

    try:
        CachedDatasetModuleFactory(path).get_module()
    except FileNotFoundError:
        return False
    return True
