"""What every test stands on: no hub, one thread, and the sample data beside the checkout where there is any."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from posttrain.native.kernels import Kernels

# Before torch and transformers are imported, and inherited by the subprocesses that tests start. Tiny models gain
# nothing from a second thread, and threads that wait for one another are slow on a busy machine.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real files in the formats people have; `POSTTRAIN_SHARED_DATA` names another folder."""
    folder = Path(os.environ.get("POSTTRAIN_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no shared/data folder beside the checkout")
    return folder


@pytest.fixture(params=["bf16", "fp32"])
def each_native_dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests/native_reference.py makes and expects: the kernels are compiled for both."""
    from posttrain.native import DTYPES
    from tests import native_reference

    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    monkeypatch.setattr(native_reference, "_dtype", dtypes[request.param])


@pytest.fixture
def kernels(each_native_dtype: None) -> Kernels:
    from tests.native_reference import kernels_or_skip

    return kernels_or_skip()


@pytest.fixture(autouse=True)
def _logging_as_libraries_have_it() -> Iterator[None]:
    """The command line sets our logger up for a process of its own; a test that runs it must not do so for the next."""
    yield
    logger = logging.getLogger("posttrain")
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
    for handler in [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]:
        logger.removeHandler(handler)
