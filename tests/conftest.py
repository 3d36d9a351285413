"""What the tests share. `python -m pytest tests` runs them all; those that need real weights and clips skip where shared/real is absent."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # small shapes: threads cost more than they bring
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and the same for the programs that the tests start


@pytest.fixture(scope="session")
def real():
    """The folder of real weights and clips that lies beside the repository."""
    folder = ROOT.parent / "shared" / "real"
    if not folder.is_dir():
        pytest.skip("shared/real is not beside the repository: no real weights and clips")
    return folder
