"""Every figure draws what it says, and says nothing that the data do not hold."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis import figures, outlook, plots, style
from analysis.cost import FlopsCost, LatencyCost
from analysis.data import Table, load
from analysis.pooling import pool
from analysis.profile import f_deviance
from analysis.study import PAPER_ORIGIN, Options, Study, study

ALWAYS = {"cost": plots.cost_figure, "law": plots.law_figure}
DRAWN: dict[str, Callable[[Study], Figure | None]] = {
    **ALWAYS,
    "tokens": lambda item: plots.tokens_figure([item], "V*(Q)"),
    "ratio": figures.ratio_figure,
    "ridge": figures.ridge_figure,
    "residual": figures.residual_figure,
    "normal": figures.normal_figure,
    "choice": figures.choice_figure,
    "forest": figures.forest_figure,
    "design": figures.design_figure,
}
SOME = ("logit_linear", "log_linear", "regular", "power", "interaction")  # each law costs seconds to compile
QUICK = Options(laws=("logit_linear", "log_linear", "regular", "power"), bootstrap=60)


@pytest.fixture(scope="module")
def reasoning() -> Study:
    return study(load("paper-reasoning").tables[0], PAPER_ORIGIN, Options(laws=SOME, bootstrap=200))


@pytest.fixture(scope="module")
def ocr() -> Study:
    return study(load("paper-ocr").tables[0], PAPER_ORIGIN, Options(laws=SOME, bootstrap=200))


def make_table(
    n: Any, v: Any, error: Any = None, *, group: str = "made", noise: float = 0.004, **more: Any
) -> Table:
    n, v = np.asarray(n, dtype=float), np.asarray(v, dtype=float)
    if error is None:
        error = 0.6 - 0.04 * np.log(n / 1e9) - 0.015 * np.log(v)
        error = error + np.random.default_rng(3).normal(0, noise, n.size)
    unknown = np.full(n.size, np.nan)
    figures_of_a_cell = (
        *("n_items", "sampling_sd", "chance", "text_tokens", "infer_flops", "n_nonembed", "gen_tokens"),
        *("tower_flops", "compressor_flops", "query_flops", "latency_ms", "compressor_params"),
    )
    columns = dict.fromkeys(figures_of_a_cell, unknown)
    known: dict[str, Any] = {
        **columns,
        "group": group,
        "source": "made",
        "tasks": ("one",),
        "llm_name": tuple(f"llm-{x:g}" for x in n),
        "n": n,
        "v": v,
        "error": np.asarray(error, dtype=float),
        "seeds": np.ones(n.size),
    }
    return Table(**{**known, **more})


def crossed(sizes: Any, counts: Any) -> tuple[np.ndarray, np.ndarray]:
    n, v = np.meshgrid(np.asarray(sizes, dtype=float), np.asarray(counts, dtype=float), indexing="ij")
    return n.ravel(), v.ravel()


def svg_of(figure: Figure) -> str:
    text = plots.to_svg(figure, "one", "what it shows")
    ElementTree.fromstring(text)
    assert "nan" not in text.replace("dominant", "").lower()
    return text


def draw_all(item: Study) -> dict[str, Figure]:
    found = {name: draw(item) for name, draw in DRAWN.items()}
    drawn = {name: figure for name, figure in found.items() if figure is not None}
    for figure in drawn.values():
        svg_of(figure)
    return drawn


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def mesh_of(figure: Figure) -> QuadMesh:
    return next(item for item in figure.axes[0].collections if isinstance(item, QuadMesh))


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def span_of(figure: Figure, name: str) -> tuple[float, float]:
    band = next(item for item in figure.axes[0].patches if item.get_gid() == name)
    box = band.get_path().transformed(band.get_patch_transform()).get_extents()
    return float(box.x0), float(box.x1)


def test_every_figure_of_the_reasoning_set(reasoning: Study) -> None:
    assert draw_all(reasoning).keys() == DRAWN.keys() - {"forest"}


def test_every_figure_of_the_ocr_set(ocr: Study) -> None:
    """Every resample chooses the largest V there: no histogram."""
    assert draw_all(ocr).keys() == DRAWN.keys() - {"forest", "choice"}


@pytest.mark.parametrize("name", sorted(DRAWN.keys() - {"forest"}))
def test_text_is_legible_and_inside_the_figure(reasoning: Study, name: str, tmp_path: Path) -> None:
    figure = DRAWN[name](reasoning)
    assert figure is not None
    plots.to_png(figure, tmp_path / "figure.png")
    figure.canvas.draw()
    width, height = figure.bbox.width, figure.bbox.height
    # Tick labels outside an axis' limits exist but are not drawn.
    ticks = {
        id(label)
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in axis.get_ticklabels()
    }
    for text in figure.findobj(Text):
        if not text.get_text() or not text.get_visible() or id(text) in ticks:
            continue
        assert text.get_fontsize() >= 9
        box = text.get_window_extent()
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y1 <= height + 1, text


def test_every_axis_is_named(reasoning: Study) -> None:
    for name, figure in draw_all(reasoning).items():
        for axes in figure.axes:
            assert axes.get_ylabel(), name
        assert figure.axes[-1].get_xlabel() or figure.axes[0].get_xlabel(), name


def test_the_shaded_interval_is_the_profile_interval(reasoning: Study, ocr: Study) -> None:
    for item in (reasoning, ocr):
        figure, best = figures.ratio_figure(item), item.best
        assert figure is not None
        assert best is not None
        assert span_of(figure, "interval") == pytest.approx(best.profile.ends)
        # The dashed level is crossed by the best law's curve at the ends of its interval.
        curve = np.array(best.profile.curve)
        ys = [np.asarray(line.get_ydata(), dtype=float) for line in figure.axes[0].get_lines()]
        level = next(y[0] for y in ys if y.size == 2 and y[0] == y[1])
        assert np.interp(best.profile.ends, curve[:, 0], curve[:, 1]) == pytest.approx(level, abs=0.1)


def test_ratio_of_one_is_marked_only_in_sight(reasoning: Study, ocr: Study) -> None:
    near, far = figures.ratio_figure(ocr), figures.ratio_figure(reasoning)
    assert near is not None
    assert far is not None
    assert "1" in [text.get_text() for text in near.axes[0].texts]
    assert not far.axes[0].texts


def test_no_curve_no_ratio_figure(reasoning: Study) -> None:
    bare = {
        name: replace(law, profile=replace(law.profile, curve=())) for name, law in reasoning.laws.items()
    }
    assert figures.ratio_figure(replace(reasoning, laws=bare)) is None
    assert figures.ratio_figure(replace(reasoning, laws={})) is None
    one = {**bare, "log_linear": reasoning.laws["log_linear"]}
    figure = figures.ratio_figure(replace(reasoning, laws=one))
    assert figure is not None
    assert "log_linear law" in legend_of(figure)
    assert not any("other" in text for text in legend_of(figure))


def test_the_ridge_says_which_floors_are_not_rejected(reasoning: Study, ocr: Study) -> None:
    open_end, closed = figures.ridge_figure(reasoning), figures.ridge_figure(ocr)
    assert open_end is not None
    assert closed is not None
    assert "D not rejected at 95%" in legend_of(open_end)
    assert "every D shown is rejected at 95%" in legend_of(closed)
    assert len(open_end.axes) == 2
    edges = open_end.axes[0].collections[0].get_paths()[0].get_extents()
    limit = f_deviance(reasoning.laws["regular"].fit)
    kept = [row["D"] for row in reasoning.ridge if row["deviance"] <= limit]
    dropped = [row["D"] for row in reasoning.ridge if row["deviance"] > limit]
    assert edges.x0 == pytest.approx(min(kept))
    assert max(kept) <= edges.x1 <= min(dropped)
    assert figures.ridge_figure(replace(reasoning, ridge=())) is None


def test_residuals_of_every_cell_in_points_of_score(reasoning: Study) -> None:
    figure, best = figures.residual_figure(reasoning), reasoning.best
    assert figure is not None
    assert best is not None
    mesh = mesh_of(figure)
    values = np.asarray(mesh.get_array())
    assert values.shape == (4, 7)
    table = reasoning.table
    expected = 100 * (table.error - best.fit.predict(table.n, table.v))
    np.testing.assert_allclose(values.ravel(), expected, atol=1e-12)
    assert mesh.get_clim()[0] == -mesh.get_clim()[1]
    assert len(figure.axes[0].texts) == 28
    assert [x.get_text() for x in figure.axes[0].get_yticklabels()] == ["500M", "1.8B", "4B", "7B"]


def test_normal_plot_names_the_worst_cell(reasoning: Study) -> None:
    figure, best = figures.normal_figure(reasoning), reasoning.best
    assert figure is not None
    assert best is not None
    scaled = figures.standardised(best.fit)
    assert float((scaled**2).mean()) == pytest.approx(1.0, abs=0.05)
    worst = int(np.abs(scaled).argmax())
    assert worst == int(np.abs(best.fit.residuals()).argmax())
    assert "N = 1.8B, V = 4" in words(figure)
    drawn = sum(len(line.get_xdata()) for line in figure.axes[0].get_lines()[1:])
    assert drawn == 28


def test_the_choice_shows_every_resample_and_the_indifference(reasoning: Study) -> None:
    figure, best = figures.choice_figure(reasoning), reasoning.optimum
    assert figure is not None
    assert best is not None
    assert span_of(figure, "indifference") == pytest.approx(best.indifference)
    shares = next(item for item in figure.axes[0].patches if hasattr(item, "get_data")).get_data().values
    assert float(np.sum(shares)) == pytest.approx(100.0)
    assert "V* = 13.5" in legend_of(figure)
    low, high = figure.axes[0].get_xlim()
    assert low < best.indifference[0] < best.indifference[1] < high
    assert outlook.choice_figure(replace(reasoning, optimum=None)) is None


def test_resamples_in_a_corner_are_counted(reasoning: Study) -> None:
    """At a tenth of the text tokens V* falls to V = 1 in most, but not all resamples."""
    text_tokens = 3.72
    moved = study(reasoning.table, "made", replace(QUICK, cost=FlopsCost(text_tokens)))
    figure = outlook.choice_figure(moved)
    assert figure is not None
    assert any("at the least V" in text for text in words(figure))
    svg_of(figure)


def test_design_marks_measured_cells_and_the_best_buy(reasoning: Study) -> None:
    figure, plan = figures.design_figure(reasoning), reasoning.design
    assert figure is not None
    assert plan is not None
    falls = np.asarray(mesh_of(figure).get_array()).ravel()
    assert falls == pytest.approx([100 * (1 - item.ratio_left) for item in plan.candidates])
    marks = [line.get_marker() for line in figure.axes[0].get_lines()]
    assert marks.count("o") == 28
    assert marks.count("*") == 1
    best = max(plan.candidates, key=lambda item: item.gain_per_cost)
    star = figure.axes[0].get_lines()[marks.index("*")]
    sizes = sorted({item.n for item in plan.candidates})
    assert int(star.get_ydata()[0]) == sizes.index(best.n)
    assert figures.design_figure(replace(reasoning, design=None)) is None


def test_forest_of_one_llm_has_one_panel_and_a_row_a_task() -> None:
    item = study(load("paper-table1").tables[0], PAPER_ORIGIN, QUICK)
    assert item.pooled is not None
    assert draw_all(item).keys() == {"cost", "law", "forest"}
    figure = figures.forest_figure(item)
    assert figure is not None
    assert len(figure.axes) == 1
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    slopes = {task.task: task.slope_v.pooled for task in item.pooled.tasks if task.slope_v}
    assert names == sorted(slopes, key=lambda name: slopes[name])
    assert figures.forest_figure(replace(item, pooled=None)) is None
    one = replace(item.pooled, tasks=item.pooled.tasks[:1])
    assert figures.forest_figure(replace(item, pooled=one)) is None


def test_forest_of_several_llms_has_two_panels(reasoning: Study) -> None:
    n, v = crossed((5e8, 2e9), (1, 16))
    wild = make_table(n, v, [0.7, 0.5, 0.65, 0.62], group="a very long name of a benchmark, dev split ($v$)")
    more = [
        make_table(*crossed((5e8, 2e9, 7e9), (1, 4, 16)), group=f"task {i}", noise=0.01) for i in range(3)
    ]
    figure = figures.forest_figure(replace(reasoning, pooled=pool((wild, *more))))
    assert figure is not None
    assert len(figure.axes) == 2
    svg_of(figure)
    figure.canvas.draw()
    left, right = (axes.xaxis.label.get_window_extent() for axes in figure.axes)
    assert left.x1 < right.x0
    assert right.x1 <= figure.bbox.width
    # One degree of freedom makes an interval of +-12.7 standard errors: it leaves the panel as an arrow.
    assert {"<", ">"} & {line.get_marker() for line in figure.axes[1].get_lines()}


@pytest.mark.parametrize("counts", [(1, 4), (16, 64)])
def test_four_cells(counts: tuple[float, float]) -> None:
    item = study(make_table(*crossed((5e8, 2e9), counts)), "made", QUICK)
    assert {"cost", "law"} <= draw_all(item).keys()


def test_too_few_cells_for_any_law() -> None:
    item = study(make_table([1e9, 1e9], [4.0, 16.0]), "made", QUICK)
    assert item.no_fit is not None
    assert draw_all(item).keys() == ALWAYS.keys()
    assert "no law fitted" in " ".join(words(plots.law_figure(item)))
    single = study(make_table([1e9], [4.0]), "made", QUICK)
    assert draw_all(single).keys() == ALWAYS.keys()


def test_holes_are_hatched() -> None:
    n, v = crossed((5e8, 2e9, 4e9, 7e9), (1, 4, 16, 64))
    keep = np.ones(16, dtype=bool)
    keep[[2, 7, 13]] = False
    item = study(make_table(n[keep], v[keep]), "made", QUICK)
    drawn = draw_all(item)
    figure = drawn["residual"]
    values = np.ma.asarray(mesh_of(figure).get_array())
    assert values.shape == (4, 4)
    assert values.count() == 13
    assert sum(patch.get_hatch() is not None for patch in figure.axes[0].patches) == 3
    assert len(figure.axes[0].texts) == 13


def test_a_large_grid_loses_its_numbers_and_then_its_map(reasoning: Study) -> None:
    n, v = crossed(np.geomspace(1e8, 1e10, 9), np.geomspace(1, 576, 10).round(2))
    wide = study(make_table(n, v), "made", replace(QUICK, laws=("log_linear",), bootstrap=10))
    figure = figures.residual_figure(wide)
    assert figure is not None
    assert not figure.axes[0].texts
    n, v = crossed(np.geomspace(1e8, 1e10, 21), np.geomspace(1, 576, 20))
    item = study(make_table(n, v), "made", replace(QUICK, laws=("log_linear",), bootstrap=10))
    assert draw_all(item).keys() >= ALWAYS.keys()
    assert figures.residual_figure(item) is None
    assert figures.design_figure(item) is None


def test_a_loss_is_not_a_percentage() -> None:
    n, v = crossed((5e8, 2e9, 7e9), (1, 4, 16, 64))
    loss = 2.4 - 0.1 * np.log(n / 1e9) - 0.04 * np.log(v) + np.random.default_rng(0).normal(0, 0.005, n.size)
    item = study(make_table(n, v, loss, target="loss", group="held-out loss"), "made", QUICK)
    drawn = draw_all(item)
    assert drawn.keys() >= {"cost", "law", "residual", "normal", "ratio"}
    for figure in drawn.values():
        assert not any("points of score" in text or "mean score" in text for text in words(figure))
    for name in ("cost", "law"):
        assert drawn[name].axes[0].get_ylabel() == "held-out loss"
        assert not any("%" in text.get_text() for text in drawn[name].axes[0].get_yticklabels())


def test_the_cost_axis_says_what_is_charged(reasoning: Study) -> None:
    def label(cost: FlopsCost | LatencyCost) -> str:
        return str(plots.cost_figure(replace(reasoning, cost=cost)).axes[0].get_xlabel())

    assert label(FlopsCost(50)) == "inference FLOPs of the LLM, 2N(Q + V)"
    assert label(FlopsCost(50, gen_tokens=20)) == "inference FLOPs"
    assert label(FlopsCost(50, attention=True)) == "inference FLOPs"
    assert label(LatencyCost((5.0, 10.0, 0.01, 0.02), 0.1)) == "latency, ms"


def test_an_unidentified_ratio_draws_no_path(reasoning: Study) -> None:
    def unsure(item: Study) -> Study:
        hidden = {
            name: replace(law, verdict=replace(law.verdict, ratio=None, interval=None))
            for name, law in item.laws.items()
        }
        return replace(item, laws=hidden)

    assert "best by the law (95%)" in legend_of(plots.cost_figure(reasoning))
    assert "best by the law (95%)" not in legend_of(plots.cost_figure(unsure(reasoning)))
    assert plots.tokens_figure([unsure(reasoning)], "none") is None
    assert plots.tokens_figure([], "none") is None
    crossing = {name: reasoning.laws[name] for name in ("interaction", "logit_linear")}
    assert plots.tokens_figure([replace(reasoning, laws=crossing)], "not of one index") is None


def test_v_star_of_q(reasoning: Study, ocr: Study) -> None:
    figure = plots.tokens_figure([reasoning, ocr], "both")
    assert figure is not None
    assert reasoning.best is not None
    lines = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) > 1]
    x, y = (np.asarray(data, dtype=float) for data in lines[0].get_data())
    inner = (y > 1) & (y < 576)
    np.testing.assert_allclose(y[inner], x[inner] / (reasoning.best.fit.ratio - 1), rtol=1e-9)
    assert set(np.asarray(lines[1].get_ydata())) == {576.0}


def test_blind_lines(reasoning: Study) -> None:
    name = reasoning.table.llm_name[0]
    item = replace(reasoning, table=replace(reasoning.table, blind={name: 0.7}))
    for draw in ALWAYS.values():
        figure = draw(item)
        assert "no image" in legend_of(figure)
        assert figure.axes[0].get_ylim()[1] > 0.7
        assert "no image" not in legend_of(draw(reasoning))


def test_the_same_study_gives_the_same_bytes(reasoning: Study) -> None:
    for draw in DRAWN.values():
        first, second = draw(reasoning), draw(reasoning)
        assert (first is None) == (second is None)
        if first is not None and second is not None:
            assert plots.to_svg(first, "a", "b") == plots.to_svg(second, "a", "b")


def test_no_pyplot_and_no_setting_survives(reasoning: Study) -> None:
    before = dict(matplotlib.rcParams)
    figures.ratio_figure(reasoning)
    assert dict(matplotlib.rcParams) == before
    for module in (plots, figures, outlook, style):
        names = {
            alias.name
            for node in ast.walk(ast.parse(inspect.getsource(module)))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert "pyplot" not in " ".join(names)


def test_a_wide_map_stands_its_numbers_on_end() -> None:
    n, v = crossed((5e8, 1e9, 2e9, 4e9), range(1, 17))
    figure = figures.residual_figure(
        study(make_table(n, v), "made", replace(QUICK, laws=("log_linear",), bootstrap=10))
    )
    assert figure is not None
    assert {text.get_rotation() for text in figure.axes[0].texts} == {90.0}
    svg_of(figure)
