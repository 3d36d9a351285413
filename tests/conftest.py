"""What the tests share. `python -m pytest tests` runs them all; those that need real weights and clips skip where shared/real is absent."""
import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # small shapes: threads cost more than they bring
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and the same for the programs that the tests start


def import_torchvision():
    """
    PyPI's torchvision is built for a torch with CUDA. On a CPU torch its library of operators cannot be loaded, and its import fails at the first that it
    wants to describe; none of them is needed here. Declared before anything imports it: transformers and timm would fail with it.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for op in ("nms", "qnms"):
            torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # what the failed import left behind
        importlib.import_module("torchvision")


if importlib.util.find_spec("torchvision"):
    import_torchvision()


@pytest.fixture(scope="session")
def real():
    """The folder of real weights and clips that lies beside the repository."""
    folder = ROOT.parent / "shared" / "real"
    if not folder.is_dir():
        pytest.skip("shared/real is not beside the repository: no real weights and clips")
    return folder
