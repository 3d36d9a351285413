"""
What the tests share. `python -m pytest tests` runs them all, a process for each core and file by file; -n 0 runs them
in one, to debug. Each can run alone. What needs real weights and clips skips where shared/real is absent.
"""
import fcntl
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # small shapes: threads cost more than they bring
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and the same for the programs that the tests start
# many a test compares bits, which are a CPU's (CUDA_VISIBLE_DEVICES=0 pytest tests/test_attention.py asks the GPU)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


from lib.cnn import import_torchvision  # noqa: E402

import_torchvision()  # before transformers and timm want it


def page(stage="align", **changes):
    """The variables of a run as page one of train.py has them for a stage, with these changes."""
    from lib.configurator import page_one
    values, stages, _ = page_one(f"{ROOT}/train.py", ("align", "sft"))
    return SimpleNamespace(**values | stages[stage] | {"stage": stage} | changes)


def clips_of(data_dir, dataset, backbone, split, max_clips=0, **settings):
    """The clips of a split, as a run with these settings has them."""
    from data import Clips
    return Clips(page(data_dir=str(data_dir), dataset=dataset, backbone=backbone, **settings), split, max_clips)


LONGEST = ("test_faults.py", "test_train.py", "test_model.py", "test_extract.py", "test_by_hand.py", "test_load.py",
           "test_readme.py", "test_tables.py", "test_variables.py", "test_choices.py", "test_walkthrough.py")


def pytest_collection_modifyitems(items):
    """The files that take longest begin, so that no process ends alone with one of them."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


# two layers of everything, a clip of seven frames or so a sign: seconds, not minutes
SMALL = ["ltn_dim=32", "ltn_heads=2", "batch_size=6", "epochs=2", "eval_clips=2", "log_every=1", "warmup=2"]


@pytest.fixture(scope="session")
def small_toy(tmp_path_factory):
    """
    A toy of 20 + 4 + 4 clips for all to copy. Of the processes that run the tests the first to come builds it; the
    others wait at its lock.
    """
    from scripts import toy
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # nothing to do where it is there already
        toy.build(str(shared / "data"), n_train=20, n_dev=4, n_test=4, text_steps=3, text_batch=8)
    return shared / "data" / "toy"


@pytest.fixture(scope="module")
def home(small_toy, tmp_path_factory):
    """A folder with a toy of 20 clips in data/, a module's own to write into."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(small_toy, home / "data" / "toy")
    for table in (home / "data" / "toy").glob("*.jsonl"):
        moved = table.read_text(encoding="utf-8").replace(f"{small_toy}/", f"{home}/data/toy/")
        table.write_text(moved, encoding="utf-8")
    return home


@pytest.fixture(scope="module")
def both_stages(home):
    """The folder of the small toy, with both stages of a run on it in out/toy."""
    import train
    how = [f"data_dir={home}/data", f"out_dir={home}/out", *SMALL, "eval_every=-1"]
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("align", "sft"):
            patch.setattr(sys, "argv", ["train.py", f"stage={stage}", *how])
            train.main()
    return home


@pytest.fixture
def train_here(home, monkeypatch):
    """(name, *args) -> train.main() in this process, a small run under out_dir=name; returns its folder out_dir/toy."""
    import train

    def run(out, *args):
        monkeypatch.setattr(sys, "argv", ["train.py", f"data_dir={home}/data", f"out_dir={home}/{out}", *SMALL, *args])
        train.main()
        return home / out / "toy"
    return run


@pytest.fixture(autouse=True)
def alone():
    """A run that ended with an error must not leave its process group or its handlers to the next test."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def real():
    """The folder of real weights and clips that lies beside the repository."""
    folder = ROOT.parent / "shared" / "real"
    if not folder.is_dir():
        pytest.skip("shared/real is not beside the repository: no real weights and clips")
    return folder


def chromium(*flags):
    """Yield a Chromium without a window, then close it. Takes some seconds to start."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install selenium)")
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("chromium or chromedriver is not installed (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "force-prefers-reduced-motion",
                 *flags):
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()
