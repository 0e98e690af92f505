"""Make every notebook of this folder one test: its cells run in order, by nbdev's rules, and the first error fails it.

NB_TIMEOUT=60 changes the time limit of a notebook (nb_timeout in settings.ini), NB_FLAGS=slow runs the cells flagged `#| slow`.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"tools"))

from run_notebooks import CellFailed, run, wanted  # noqa: E402  (first: it limits the threads before torch is imported)

import pytest  # noqa: E402


def pytest_collect_file(file_path, parent):
    "Collect notebooks"
    if file_path.suffix == ".ipynb" and wanted(file_path): return Notebook.from_parent(parent, path=file_path)


class Notebook(pytest.File):
    "A notebook, which holds one test"
    def collect(self): yield Cells.from_parent(self, name="cells")


class Cells(pytest.Item):
    "All cells of a notebook"
    def runtest(self): run(self.path)

    def repr_failure(self, excinfo):
        "A failing cell explains itself; any other error is the runner's own"
        return str(excinfo.value) if excinfo.errisinstance(CellFailed) else super().repr_failure(excinfo)

    def reportinfo(self): return self.path, None, self.path.name
