"""What the tests share. `python -m pytest tests` runs them all; those that need real weights and clips skip where shared/real is absent."""
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, and for the programs that the tests start
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

torch.set_num_threads(1)  # small shapes: threads cost more than they bring


@pytest.fixture(scope="session")
def root():
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def real():
    """The folder of real weights and clips that lies beside the repository."""
    folder = ROOT.parent / "shared" / "real"
    if not folder.is_dir():
        pytest.skip("shared/real is not beside the repository: no real weights and clips")
    return folder
