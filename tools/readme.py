#!/usr/bin/env python
"""Write README.md from nbs/index.ipynb: `python tools/readme.py`; with `--check`, fail if it is not up to date.

nbdev's filter removes what is hidden; nothing is executed, stored outputs are shown as text. A figure belongs in a file under
nbs/ and is shown by a Markdown image. This does the part of nbdev_readme that needs the Quarto binary.
"""
import posixpath
import re
import sys
from pathlib import Path

from nbdev.config import get_config
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, rm_export, rm_header_dash, strip_ansi

ROOT = Path(__file__).resolve().parent.parent
PROCS = [FrontmatterProc, strip_ansi, hide_line, filter_stream_, rm_header_dash, rm_export, clean_magics, hide_]
OPTION = re.compile(r"^#\|\s*([\w-]+)\s*:\s*(.*)\n?", re.MULTILINE)
LINK = re.compile(r'(\]\(|src="|href=")(?![a-z]+:|[#/])([^)"\s]+)')


def fence(text, lang=""):
    "A fenced block"
    return f"```{lang}\n{text.rstrip()}\n```"


def output(out):
    "The Markdown of one stored output; None for a stream of warnings"
    data = out.get("data", {})
    if any(o.startswith("image/") for o in data):
        raise SystemExit("index.ipynb stores a figure as cell output, which README.md cannot show. "
                         "Save it under nbs/ and show it with ![...](...).")
    if "text/markdown" in data: return "".join(data["text/markdown"])
    text = data.get("text/plain") or (out.get("text") if out.get("name") == "stdout" else None)
    return fence("".join(text)) if text else None


def code(cell):
    "The Markdown blocks of a code cell: source and outputs, as `echo`, `output` and `include` allow"
    opts = dict(OPTION.findall(cell.source))
    source = OPTION.sub("", cell.source)
    def on(key): return opts.get(key, "true").strip() != "false"
    if not on("include"): return []
    blocks = [fence(source, "python")] if on("echo") and source.strip() else []
    return blocks + ([output(o) for o in cell.outputs] if on("output") else [])


def from_root(text, folder):
    "Links relative to `folder` made relative to the project's root"
    return LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join(folder, m[2])), text)


def render():
    "README.md's text"
    cfg = get_config(path=ROOT)
    folder = cfg["nbs_path"].name
    nb = NBProcessor(ROOT/folder/cfg.readme_nb, procs=PROCS, process=True).nb
    blocks = ["<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook. -->",
              f"# {nb.frontmatter_['title']}", nb.frontmatter_.get("description")]
    for cell in nb.cells:
        if cell.cell_type == "markdown": blocks.append(from_root(cell.source.strip(), folder))
        if cell.cell_type == "code": blocks += code(cell)
    return "\n\n".join(o for o in blocks if o) + "\n"


def main(args):
    "Write README.md or check it"
    fn, text = ROOT/"README.md", render()
    if "--check" not in args: fn.write_text(text, encoding="utf-8")
    elif not fn.exists() or fn.read_text(encoding="utf-8") != text:
        raise SystemExit("README.md is not what nbs/index.ipynb gives. Run python tools/readme.py.")


if __name__ == "__main__": main(sys.argv[1:])
