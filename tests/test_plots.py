"The artists carry the right numbers, the given Axes are used, and what cannot be drawn says why."
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import Normalize, SymLogNorm, to_rgba

from explaind_nb.kernel import total
from explaind_nb.plots import COLORS, account, cancellation, heatmap, top_samples, trajectory, waterfall

SIZES = dict(target=2, step=9, component=3, sample=7)
FIGURES = waterfall, heatmap, top_samples, trajectory


def make(keep=("step", "component", "sample"), seed=0, step_axis="update", initial=0., width=1, first=0, penalty=False):
    "A result like that of `explain`, of random numbers that add up"
    rng = np.random.default_rng(seed)
    dims = dict(data=tuple(SIZES), decay=("target", "step", "component"), initial=("target", "component"),
                **{k: ("target", "step") for k in ("quadrature", "rounding", "replay")})
    if penalty: dims["penalty"] = dims["decay"]
    size = dict(data=1., decay=1., penalty=1., initial=initial, quadrature=1e-2, rounding=1e-6, replay=1e-7)
    kept = {k: [d for d in v if d in keep] for k, v in dims.items()}
    ds = xr.Dataset({k: (v, size[k] * rng.normal(size=[SIZES[d] for d in v])) for k, v in kept.items()})
    ds["residual"] = ds["quadrature"] + ds["rounding"] + ds["replay"]
    only = [d for d in ("target",) if d in keep]
    ds["baseline"] = (only, rng.normal(size=[SIZES[d] for d in only]))
    parts = ["data", "decay", "initial", "residual"] + ["penalty"] * penalty
    ds["prediction"] = ds["baseline"] + sum(ds[k].sum([d for d in ds[k].dims if d not in only]) for k in parts)
    labels = dict(target=np.arange(2), component=["embed.weight", "mlp.weight", "mlp.bias"], sample=np.arange(7) * 10)
    ds = ds.assign_coords({k: v for k, v in labels.items() if k in ds.dims})
    if "step" in ds.dims: ds = ds.assign_coords(step=first + width * np.arange(9), lr=("step", np.full(9, 1e-3)))
    ds.attrs.update(step_axis=step_axis, nodes_total=18, nodes_per_step=2., start=first, stop=first + 9 * width)
    return ds


def make_outputs(steps=6):
    "A result like that of `reconstruct`: three points, four classes"
    rng = np.random.default_rng(1)
    axes = ["target", "output"]
    ds = xr.Dataset({k: (["step", "component", *axes], rng.normal(size=(steps, 2, 3, 4))) for k in ("data", "decay")})
    ds["residual"] = (["step", *axes], 1e-2 * rng.normal(size=(steps, 3, 4)))
    ds["baseline"] = (axes, rng.normal(size=(3, 4)))
    ds["prediction"] = ds.baseline + (ds.data + ds.decay).sum(("step", "component")) + ds.residual.sum("step")
    ds.attrs.update(step_axis="update", stop=steps)
    return ds.assign_coords(step=np.arange(steps), component=["a", "b"])


def texts(ax): return [o.get_text().replace("−", "-") for o in ax.texts]


def ticks(axis): return [o.get_text() for o in axis.get_ticklabels()]


def line(ax, label): return next(o for o in ax.lines if o.get_label() == label).get_ydata()


def fails(words, f, *args, **kw):
    with pytest.raises(ValueError) as e: f(*args, **kw)
    for w in words: assert w in str(e.value), (w, str(e.value))


def test_waterfall_bars_are_the_parts():
    r = make()
    ax = waterfall(r)
    values = [float(r[k].sum()) for k in ("baseline", "data", "decay", "residual", "prediction")]
    assert ticks(ax.xaxis) == ["baseline", "data", "decay", "residual", "prediction"]     # initial is 0
    np.testing.assert_allclose([b.get_height() for b in ax.patches], values)
    ends = np.cumsum(values[:-1])
    np.testing.assert_allclose([b.get_y() for b in ax.patches], [0, *ends[:-1], 0], atol=1e-12)
    np.testing.assert_allclose(ends[-1], values[-1])
    assert texts(ax) == [f"{v:+.4g}" for v in values]
    assert [b.get_facecolor() for b in ax.patches] == [to_rgba(COLORS[k]) for k in ticks(ax.xaxis)]


def test_waterfall_shows_every_part_there_is():
    ax = waterfall(make(initial=.1, penalty=True))
    assert ticks(ax.xaxis) == ["baseline", "data", "decay", "penalty", "initial", "residual", "prediction"]
    assert waterfall(make(keep=())).patches[1].get_height() == make(keep=()).data.item()


def test_waterfall_prints_a_residual_too_small_to_see():
    r = make()
    for k in ("quadrature", "rounding", "replay", "residual"): r[k] *= 1e-12
    r["residual"][:] = 0.
    r["residual"][0] = -2.5e-13
    assert texts(waterfall(r))[3] == "-2.5e-13"
    r["prediction"] = r["baseline"]                                                       # no change, no share of it
    assert "of which" not in waterfall(r).get_title(loc="left")


@pytest.mark.parametrize("sign", (1, -1))
def test_waterfall_numbers_stand_away_from_zero(sign):
    r = make(keep=())
    for k, v in dict(baseline=5., data=3., decay=-1., residual=.1, prediction=7.1).items(): r[k] = sign * v
    ax = waterfall(r)
    assert {o.get_va() for o in ax.texts} == {"bottom" if sign > 0 else "top"}
    assert [o.xy[1] for o in ax.texts] == pytest.approx([sign * v for v in (5, 8, 8, 7.1, 7.1)])


@pytest.mark.parametrize("part", ("data", "decay", "penalty"))
def test_heatmap_is_the_part(part):
    r = make(penalty=True)
    ax = heatmap(r, part)
    x = r[part].sum("sample") if part == "data" else r[part]
    np.testing.assert_allclose(ax.collections[0].get_array(), x.transpose("component", "step"))
    assert ticks(ax.yaxis) == list(r.component.values)
    assert ax.get_xlim() == (0, 9) and ax.yaxis_inverted()
    assert "change of the target" in ax.figure.axes[1].get_ylabel()
    norm = ax.collections[0].norm
    assert norm.vmin == -norm.vmax and norm(0.) == pytest.approx(.5)


@pytest.mark.parametrize("bins, edges", ((3, [0, 3, 6, 9]), (4, [0, 3, 6, 9]), (5, [0, 2, 4, 6, 8, 9]), (1, [0, 9]), (100, range(10))))
def test_heatmap_gathers_steps_and_loses_nothing(bins, edges):
    r = make()
    mesh = heatmap(r, bins=bins).collections[0]
    assert mesh.get_array().shape == (3, len(edges) - 1)
    np.testing.assert_allclose(mesh.get_array().sum(1), r.data.sum(("step", "sample")))
    np.testing.assert_allclose(mesh._coordinates[0, :, 0], list(edges))


def test_heatmap_of_a_long_run_has_at_most_200_bins():
    x = np.random.default_rng(0).normal(size=(2001, 2))
    r = xr.Dataset({"data": (("step", "component"), x)}, dict(step=np.arange(2001), component=["a", "b"]))
    ax = heatmap(r)
    assert ax.collections[0].get_array().shape[1] == 182                                  # 11 steps each
    assert ax.get_xlim() == (0, 2001)
    assert "per 11 steps" in ax.figure.axes[1].get_ylabel()


def test_heatmap_of_a_window_of_windows():
    r = make(first=100, width=5)
    assert heatmap(r).get_xlim() == (100, 145)
    assert "per 5 steps" in heatmap(r).figure.axes[1].get_ylabel()


def test_heatmap_colours():
    r = make()
    assert type(heatmap(r).collections[0].norm) is Normalize
    r["data"][0] *= 1000
    norm = heatmap(r).collections[0].norm
    assert isinstance(norm, SymLogNorm) and norm.vmax == abs(r.data.sum("sample")).max()
    r["data"][:] = 0.
    assert not heatmap(r).collections[0].get_array().any()                                # and does not fail


def test_heatmap_thins_the_labels_of_many_components():
    x = np.ones((3, 500))
    r = xr.Dataset({"data": (("step", "component"), x)}, dict(step=np.arange(3), component=[f"u{i}" for i in range(500)]))
    ax = heatmap(r)
    assert len(ax.get_yticks()) <= 40 and all(ticks(ax.yaxis)[i] == f"u{int(y)}" for i, y in enumerate(ax.get_yticks()))


def test_top_samples_are_the_extremes():
    r = make()
    r["data"][:] = 0.
    r["data"][3, 1] = [1., -4., 0., 2., -1., 3., -2.]
    ax = top_samples(r, k=2)
    assert [b.get_width() for b in ax.patches] == [3, 2, -2, -4]
    assert ticks(ax.yaxis) == ["50", "30", "60", "10"] and ax.yaxis_inverted()
    title = ax.get_title(loc="left").replace("−", "-")
    assert "4 of 7 samples hold -1 of the sum -1 (100%)" in title and "= 0.077 over the samples, 1 within them" in title
    assert "not a what-if" in ax.get_xlabel()
    assert [b.get_width() for b in top_samples(r, k=9).patches] == [3, 2, 1, -1, -2, -4]    # a sample of 0 is no bar


def test_top_samples_of_one_sign_or_none():
    r = make()
    r["data"] = abs(r["data"])
    ax = top_samples(r, k=3)
    assert len(ax.patches) == 3 and min(b.get_width() for b in ax.patches) > 0
    assert "= 1 over the samples" in ax.get_title(loc="left")
    r["data"] = 0. * r["data"]
    assert "the sum of all is 0" in top_samples(r).get_title(loc="left")


def test_top_samples_names():
    r = make()
    ids = ticks(top_samples(r).yaxis)
    for names in (lambda i: f"n{i}", {i: f"n{i}" for i in range(0, 70, 10)}, [f"n{i}" for i in range(61)]):
        assert ticks(top_samples(r, names=names).yaxis) == [f"n{i}" for i in ids]
    fails(("no entry for sample", "every sample id"), top_samples, r, names={1: "one"})
    groups = r.assign_coords(sample=list("abcdefg"))
    assert set(ticks(top_samples(groups).yaxis)) <= set("abcdefg")
    fails(("no entry for sample",), top_samples, groups, names=["one"])


def test_trajectory_accumulates():
    r = make(penalty=True)
    ax = trajectory(r)
    parts = {k: np.r_[0, r[k].sum([d for d in r[k].dims if d != "step"]).cumsum()]
             for k in ("data", "decay", "penalty", "residual")}
    for k, v in parts.items(): np.testing.assert_allclose(line(ax, k), v, atol=1e-12)
    truth = line(ax, r"true $f(\theta_s)$")
    np.testing.assert_allclose(truth, r.baseline.item() + sum(parts.values()))
    np.testing.assert_allclose(truth[[0, -1]], [r.baseline, r.prediction])
    np.testing.assert_allclose(line(ax, "without residual"), truth - parts["residual"])
    assert list(ax.lines[1].get_xdata()) == list(range(10))


def test_trajectory_of_the_gradient_axis_is_not_called_the_truth():
    ax = trajectory(make(step_axis="gradient"))
    assert line(ax, "all parts")[-1] == pytest.approx(make().prediction.item())
    assert "seen" in ax.get_xlabel() and "moved" in trajectory(make()).get_xlabel()
    ax = trajectory(make(initial=.1))                                                     # a warm state's part, undated
    assert line(ax, "all parts")[-1] == pytest.approx(make(initial=.1).prediction.item())
    assert len(set(line(ax, "initial"))) == 1


def test_trajectory_lays_true_values_over():
    for truth in ({8: 2., 0: 1.}, [(0, 1.), (8, 2.)]):
        dots = trajectory(make(), truth).lines[-1]
        assert dots.get_xdata().tolist() == [0, 8] and dots.get_ydata().tolist() == [1, 2]
    assert trajectory(make(first=100, width=5)).lines[1].get_xdata().tolist() == list(range(100, 150, 5))


@pytest.mark.parametrize("figure", FIGURES)
def test_axes_given_are_used(figure):
    fig, ax = plt.subplots()
    before = plt.get_fignums()
    assert figure(make(), ax=ax) is ax and ax.has_data()
    assert plt.get_fignums() == before
    assert figure(make()).figure is not fig


@pytest.mark.parametrize("figure", (*FIGURES, account))
def test_one_target_at_a_time(figure):
    keep = ("target", "step", "component", "sample")
    r = make(keep)
    fails(("2 targets (0, 1)", "target=one of them", "result.mean('target')"), figure, r)
    fails(("no target 5", "2 targets (0, 1)"), figure, r, target=5)
    fails(("no target 'cat'",), figure, r, target="cat")
    fails(("single target", "leave out"), figure, make(), target=0)
    figure(r.isel(target=[1]))                                                            # only one: no question
    figure(r.mean("target"))
    figure(r.assign_coords(target=["cat", "dog"]), target="dog")


def test_the_target_drawn_is_the_one_asked_for():
    r = make(("target", "step", "component", "sample"))
    for t in (0, 1):
        assert waterfall(r, t).patches[-1].get_height() == r.prediction[t]
        np.testing.assert_allclose(heatmap(r, target=t).collections[0].get_array(), r.data[t].sum("sample").T)
        most = r.data[t].sum(("step", "component")).max().item()
        assert max(b.get_width() for b in top_samples(r, t).patches) == pytest.approx(most)
        assert line(trajectory(r, target=t), r"true $f(\theta_s)$")[-1] == pytest.approx(r.prediction[t].item())
        assert f"{r.prediction[t].item():+.6g}" in account(r, t)


def test_outputs_of_reconstruct():
    r = make_outputs()
    words = "3 targets (0, 1, 2) x 4 outputs (0, 1, 2, 3)", "target=(target, output)", "result.mean(['target', 'output'])"
    fails(words, waterfall, r)
    fails(("target=(target, output)",), waterfall, r, target=1)
    fails(("no output 4",), waterfall, r, target=(1, 4))
    assert waterfall(r, (2, 3)).patches[-1].get_height() == r.prediction[2, 3]
    assert line(trajectory(r, target=(1, 0)), r"true $f(\theta_s)$")[-1] == pytest.approx(r.prediction[1, 0].item())
    np.testing.assert_allclose(heatmap(r, target=(0, 1)).collections[0].get_array(), r.data[:, :, 0, 1].T)
    assert "quadrature" not in account(r, (0, 0))
    fails(("no axis 'sample'", "keep="), top_samples, r, (0, 0))
    waterfall(r.mean(["target", "output"]))


def test_missing_axes_name_the_remedy():
    fails(("data", "no axis 'step'", "keep= containing 'step'"), heatmap, make(("component", "sample")))
    fails(("no axis 'component'", "keep= containing 'component'"), heatmap, make(("step", "sample")))
    fails(("no axis 'sample'", "keep= containing 'sample'"), top_samples, make(("step",)))
    fails(("no axis 'step'", "keep= containing 'step'"), trajectory, make(("component",)))
    fails(("residual", "no axis 'component'", "choose a part"), heatmap, make(), "residual")
    fails(("no part 'penalty'", "'decay'"), heatmap, make(), "penalty")
    fails(("no part 'step'",), heatmap, make(), "step")


def test_an_error_leaves_no_figure_behind():
    before = plt.get_fignums()
    for figure in FIGURES:
        with pytest.raises(ValueError): figure(make(), target=3)
    for figure in (heatmap, top_samples, trajectory):
        with pytest.raises(ValueError): figure(make(()))
    assert plt.get_fignums() == before


def test_account_adds_up():
    r = make(initial=.1, penalty=True)
    text = account(r)
    rows = {o.split()[0]: float(o.split()[1]) for o in text.splitlines()[1:-1]}
    parts = ["baseline", "data", "decay", "penalty", "initial", "residual", "quadrature", "rounding", "replay", "prediction"]
    assert list(rows) == parts
    for k, v in rows.items(): assert v == pytest.approx(r[k].sum().item(), rel=1e-5)
    assert "18 nodes, 2.00 per step" in text and "of the largest" in text
    assert text.splitlines()[-1].split("add up to within ")[1].startswith(("0", "1e-16", "2e-16", "3e-16", "4e-16"))
    assert isinstance(text, str) and repr(text) == str(text) and text._repr_html_().startswith("<pre>")


def test_account_shows_what_is_missing():
    r = make()
    r["prediction"] = r["prediction"] + 1e3
    assert float(account(r).split("add up to within ")[1].split()[0]) == pytest.approx(1., rel=.2)
    r["prediction"] = r["baseline"]
    assert "%" not in account(r)


@pytest.mark.parametrize("plot", [waterfall, trajectory, account, total])
def test_derivatives_do_not_add_up(plot):
    with pytest.raises(ValueError, match="do not add up.*heatmap"): plot(xr.Dataset(attrs=dict(sweep="unrolled")))


def test_derivatives_are_called_so():
    r = make().assign_attrs(sweep="unrolled")
    ax = top_samples(r)
    assert "derivative" in ax.get_xlabel() and "what-if" not in ax.get_xlabel() and "of the absolute sum" in ax.get_title(loc="left")
    assert "derivative" in heatmap(r).collections[0].colorbar.ax.get_ylabel()


def test_targets_that_were_summed_are_counted():
    r = make().assign_attrs(summed_targets=30)
    assert "of the sum of 30 targets" in account(r) and "the sum of 30 targets" in waterfall(r).get_ylabel() and "the sum of 30 targets" in top_samples(r).get_xlabel()
    assert "sum of" not in account(make())


def ratio(x, shown=None):
    "|Σ| / Σ|·| as it is written; of the terms x, or of what is shown of them."
    return f"{(x.sum() if shown is None else shown).__abs__().sum().item() / abs(x).sum().item():.2g}"


def test_cancellation():
    x = np.random.default_rng(0).normal(size=(3, 5))
    assert cancellation(-2., 8.) == .25 and cancellation(0., 0.) == 1
    np.testing.assert_allclose(cancellation(x.sum(1), abs(x).sum(1)), [abs(sum(o)) / sum(map(abs, o)) for o in x])
    x = xr.DataArray(x, dims=("a", "b"))
    assert cancellation(x.sum("b"), abs(x).sum("b")).dims == ("a",)


def test_signed_sums_are_shown_with_what_cancels():
    r = make(penalty=True)
    title = lambda ax: ax.get_title(loc="left")
    for part in ("data", "decay", "penalty"):
        x = r[part]
        for bins in (None, 3):
            ax = heatmap(r, part, bins=bins)
            assert f"= {ratio(x)} over the map, {ratio(x, ax.collections[0].get_array())} within its cells" in title(ax)
    by_sample = r.data.sum(("step", "component"))
    assert f"= {ratio(by_sample)} over the samples, {ratio(r.data, by_sample)} within them" in title(top_samples(r))
    legend = [o.get_text() for o in trajectory(r).get_legend().get_texts()]
    rows = {o.split()[0]: o.split()[-1] for o in account(r).splitlines()[1:-1]}
    for k in ("data", "decay", "penalty", "residual"):
        assert f"{k} ({ratio(r[k])})" in legend and rows[k] == ratio(r[k]) and f"{k} {ratio(r[k])}" in waterfall(r).get_xlabel()


def test_no_ratio_of_a_single_term():
    r = make(keep=())
    assert waterfall(r).get_xlabel() == "" and all(len(o.split()) < 4 for o in account(r).splitlines()[1:-1])
    r = make()
    r["decay"][:] = 0.
    assert "decay" not in waterfall(r).get_xlabel() and "within its cells" in heatmap(r, "decay").get_title(loc="left")
