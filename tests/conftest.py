import os
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def pytest_configure(config):
    """What will stop working in a later version of something fails today."""
    for kind in "DeprecationWarning", "FutureWarning":
        config.addinivalue_line("filterwarnings", f"error::{kind}")
