#!/usr/bin/env python
"""Build the documentation site into _docs/ without the Quarto binary: `python tools/docs.py [folder of KaTeX]`.

nbdev's own filter turns nbs/ into _proc/ (API entries by show_doc, hidden cells, links); smalldocs renders that by the same
_quarto.yml that Quarto reads (`nbdev_docs`), with the same page names. Any warning or dead link fails the build.
Mathematics is drawn by KaTeX from a CDN; give a folder (`npm install katex@0.16.11`, then node_modules/katex/dist) to copy it
into the site, which then needs no network.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import re  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import textwrap  # noqa: E402
import warnings  # noqa: E402
from html import unescape  # noqa: E402
from pathlib import Path  # noqa: E402
from urllib.parse import unquote  # noqa: E402

from execnb.nbio import read_nb, write_nb  # noqa: E402
from nbdev.config import get_config  # noqa: E402
from nbdev.serve import proc_nbs  # noqa: E402
from smalldocs.config import load  # noqa: E402
from smalldocs.layout import KATEX  # noqa: E402
from smalldocs.site import Site  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = "(To document what is exported, the site runs every cell that holds an import: give imports a cell of their own.)"
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINKED = re.compile(r"\[(`[^`\]]+`)\]\(https?:[^)\s]*\)")
HREF = re.compile(r'\bhref="([^"]*)"')
ID = re.compile(r'\bid="([^"]*)"')


class NbdevSite(Site):
    "A site whose pages are named by nbdev's `output-file` (derivation.html from 01_derivation.ipynb), as Quarto names them"
    def read(self, src):
        page = super().read(src)
        page.out = page.out.with_name(page.front.get("output-file", page.out.name))
        return page

    def warn(self, msg):
        "Keep a warning, except the one about what `read` does"
        if not msg.endswith("output-file is not read by smalldocs"): super().warn(msg)


def filtered():
    "nbdev's filter over nbs/, into _proc/, and its warnings, shortened"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try: proc = proc_nbs(force=True, n_workers=0)
        except Exception as e: raise SystemExit(f"{str(e)[:600]}\n\n{e.__cause__!r}\n{IMPORTS}") from None
    ours = [str(o.message) for o in caught if "nbdev" in o.filename]
    return proc, [f"{textwrap.shorten(o, 200)} {IMPORTS if 'imports' in o else ''}" for o in ours]


def unlink_signatures(proc):
    "nbdev links names inside fenced signatures too, where Markdown has no links: make them names again"
    for fn in proc.rglob("*.ipynb"):
        nb = read_nb(fn)
        for data in (o["data"] for c in nb.cells for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})):
            text = "".join(data["text/markdown"])
            data["text/markdown"] = FENCED.sub(lambda m: LINKED.sub(r"\1", m[0]), text).splitlines(keepends=True)
        write_nb(nb, fn)


def edit(out, change):
    "Apply `change(text, offset)` to every page, where `offset` leads from the page back to the site's root"
    for fn in out.rglob("*.html"):
        text = fn.read_text(encoding="utf-8")
        new = change(text, "../" * (len(fn.relative_to(out).parts) - 1))
        if new != text: fn.write_text(new, encoding="utf-8")


def localise(out, base):
    "nbdev links names to the published site: make these links relative, so that a local build stays inside itself"
    edit(out, lambda text, offset: text.replace(f'<a href="{base}/', f'<a href="{offset}'))


def vendor(out, katex):
    "Copy KaTeX into the site and let the pages load it from there"
    shutil.copytree(katex, out/"site_libs"/"katex", ignore=shutil.ignore_patterns("*.mjs", "*.ttf", "*.woff", "katex.js", "katex.css"))
    edit(out, lambda text, offset: text.replace(KATEX, f"{offset}site_libs/katex"))


def dead_links(out):
    "Links between pages whose file or anchor does not exist"
    ids = {fn: set(map(unescape, ID.findall(fn.read_text(encoding="utf-8")))) for fn in out.rglob("*.html")}
    for fn in ids:
        for href in sorted(set(HREF.findall(fn.read_text(encoding="utf-8")))):
            path, _, anchor = unquote(unescape(href)).partition("#")
            if re.match(r"[a-z]+:|//", path): continue
            to = (fn.parent/path.partition("?")[0]).resolve() if path else fn
            if to.is_dir(): to = to/"index.html"
            if not to.exists() or anchor and to in ids and anchor not in ids[to]: yield f"{fn.name}: dead link {href}"


def build(katex=None):
    "Build the site; return what is wrong with it"
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    cfg = get_config(path=ROOT)
    proc, warned = filtered()
    unlink_signatures(proc)
    site = NbdevSite(load(proc), quiet=True)
    pages = site.build()
    localise(site.out, cfg.doc_host + cfg.doc_baseurl)
    if katex: vendor(site.out, katex)
    wrong = [*warned, *site.warnings, *dead_links(site.out)]
    shutil.rmtree(ROOT/cfg.doc_path.name, ignore_errors=True)
    shutil.move(site.out, ROOT/cfg.doc_path.name)
    print(f"{pages} pages in {cfg.doc_path.name}/")
    return wrong


if __name__ == "__main__":
    if wrong := build(*map(Path, sys.argv[1:2])): raise SystemExit("\n".join(["The site has faults:", *wrong]))
