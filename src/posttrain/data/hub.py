"""Data sets on the Hugging Face hub, loaded with `datasets`.

`datasets` asks a hub that it cannot reach again and again, which takes half a minute. So the hub is asked once before,
and what is neither there nor was downloaded before is said within seconds. What the hub answers otherwise (no such
split, no rights), `datasets` is left to find.
"""

from __future__ import annotations

import logging
import re
from threading import Thread
from typing import Any

from posttrain.errors import DataError

logger = logging.getLogger("posttrain")
OFFLINE = "HF_HUB_OFFLINE=1 does so without asking the hub"


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
        return datasets.load_dataset(name["path"], name["config"], split=split)
    except Exception as error:  # of a dozen kinds: no such config or split, no rights, the network
        raise DataError(
            f"{given}: no such file, and not to be had from the hub as split {split!r}: {_reason(error)}",
            hint="check the name (owner/name:config@split) and the network, or give a file",
        ) from error


def _ask_first(path: str, given: str) -> None:
    """Raises DataError where the hub does not know the data set or cannot be reached, unless it was downloaded
    before."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    error = _answer(path)
    is_unknown = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
    if error is None or (isinstance(error, HfHubHTTPError | HFValidationError) and not is_unknown):
        return
    what = "the hub has no data set of that name" if is_unknown else f"the hub cannot be reached: {_reason(error)}"
    if _is_cached(path):
        logger.warning("data     %s: %s; reading what was downloaded before (%s)", given, what, OFFLINE)
        return
    hint = "check the name (owner/name:config@split); a private one needs a token: hf auth login"
    if not is_unknown:
        hint = f"check the network, or give a file; what was downloaded before can be read ({OFFLINE})"
    raise DataError(f"{given}: no such file, and {what}", hint=hint) from error


def _answer(path: str) -> Exception | None:
    """Why the hub does not tell of the data set `path`. In a thread, for a timeout of HTTP does not hold for looking up
    the name of the server, and counts anew for each of its addresses."""
    import datasets
    from huggingface_hub import HfApi, constants

    seconds = constants.HF_HUB_ETAG_TIMEOUT
    silence = TimeoutError(f"no answer within {seconds} seconds (HF_HUB_ETAG_TIMEOUT sets how many)")
    answers: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(path, timeout=seconds, expand=["sha"])
            answers.append(None)
        except Exception as error:  # of whichever HTTP library huggingface_hub uses
            answers.append(error)

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else silence


def _is_cached(path: str) -> bool:
    """Whether `datasets` has it, which it uses where the hub fails."""
    from datasets.load import CachedDatasetModuleFactory

    try:
        CachedDatasetModuleFactory(path).get_module()
    except FileNotFoundError:
        return False
    return True


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
