"What the widgets draw is what their controls say, for every kind of result; what cannot be drawn says why."
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from test_plots import fails, make, make_outputs, texts, ticks

from explaind_nb import load, save
from explaind_nb.widgets import Panel, draw_components, draw_map, draw_progress, draw_samples, draw_window, map_scrub, scrub, select, top_pairs

ALL = "target", "step", "component", "sample"


def make_maps(p=11, places=(.1, .5, .9)):
    "Random maps in the form of `grokking.maps`"
    rng, n = np.random.default_rng(0), p // 2
    return xr.Dataset(dict(map=(("place", "layer", "sum", "sum_"), rng.uniform(-1, 1, (len(places), 2, p, p))), stripes=(("place", "layer", "frequency"), rng.uniform(0, .3, (len(places), 2, n)))),
                      coords=dict(place=list(places), start=("place", [10, 50, 90]), layer=["one", "two"], frequency=np.arange(1, n + 1)))


def move(panel, name, value):
    "Set a control; did the figure change?"
    before = panel.image.value
    panel.controls[name].value = value
    assert panel.error.value == ""
    return panel.image.value != before


@pytest.mark.parametrize("keep", [ALL, ALL[1:], ("step", "component"), ("target", "step", "component")])
@pytest.mark.parametrize("width,first", [(1, 0), (10, 40)])
@pytest.mark.parametrize("step_axis", ["update", "gradient"])
def test_window(keep, width, first, step_axis):
    r = make(keep, width=width, first=first, step_axis=step_axis)
    target = 1 if "target" in keep else None
    one = r if target is None else r.sel(target=1)
    a, b = first + 2 * width, first + 5 * width
    top, below = draw_window(r, (a, b), target)
    for bars, k in zip(top.containers, ("data", "decay")):
        want = one[k].sum([d for d in one[k].dims if d not in ("step", "component")]).sel(step=slice(a, b - 1)).sum("step")
        np.testing.assert_allclose([o.get_width() for o in bars], want, atol=1e-12)
    parts = [one[k] for k in ("data", "decay", "residual")]
    change = sum(float(o.sel(step=slice(a, b - 1)).sum()) for o in parts)
    assert f"{change:+.4g}" in top.get_title(loc="left").replace("−", "-")
    undated = float(one["initial"].sum()) + float(one["baseline"])
    for s in (a, b): assert f"{undated + sum(float(o.sel(step=slice(0, s - 1)).sum()) for o in parts):+.4g} at step {s}" in below.get_title(loc="left").replace("−", "-")
    assert below.get_xlim() == (first, first + 9 * width)


def test_window_says_how_much_cancels():
    r = make(("step", "component", "sample"))
    ax = draw_components(r, (2, 5))
    d = r["data"][2:5]
    left = abs(d.sum(("step", "sample"))) / abs(d).sum(("step", "sample"))
    assert texts(ax)[:3] == [f"{float(v):.2g}" for v in left]


def test_penalty_and_initial_have_bars():
    r = make(("step", "component"), penalty=True)
    assert len(draw_components(r).containers) == 3
    r["initial"] = ("step", "component"), np.eye(9, 3)                      # as on the update axis of a warm start
    assert len(draw_components(r).containers) == 4


def test_select():
    r = make(ALL, width=10)
    assert select(r) is r
    assert select(r, (20, 50))["step"].values.tolist() == [20, 30, 40]
    fails(["(15, 41)", "edges", "0, 10, 20, 30, ... 90"], select, r, (15, 41))
    assert "component" not in select(r, component="mlp.bias")["data"].dims
    fails(["(91, 95)", "... 90"], select, r, (91, 95)); fails(["(20, 20)"], select, r, (20, 20))
    fails(["no component 'mpl'", "embed.weight"], select, r, None, "mpl")
    fails(["'component'", "keep="], select, make(("step",)), None, "mlp.bias")


def test_samples():
    r = make(ALL)
    ax = draw_samples(r, 1, (2, 5), "mlp.weight", lambda i: f"no. {i}", k=2)
    want = r["data"].sel(target=1, component="mlp.weight").sel(step=slice(2, 4)).sum("step")
    assert ax.patches[0].get_width() == pytest.approx(float(want.max())) and ax.patches[-1].get_width() == pytest.approx(float(want.min()))
    assert ticks(ax.yaxis)[0] == f"no. {int(want.idxmax())}"
    assert "steps 2 to 5, mlp.weight" in ax.get_xlabel() and "|Σ|" in ax.get_title(loc="left")


def test_named_targets():
    r = make(ALL).assign_coords(target=["2 + 3", "4 + 1"])
    panel = top_pairs(r)
    assert [o[0] for o in panel.controls["target"].options] == ["2 + 3", "4 + 1"] and move(panel, "target", "4 + 1")
    assert "4 + 1" in draw_samples(r, "4 + 1").get_xlabel()


def test_map():
    ds = make_maps()
    left, right = draw_map(ds, .5, "two", (2, 5))
    one, off = ds.sel(place=.5, layer="two"), ~np.eye(11, dtype=bool)
    drawn = left.images[0].get_array()
    np.testing.assert_array_equal(drawn[off], one["map"].values[off])
    assert np.ma.getmaskarray(drawn).diagonal().all() or np.isnan(np.asarray(drawn)).diagonal().all()
    np.testing.assert_allclose([o.get_height() for o in right.patches], one["stripes"])
    assert right.get_title(loc="left") == f"key frequencies hold {float(one['stripes'].sel(frequency=[2, 5]).sum()):.0%}" and ticks(right.xaxis) == ["2", "5"]
    assert draw_map(ds)[1].get_title(loc="left").startswith("strongest")


@pytest.mark.parametrize("step_axis", ["update", "gradient"])
@pytest.mark.parametrize("width", [1, 10])
def test_scrub_moves(step_axis, width):
    panel = scrub(make(ALL, width=width, step_axis=step_axis))
    assert panel.controls["window"].value == (0, width)
    assert move(panel, "window", (width, 3 * width)) and move(panel, "target", 1)
    assert move(panel, "window", (9 * width, 9 * width))                     # both handles at the end: the last window
    same = panel.image.value
    assert not move(panel, "window", (8 * width, 9 * width)) and panel.image.value == same


@pytest.mark.parametrize("keep", [ALL, ("sample",), ("step", "sample"), ("component", "sample"), ("target", "sample")])
def test_top_pairs_has_a_control_for_each_axis(keep):
    panel = top_pairs(make(keep))
    assert set(panel.controls) == {dict(step="window").get(k, k) for k in keep} - {"sample"}
    values = dict(target=1, window=(3, 3), component="mlp.bias")
    for k in panel.controls: assert move(panel, k, values[k]), k
    assert isinstance(panel, Panel) and panel.image.value[:4] == b"\x89PNG"


def test_scrub_outputs():
    panel = scrub(make_outputs())
    assert list(panel.controls) == ["window", "target", "output"] and move(panel, "output", 3) and move(panel, "target", 2)


def test_map_scrub_moves():
    panel = map_scrub(make_maps(), (2, 5))
    assert move(panel, "place", .1) and move(panel, "layer", "two")


def test_saved_results(tmp_path):
    save(make(ALL), tmp_path/"r.nc"); save(make_maps(), tmp_path/"m.nc")
    assert move(scrub(load(tmp_path/"r.nc")), "window", (3, 6)) and move(top_pairs(load(tmp_path/"r.nc")), "component", "mlp.bias")
    assert move(map_scrub(load(tmp_path/"m.nc")), "place", .1)


def test_missing_axes_say_the_remedy():
    fails(["keep=", "'step'"], scrub, make(("component",)))
    fails(["keep=", "'component'"], scrub, make(("step",)))
    fails(["keep=", "'sample'"], top_pairs, make(("step", "component")))
    fails(["give target="], draw_window, make(ALL))
    fails(["sweep='frozen'"], scrub, make(("step", "component")).assign_attrs(sweep="unrolled"))


def test_an_error_while_moving_is_shown():
    panel = top_pairs(make(("target", "sample")), dict.fromkeys([int(i) for i in draw_ids(0, 1)], "x"), k=1)
    before = panel.image.value
    panel.controls["target"].value = 1
    assert "names has no entry" in panel.error.value and panel.image.value == before
    panel.controls["target"].value = 0
    assert panel.error.value == ""


def draw_ids(target, k):
    "The samples that are drawn for a target"
    x = make(("target", "sample"))["data"].sel(target=target)
    order = x["sample"].values[np.argsort(-x.values)]
    return [*order[:k], *order[-k:]]


def test_given_axes_are_used_and_panels_leave_no_figure():
    _, axs = plt.subplots(2, 2)
    r = make(("step", "component"))
    assert draw_window(r, axs=axs[0]) == (axs[0, 0], axs[0, 1]) and draw_map(make_maps(), axs=axs[1]) == (axs[1, 0], axs[1, 1])
    assert draw_progress(r, ax=axs[0, 0]) is axs[0, 0]
    n = len(plt.get_fignums())
    move(scrub(r), "window", (3, 6))
    assert len(plt.get_fignums()) == n
