"""What every test stands on: no hub, one thread, and the sample data beside the checkout where there is any."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
