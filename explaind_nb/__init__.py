__version__ = "0.1.0"

from explaind_nb.history import History, Indexed, Recorder
from explaind_nb.kernel import explain, load, reconstruct, save, total

__all__ = ["History", "Indexed", "Recorder", "explain", "load", "reconstruct", "save", "total"]
