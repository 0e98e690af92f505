#!/usr/bin/env python
"""Run notebooks by nbdev's rules and store their outputs: `python tools/run_notebooks.py [notebook ...]`, by default all.

What is not run keeps the outputs it has: cells with `#| eval: false`, cells that call nbdev_export, and cells with a flag of
`tst_flags` (settings.ini) unless the variable NB_FLAGS names it. The same run, without storing, is the test in nbs/conftest.py.
"""
import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
os.environ.setdefault("MPLBACKEND", "agg")

import gc  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import re  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
import warnings  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402

from execnb.nbio import write_nb  # noqa: E402
from execnb.shell import CaptureShell  # noqa: E402
from fastcore.basics import str2bool  # noqa: E402
from nbdev.clean import nbdev_clean  # noqa: E402
from nbdev.config import get_config  # noqa: E402
from nbdev.frontmatter import FrontmatterProc  # noqa: E402
from nbdev.process import NBProcessor  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
WIDGET = "application/vnd.jupyter.widget-view+json"
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class TimedOut(BaseException):
    "The notebook took too long. Not an `Exception`, so that no cell swallows it."


class CellFailed(Exception):
    "A cell raised; the message shows the cell, the line and the library's frames."


def notebooks():
    "All notebooks of the project, in reading order, the index last"
    fns = [o for o in (ROOT/get_config(path=ROOT)["nbs_path"].name).rglob("*.ipynb") if wanted(o)]
    return sorted(fns, key=lambda o: (o.name == "index.ipynb", o))


def wanted(fn):
    "Is `fn` a notebook of the project, by nbdev's rule that names with a leading _ or . are not?"
    return fn.suffix == ".ipynb" and not any(o[0] in "._" for o in fn.relative_to(ROOT).parts)


def flags_off():
    "Flags whose cells are left out: `tst_flags` without those in NB_FLAGS"
    return set(get_config(path=ROOT).tst_flags.split()) - set(os.environ.get("NB_FLAGS", "").split())


def time_limit():
    "Seconds a notebook may take; 0 is no limit"
    return float(os.environ.get("NB_TIMEOUT") or get_config(path=ROOT).get("nb_timeout", 0))


def skipped(cell, off):
    "Does nbdev leave this cell out of a run?"
    dirs = cell.directives_
    return (cell.cell_type != "code" or "nbdev_export(" in cell.source or bool(off & dirs.keys())
            or dirs.get("eval:", [""])[0].lower() == "false")


def skips_all(fn):
    "Does the front matter say `skip_exec: true`?"
    nb = NBProcessor(fn, procs=FrontmatterProc, process=True).nb
    return str2bool(nb.frontmatter_.get("skip_exec", False))


@contextmanager
def alarm(seconds):
    "Raise `TimedOut` in the running code after `seconds` (code that stays inside C notices it on return)"
    if not seconds or not hasattr(signal, "SIGALRM"): yield; return
    def ring(*_): raise TimedOut(f"the notebook's time limit of {seconds:g} s passed here (nb_timeout in settings.ini, or NB_TIMEOUT)")
    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def registries():
    "The library's module-level dicts (known optimizers, rules, ...) with copies: a notebook that defines what it exports registers its own classes"
    importlib.import_module("explaind_nb")
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == "explaind_nb"]
    return [(v, dict(v)) for m in modules for k, v in vars(m).items() if isinstance(v, dict) and not k.startswith("__")]


@contextmanager
def isolated(folder):
    "Run in `folder` with known seeds, one thread and IN_TEST set; afterwards put back what a notebook may have changed"
    import matplotlib
    import numpy as np
    import torch
    from matplotlib import pyplot as plt
    env, path, cwd, main = dict(os.environ), sys.path[:], os.getcwd(), sys.modules["__main__"]
    dtype, grad, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    os.environ["IN_TEST"] = "1"
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(ROOT)]
    torch.set_num_threads(1)
    for seed in (random.seed, np.random.seed, torch.manual_seed): seed(0)
    kept = registries()
    try:
        with matplotlib.rc_context(), warnings.catch_warnings(): yield
    finally:
        for registry, before in kept:
            registry.clear()
            registry.update(before)
        plt.close("all")
        plt.switch_backend("agg")
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        torch.set_num_threads(threads)
        os.chdir(cwd)
        sys.path[:] = path
        sys.modules["__main__"] = main
        os.environ.clear()
        os.environ.update(env)


@contextmanager
def shell():
    "An IPython shell that captures outputs, draws plain PNGs, prints no traceback itself and knows each code name's cell"
    k = CaptureShell(mpl_format="png")
    k.showtraceback = k.showsyntaxerror = lambda *args, **kwargs: None
    k.cell_of, k.now, cache = {}, None, k.compile.cache
    def named(*args, **kwargs):
        name = cache(*args, **kwargs)
        k.cell_of[name] = k.now
        return name
    k.compile.cache = named
    try: yield k
    finally:
        k.reset(new_session=False)
        type(k).clear_instance()
        gc.collect()


def run(fn, done=lambda i, outputs: None):
    "Run the notebook `fn`, calling `done` after each cell; raise `CellFailed` at the first one that fails"
    if skips_all(fn): return
    nb, off = NBProcessor(fn).nb, flags_off()
    with isolated(fn.parent), shell() as k, alarm(time_limit()):
        for i, cell in enumerate(nb.cells):
            if skipped(cell, off): continue
            k.now = i
            outputs = k.run(cell.source)
            if isinstance(k.exc, KeyboardInterrupt): raise k.exc
            if k.exc: raise CellFailed(explain_failure(nb, i, k.exc, outputs, k.cell_of)) from None
            done(i, list(outputs))


def explain_failure(nb, i, exc, outputs, cell_of):
    "What a reader needs: which cell, the marked line, the library's frames, the error, what the cell had printed"
    head = f"{type(exc).__name__} in cell {i + 1} of {len(nb.cells)}, id {nb.cells[i].get('id')}"
    printed = "".join(t for o in outputs if o["output_type"] == "stream" for t in o["text"])
    parts = [head, *chain(exc, nb, i, cell_of)]
    return "\n".join(parts + (["--- printed by the cell ---", printed[-2000:].rstrip()] if printed else []))


def chain(exc, nb, i, cell_of):
    "Describe `exc`, after the exceptions that led to it"
    before = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
    lines = [*chain(before, nb, i, cell_of), "", "and while that was handled, or because of it:"] if before else []
    frames = [o for o in traceback.walk_tb(exc.__traceback__) if o[0].f_code.co_filename != __file__]
    first = next((n for n, (f, _) in enumerate(frames) if f.f_code.co_filename in cell_of), len(frames))
    for f, line in frames[first:]: lines += frame(f.f_code, line, nb, i, cell_of)
    if isinstance(exc, SyntaxError) and first == len(frames): lines += marked(nb.cells[i].source, exc.lineno, 8)
    return lines + ["".join(traceback.format_exception_only(exc)).rstrip()]


def frame(code, line, nb, i, cell_of):
    "One frame of a traceback: the cell with its line marked, or a library's file and line"
    at = cell_of.get(code.co_filename)
    if at is not None:
        where = [] if at == i and code.co_name == "<module>" else [f"in {code.co_name}, cell {at + 1}:"]
        return where + marked(nb.cells[at].source, line, 3 if where else 8)
    fn = Path(code.co_filename)
    fn, own = (fn.relative_to(ROOT), "site-packages" not in fn.parts) if fn.is_relative_to(ROOT) else (fn, False)
    src = traceback.linecache.getline(code.co_filename, line).strip()
    return [f"in {code.co_name}, {fn}:{line}"] + ([f" ->  {src}"] if own else [])


def marked(source, line, around):
    "The lines of `source` near `line`, which gets an arrow"
    lines = list(enumerate(source.splitlines(), 1))
    near = lines if line is None else [o for o in lines if abs(o[0] - line) <= around]
    return [f"{' ->' if n == line else '   '} {s}" for n, s in near]


def stable(outputs, ids):
    "Outputs without live widgets, and with counted instead of random ids in their HTML"
    keep = [o for o in outputs if WIDGET not in o.get("data", {})]
    for o in keep:
        html = o.get("data", {}).get("text/html")
        if html: o["data"]["text/html"] = [UUID.sub(lambda m: ids.setdefault(m[0], f"id-{len(ids):04d}"), s) for s in html]
    return keep


def store(fn):
    "Run `fn` and write its new outputs, cleaned, into it"
    nb, ids = json.loads(fn.read_text(encoding="utf-8")), {}
    def done(i, outputs): nb["cells"][i]["outputs"] = stable(outputs, ids)
    run(fn, done)
    write_nb(nb, fn)
    nbdev_clean.__wrapped__(str(fn))


def main(args):
    "Store the outputs of the notebooks named, or of all"
    os.environ["TQDM_DISABLE"] = "1"  # a progress bar would store its timings
    for fn in [Path(o).resolve() for o in args] or notebooks():
        start = time.perf_counter()
        try: store(fn)
        except CellFailed as e: raise SystemExit(f"{fn.name}: {e}\n{fn.name} is left as it was.")
        print(f"{fn.name}: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__": main(sys.argv[1:])
