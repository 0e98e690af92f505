"The scores are what loops over the entries give, for results with any axes; the figures carry them; what cannot be answered says why."
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from explaind_nb.influence import (accumulate, balance, granularity, importance, kernel_matrix, largest, layer_curve, outliers, plot_curves, plot_granularity,
                                   plot_matrix, plot_scores, similarity, step_curve, windows)

SIZES = dict(target=2, step=6, component=3, sample=5)


def make(keep=tuple(SIZES), seed=0):
    "A result like that of `explain`, of random numbers"
    rng = np.random.default_rng(seed)
    dims = dict(data=tuple(SIZES), decay=("target", "step", "component"), residual=("target", "step"), nodes=("step",))
    ds = xr.Dataset({k: (d := [o for o in v if o in keep], rng.normal(size=[SIZES[o] for o in d])) for k, v in dims.items()})
    return ds.assign_coords({k: np.arange(n) * 10 for k, n in SIZES.items() if k in ds.dims}).assign_attrs(step_axis="update")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("keep", [(), ("sample",), ("component", "step"), tuple(SIZES)])
@pytest.mark.parametrize("kept", [tuple(SIZES), ("target", "sample", "step", "component")])
def test_accumulate(keep, kept):
    "Signed sums, absolute sums and ratios, in the order asked for"
    r = make(kept)
    x, got = r["data"], accumulate(r, keep)
    others = [d for d in x.dims if d not in keep]
    assert got.dims == keep
    np.testing.assert_allclose(got, x.sum(others).transpose(*keep))
    np.testing.assert_allclose(got.terms, abs(x).sum(others).transpose(*keep))
    np.testing.assert_allclose(got.ratio, abs(got) / got.terms)
    np.testing.assert_allclose(got.attrs["ratio"], abs(got).sum() / abs(x).sum())


def test_order_of_kept_axes():
    "The axes come in the order asked for, values with them"
    r = make()
    np.testing.assert_array_equal(accumulate(r, ("sample", "target")), accumulate(r, ("target", "sample")).T)


def test_nothing_happened():
    "Zeros have no cancellation: ratio 1, similarity 0, balance 0"
    r = make() * 0
    assert (accumulate(r, ("component",)).ratio == 1).all() and accumulate(r).attrs["ratio"] == 1
    assert (similarity(r) == 0).all() and (balance(r).share == 0).all()


def test_full_cancellation():
    "Opposite terms: ratio 0, importance over them not"
    r = make()
    r["data"][:] = 1.
    r["data"][:, ::2] = -1.
    assert accumulate(r).ratio == 0 and (importance(r, ("component",), ("step",)) == SIZES["step"] * SIZES["target"] * SIZES["sample"]).all()


def test_importance_without_a_target_axis():
    "A single target: the absolute value of the sum"
    r = make(("step", "component"))
    np.testing.assert_allclose(importance(r), abs(r["data"].sum("step")))


def test_importance_norms():
    "The p-norm over the axes named"
    r = make()
    x = r["data"].sum(("component", "sample"))
    np.testing.assert_allclose(importance(r, ("step",), norm=2), np.sqrt((x**2).sum("target")))
    np.testing.assert_allclose(importance(r, ("step",)), abs(x).sum("target"))


def test_balance_is_bounded_and_signed():
    "The share is in [-1, 1]; without decay it is 1"
    r = make()
    assert abs(balance(r, ("component", "step")).share).max() <= 1
    r["decay"][:] = 0.
    b = balance(r)
    assert (b.share == 1).all() and (b.balance == b["data"]).all() and "data_ratio" in b.coords


@pytest.mark.parametrize("of,by", [("target", ("component",)), ("sample", ("component", "step"))])
def test_similarity(of, by):
    "Symmetric, 1 on the diagonal, blind to scale, odd under a change of sign"
    r = make()
    s = similarity(r, of, by)
    assert s.dims == (of, of + "_")
    np.testing.assert_allclose(s, s.T.values, atol=1e-12)
    np.testing.assert_allclose(np.diag(s), 1)
    scaled = r.copy(deep=True)
    scaled["data"].loc[{of: scaled[of][0]}] *= -7.
    t = similarity(scaled, of, by)
    np.testing.assert_allclose(t[0, 1:], -s[0, 1:])
    np.testing.assert_allclose(t[1:, 1:], s[1:, 1:])


def test_windows():
    "All variables with steps are summed, others stay, the last window may be short"
    r = make()
    w = windows(r, 4)
    assert list(w.step) == [0, 40] and (w.target == r.target).all()
    for k in ("data", "decay", "residual", "nodes"):
        np.testing.assert_allclose(w[k].isel(step=0), r[k].isel(step=slice(0, 4)).sum("step"))
        np.testing.assert_allclose(w[k].isel(step=1), r[k].isel(step=slice(4, 6)).sum("step"))


def test_curves():
    "Shapes, and that smoothing keeps a constant"
    r = make()
    assert set(step_curve(r)) == {"data", "decay"} and step_curve(r)["data"].dims == ("step",)
    assert layer_curve(r).dims == ("component", "step")
    r["data"][:] = 2.
    np.testing.assert_allclose(layer_curve(r, smooth=3), 2 * SIZES["target"] * SIZES["sample"])


def test_outliers():
    "A step that stands out does; a constant curve has none, whatever its length"
    x = np.random.default_rng(0).normal(size=100)
    x[30] += 20
    z = outliers(xr.DataArray(x, dims="step"))
    assert z.values.argmax() == 30 and z.values[30] > 10 and np.isfinite(z).all()
    for n in (1, 2, 50): assert (outliers(xr.DataArray(np.ones(n), dims="step")) == 0).all()


def test_largest():
    "Sorted by size, with labels and shares"
    x = make()["data"]
    table = largest(x, x.size)
    np.testing.assert_allclose(table.share.sum(), 1)
    assert (np.diff(abs(table.score)) <= 0).all()
    assert table.score[0] == x.sel({d: table[d][0] for d in x.dims})
    assert len(largest(x, 3)) == 3


def test_granularity():
    "All choices of axes, finest first; coarser is never larger"
    table = granularity(make()).set_index("keep")
    assert len(table) == 16 and table.ratio.iloc[0] == 1 and table.entries["(total)"] == 1
    assert table.ratio["target"] <= table.ratio["target × sample"]
    assert len(granularity(make(("step", "component")))) == 4


def test_what_is_missing():
    "Axes and parts that are not there are named"
    with pytest.raises(ValueError, match="no part 'penalty'"): accumulate(make(), ("step",), "penalty")
    with pytest.raises(ValueError, match="has no axis 'sample'"): kernel_matrix(make(("target", "step")))
    with pytest.raises(ValueError, match="has no axis 'sample'"): accumulate(make(), ("sample",), "decay")
    with pytest.raises(ValueError, match="no steps to gather"): windows(make(("target",)), 2)


def test_figures():
    "The artists carry the scores, the given Axes are used"
    r, ax = make(), plt.subplots()[1]
    x = accumulate(r, ("component",))
    assert plot_scores(x, ax) is ax
    np.testing.assert_allclose([b.get_width() for b in ax.patches], x)
    assert [t.get_text() for t in ax.texts] == [f"{v:.2g}" for v in x.ratio.values]
    ax = plot_matrix(kernel_matrix(r))
    np.testing.assert_allclose(np.ravel(ax.collections[0].get_array()), kernel_matrix(r).values.ravel())
    assert "|Σ| / Σ|·|" in ax.get_title(loc="left")
    ax = plot_curves(step_curve(r))
    np.testing.assert_allclose(ax.lines[1].get_ydata(), step_curve(r)["decay"])
    assert len(plot_curves(layer_curve(r)).lines) == 3
    table = granularity(r)
    np.testing.assert_allclose(sorted(b.get_width() for b in plot_granularity(table).patches), sorted(table.ratio))


def test_figures_refuse():
    "Too many axes"
    with pytest.raises(ValueError, match="draws one axis"): plot_scores(kernel_matrix(make()))
    with pytest.raises(ValueError, match="draws two axes"): plot_matrix(make()["data"])
