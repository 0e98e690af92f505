"Every test starts from the same seed and dtype, on one thread, and leaves no figure open."
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a busy machine make small matrix products far slower
os.environ.setdefault("MPLBACKEND", "agg")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh():
    "Seed torch; afterwards put back the default dtype and close figures."
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    if pyplot := sys.modules.get("matplotlib.pyplot"): pyplot.close("all")
