"""The widgets in a real browser: JupyterLab is started, a notebook run, the sliders moved by keyboard and mouse, the figures looked at.

To run: `apt install chromium; pip install jupyterlab playwright; NB_BROWSER=1 pytest tests/browser` (no network, about a minute).
"""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
JUPYTER = shutil.which("jupyter-lab")
MISSING = [*(["the variable NB_BROWSER=1"] if os.environ.get("NB_BROWSER") != "1" else []), *(["chromium"] if not BROWSER else []), *(["jupyterlab"] if not JUPYTER else []),
           *(["playwright"] if importlib.util.find_spec("playwright") is None else [])]
pytestmark = pytest.mark.skipif(bool(MISSING), reason="a browser test needs " + ", ".join(MISSING))

TESTS = Path(__file__).resolve().parent.parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
CELLS = [f"import sys; sys.path.insert(0, {str(TESTS)!r}); from test_widgets import make, make_maps; from explaind_nb.widgets import scrub, top_pairs, map_scrub; "
         "result = make(('target', 'step', 'component', 'sample'))",
         "scrub(result)", "top_pairs(result, lambda k: f'sample {k}')", "map_scrub(make_maps(), (2, 5))"]
SLIDER, BAR, MENU, IMAGE = ".noUi-handle", ".noUi-connect", "select", "img.widget-image"


def notebook(cells):
    "A notebook of code cells"
    code = [dict(cell_type="code", id=f"cell{i}", metadata={}, source=s, outputs=[], execution_count=None) for i, s in enumerate(cells)]
    kernel = dict(name="python3", display_name="python3", language="python")
    return json.dumps(dict(cells=code, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5))


def wait(what, seconds=60):
    "The first true value of `what()`"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what(): return found
        time.sleep(.2)
    raise TimeoutError(f"nothing after {seconds} s")


@pytest.fixture
def lab(tmp_path):
    "Start JupyterLab in a folder of its own, away from the user's settings; gives the folder and a function of the address of a notebook"
    work = tmp_path/"work"; work.mkdir()
    dirs = {k: str(tmp_path/k.lower()) for k in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    args = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", "--expose-app-in-browser", f"--ServerApp.root_dir={work}",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    (tmp_path/"jupyter_config_dir"/"labconfig").mkdir(parents=True)
    (tmp_path/"jupyter_config_dir"/"labconfig"/"page_config.json").write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])                # the kernel is this Python
    with open(tmp_path/"lab.log", "w") as log:
        server = subprocess.Popen([JUPYTER, *args], env=os.environ | dirs | dict(PATH=path), stdout=log, stderr=log)
        try:
            info = json.loads(wait(lambda: next((o for f in Path(dirs["JUPYTER_RUNTIME_DIR"]).glob("jpserver-*.json") if (o := f.read_text())), None)))
            yield work, lambda name: f"http://127.0.0.1:{info['port']}/lab/tree/{name}?token={info['token']}"
        finally:
            server.terminate()
            try: server.wait(20)
            except subprocess.TimeoutExpired: server.kill()


@pytest.fixture
def page():
    "A page of a fresh headless browser"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, headless=True, args=FLAGS)
        try: yield browser.new_page(viewport=dict(width=1100, height=1500))
        finally: browser.close()


def run_all(page, address, seconds=60):
    "Open a notebook and run all its cells"
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.wait_for_function("() => { const w = window.jupyterapp?.shell.currentWidget; return w?.sessionContext?.session?.kernel?.status === 'idle' }", timeout=60_000)
    page.evaluate("async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells') }")


def drawn(image):
    "The picture once it is there"
    image.scroll_into_view_if_needed()
    wait(lambda: image.evaluate("o => o.complete && o.naturalWidth > 0"))
    return image.screenshot()


def settled(image):
    "The picture once it no longer changes"
    source, since = None, time.monotonic()
    def still():
        nonlocal source, since
        if (now := image.get_attribute("src")) != source: source, since = now, time.monotonic()
        return time.monotonic() - since > 2
    wait(still)
    return drawn(image)


def moves(panel, act, shots=None, name=""):
    "Does the panel's figure change by `act()`?"
    image = panel.locator(IMAGE)
    before, source = settled(image), image.get_attribute("src")
    act()
    wait(lambda: image.get_attribute("src") != source)
    after = settled(image)
    if shots: (shots/f"{name}_before.png").write_bytes(before); (shots/f"{name}_after.png").write_bytes(after)
    return before != after


def key(panel, handle, name):
    "Press a key on a slider's handle"
    panel.locator(SLIDER).nth(handle).focus()
    panel.page.keyboard.press(name)


def drag(panel, dx, what=SLIDER):
    "Move the left handle of a slider, or the bar between the handles, with the mouse"
    box = panel.locator(what).first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    mouse = panel.page.mouse
    mouse.move(x, y); mouse.down(); mouse.move(x + dx / 2, y, steps=4); mouse.move(x + dx, y, steps=4); mouse.up()


def panels(page, n):
    "The panels of a notebook, in order"
    all_of = page.locator(".jp-OutputArea-output .widget-vbox", has=page.locator(IMAGE))
    wait(lambda: all_of.count() == n, 120)
    return [all_of.nth(i) for i in range(n)]


def test_figures_move(lab, page):
    work, address = lab
    (work/"widgets.ipynb").write_text(notebook(CELLS))
    run_all(page, address("widgets.ipynb"))
    scrubbed, samples, maps = panels(page, 3)
    readout = scrubbed.locator(".widget-readout")
    assert moves(scrubbed, lambda: [key(scrubbed, 1, "ArrowRight") for _ in range(3)])          # the window grows
    wait(lambda: readout.inner_text() == "0-4")
    assert moves(scrubbed, lambda: drag(scrubbed, 60, BAR))                                     # and moves as it is
    a, b = map(int, readout.inner_text().split("-"))
    assert a > 0 and b - a == 4
    dragged = settled(scrubbed.locator(IMAGE))
    assert moves(scrubbed, lambda: key(scrubbed, 1, "ArrowLeft")) and moves(scrubbed, lambda: key(scrubbed, 1, "ArrowRight"))
    assert settled(scrubbed.locator(IMAGE)) == dragged                                          # the drag ended in the figure of its last place
    assert moves(scrubbed, lambda: scrubbed.locator(MENU).first.select_option("1"))             # another target
    assert moves(samples, lambda: drag(samples, 120))                                           # by the mouse
    assert moves(samples, lambda: samples.locator(MENU).last.select_option("mlp.bias"))         # one component
    assert moves(maps, lambda: key(maps, 0, "ArrowLeft"))                                       # an earlier snapshot
    assert moves(maps, lambda: maps.locator(MENU).select_option("two"))                         # another layer
    assert not page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count()
