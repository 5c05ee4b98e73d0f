"""Several compressors: compared on one LLM without a law, never mixed into one law, told apart by eye."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from analysis import plots
from analysis.__main__ import main
from analysis.compare import Comparison, compare
from analysis.data import load
from analysis.report import write_report
from analysis.study import Options
from analysis.style import method_look

Rows = list[dict[str, Any]]
Write = Callable[[Rows], Path]
Make = Callable[..., dict[str, Any]]
TASKS = {"count": "reasoning", "relate": "reasoning", "read": "ocr"}
LLM, N, TOWER = "mini", 104_000, 5_000_000
NAMES = (
    "pool",
    "quecc",
    "resampler",
    "qformer",
    "abstractor",
    "tokenpacker",
    "voco",
    "fastervlm",
    "llavamini",
)
NESTED = ("m3", "mqt", "mqt:keys=image")


def cell(make: Make, method: str, v: float, score: float, **more: Any) -> Rows:
    """The rows of one point; an adaptive method's mean count differs a little from task to task."""
    rows = []
    for i, (task, group) in enumerate(TASKS.items()):
        own = v if float(v).is_integer() else v + 0.01 * (i - 1)
        row = make(LLM, N, own, task, group, score + 0.02 * i)
        row |= {
            "cell_id": f"{method}-{v}",
            "compressor": method if v else "none",
            "compressor_params": 20_000,
        }
        row |= {"tower_flops": TOWER, "infer_flops": TOWER + 2 * N * (12 + own), "query_pass_flops": 0}
        rows.append({**row, **more})
    return rows


@pytest.fixture
def sweep(row: Make) -> Rows:
    """14 methods on one LLM: most at V = 1, 4 and 16, one adaptive, one at 64 alone, and a blind cell."""
    rows = cell(row, "none", 0, 0.2, tower_flops=0)
    for i, name in enumerate(NAMES):
        for v in (1, 4, 16):
            rows += cell(row, name, v, 0.30 + 0.012 * i + 0.06 * math.log(v))
    for i, name in enumerate(NESTED):
        for v in (1, 4, 16):
            rows += cell(row, name, v, 0.33 + 0.01 * i + 0.05 * math.log(v), cell_id=name)
    rows += cell(row, "prumerge", 5.37, 0.41)
    return rows + cell(row, "mlp", 64, 0.61)


def test_every_method_and_count_is_a_point(sweep: Rows, write: Write) -> None:
    (found,) = compare(load(write(sweep)).methods)
    assert (found.llm_name, found.n, found.groups) == (LLM, N, ("reasoning", "ocr"))
    assert found.methods == (*NAMES, *NESTED, "prumerge", "mlp")
    assert found.blind == pytest.approx(1 - 0.22)
    assert len(found.points) == 3 * len(NAMES + NESTED) + 2
    assert [(p.v, p.error) for p in found.points] == sorted((p.v, p.error) for p in found.points)
    for point in found.points:
        own = [
            r for r in sweep if r["compressor"] == point.method and abs(r["visual_tokens"] - point.v) < 0.1
        ]
        scores = np.array([row["score"] for row in own])
        assert len(own) == 3
        assert point.error == pytest.approx(1 - scores.mean())
        noise = 1.96 * math.sqrt((scores * (1 - scores) / 400).sum()) / 3
        assert point.interval == pytest.approx((point.error - noise, point.error + noise))
        assert point.by_group == pytest.approx({"reasoning": 1 - scores[:2].mean(), "ocr": 1 - scores[2]})
        assert point.without_tower == pytest.approx(point.infer_flops - TOWER)
        assert (point.compressor_params, point.n_items, point.seeds) == (20_000, 1200, 1)
    assert [point.v for point in found.of("mqt")] == [1, 4, 16]


def test_the_tasks_of_an_adaptive_cell_share_its_mean_count(sweep: Rows, write: Write) -> None:
    dataset = load(write(sweep))
    groups = {table.group: table for table in dataset.tables}
    assert {row["visual_tokens"] for row in sweep if row["compressor"] == "prumerge"} == {5.36, 5.37, 5.38}
    assert groups["reasoning (prumerge)"].v.tolist() == groups["ocr (prumerge)"].v.tolist()
    assert groups["ocr (prumerge)"].v == pytest.approx([5.37], abs=1e-12)
    assert not [line for line in dataset.warnings if "prumerge" in line]


def test_adaptive_counts_of_one_cell_go_by_rank(row: Make, write: Write) -> None:
    rows = cell(row, "pool", 4, 0.4)
    rows += cell(row, "ada", 2.5, 0.3, cell_id="ada") + cell(row, "ada", 7.5, 0.5, cell_id="ada")
    (found,) = compare(load(write(rows)).methods)
    assert [point.v for point in found.of("ada")] == pytest.approx([2.5, 7.5])
    # Without one of a task's counts nothing tells to which point the others belong: none is made up.
    dataset = load(write(rows[:-1]))
    assert compare(dataset.methods) == ()
    assert any("no seed has all tasks" in line for line in dataset.warnings)


def test_compressors_without_a_common_v_do_not_share_a_law(rows: Rows, write: Write) -> None:
    changed = [{**r, "compressor": "mlp"} if r["visual_tokens"] == 64 else r for r in rows]
    dataset = load(write(changed))
    groups = {table.group: set(table.v) for table in dataset.tables}
    assert groups["reasoning (quecc)"] == {1, 4, 16, 36}
    assert groups["reasoning (mlp)"] == {64}
    assert [table.group for table in dataset.methods] == ["quecc", "mlp"]


def test_pareto_best_is_what_no_other_point_beats(sweep: Rows, write: Write) -> None:
    (found,) = compare(load(write(sweep)).methods)
    for flag, price in (("best_at_v", "v"), ("best_at_flops", "infer_flops")):
        for point in found.points:
            beaten = any(
                getattr(other, price) <= getattr(point, price)
                and other.error <= point.error
                and (getattr(other, price), other.error) != (getattr(point, price), point.error)
                for other in found.points
            )
            assert getattr(point, flag) == (not beaten), (point.method, point.v, flag)


def test_methods_are_compared_on_the_tasks_that_all_have(sweep: Rows, write: Write) -> None:
    less = [r for r in sweep if not (r["compressor"] == "mlp" and r["task"] == "read")]
    dataset = load(write(less))
    (found,) = compare(dataset.methods)
    assert (found.tasks, found.groups) == (("count", "relate"), ())
    assert "methods are compared over the 2 tasks that all have: 1 more are missing for some method" in (
        dataset.warnings
    )


def test_one_task_name_in_two_groups_is_two_tasks(sweep: Rows, write: Write) -> None:
    named = [{**r, "task": "count"} if r["task"] == "read" else r for r in sweep]
    (found,) = compare(load(write(named)).methods)
    assert found.tasks == ("ocr: count", "reasoning: count", "reasoning: relate")
    assert len(found.points) == 3 * len(NAMES + NESTED) + 2


def test_one_method_trained_in_two_ways_is_two_methods(row: Make, write: Write) -> None:
    rows = cell(row, "pool", 4, 0.4, lr=1e-3) + cell(row, "pool", 4, 0.5, lr=3e-3) + cell(row, "m3", 4, 0.3)
    (found,) = compare(load(write(rows)).methods)
    assert found.methods == ("pool (0.001)", "pool (0.003)", "m3")
    assert [point.error for point in found.points] == pytest.approx([0.48, 0.58, 0.68])


def test_report_on_one_llm_compares_and_says_why_there_is_no_law(
    sweep: Rows, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([str(write(sweep)), "--out", str(out)]) == 0
    streams = capsys.readouterr()
    why = "No scaling law is fitted: every cell has the same LLM size (104k parameters)"
    assert [line.startswith(why) for line in streams.out.splitlines()].count(True) == 1
    assert len(streams.out.splitlines()) == 5
    assert len(streams.err.splitlines()) < 20
    text, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "Methods compared",
        "What this data cannot tell",
        "Reproduce",
    ]
    assert markdown.count(why) == 1
    assert [path.name for path in (out / "figures").iterdir()] == ["methods.png"]
    assert "](figures/methods.png)" in markdown
    table = [line.split(" | ") for line in markdown.splitlines() if line.startswith("| ")][2:]
    assert len(table) == 3 * len(NAMES + NESTED) + 2
    assert table[0][:2] == ["| 1", "llavamini"]
    assert [float(line[0].strip("| ")) for line in table] == [1.0] * 12 + [4.0] * 12 + [5.37] + [
        16.0
    ] * 12 + [64]
    assert "mqt:keys=image" in {line[1] for line in table}
    for token in ("nan", "NaN", "None", "inf"):
        assert not re.search(rf">[^<]*\b{token}\b[^<]*<", text), token
    result = json.loads((out / "analysis.json").read_text())
    (compared,) = result["methods"]
    assert (compared["llm_name"], compared["tasks"]) == (LLM, ["count", "read", "relate"])
    assert len(compared["points"]) == len(table)
    assert {"method", "v", "error", "interval", "infer_flops", "best_at_v"} <= compared["points"][0].keys()
    assert result["best_law"] is None


def test_report_on_several_llms_compares_and_fits_each_method(
    rows: Rows, write: Write, tmp_path: Path
) -> None:
    other = [
        {**r, "compressor": "pool", "score": 0.9 * r["score"]}
        for r in rows
        if r["visual_tokens"] and r["task"] == "read"
    ]
    lone = [{**r, "compressor": "mlp"} for r in other if r["visual_tokens"] == 64]
    mine = [r for r in rows if r["task"] == "read"]
    # A group that the paper has no numbers for, which spares drawing them.
    every = [{**r, "task_group": "reading"} for r in mine + other + lone]
    out = tmp_path / "out"
    result = write_report(write(every), out, Options(laws=("log_linear",), bootstrap=50))
    text = (out / "report.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text)[:3] == [
        "Methods compared",
        "Error against inference cost",
        "Laws",
    ]
    assert {path.name for path in (out / "figures").glob("methods*")} == {
        f"methods-{name}.png" for name in ("nano", "micro", "mini", "small")
    }
    groups = [result, *result["more_groups"]]
    assert {g["group"]: g["best_law"] for g in groups} == {
        "reading (quecc)": "log_linear",
        "reading (pool)": "log_linear",
        "reading (mlp)": None,
    }
    assert (
        "No law is fitted to reading (mlp) (4 LLM sizes and 1 token count; a law needs two of each)." in text
    )
    assert [item["llm_name"] for item in result["methods"]] == ["nano", "micro", "mini", "small"]


def test_one_compressor_is_not_compared(rows: Rows, write: Write) -> None:
    assert load(write(rows)).methods == ()
    one = [row for row in rows if row["visual_tokens"] in (0, 4) and row["llm_name"] == LLM]
    assert not load(write(one)).comparable
    # Two methods with one cell each are enough to compare.
    other = [{**row, "compressor": "pool"} for row in one if row["visual_tokens"]]
    assert load(write(one + other)).comparable


def test_the_published_table_of_methods_is_compared() -> None:
    (found,) = compare(load("paper-table1").methods)
    assert found.methods == ("TokenPacker", "M3", "MQT", "QueCC")
    assert found.tasks == ("gqa", "mmb", "pope", "vizwiz")
    assert all(math.isnan(point.infer_flops) and not point.best_at_flops for point in found.points)
    assert found.points[0].interval is None
    assert len(plots.methods_figure(found).axes) == 1


def test_no_two_of_sixteen_methods_look_the_same() -> None:
    looks = [method_look(i) for i in range(16)]
    assert len({(look["color"], look["mfc"] == "white") for look in looks}) == 16
    for fill in (True, False):  # in grey the marker still tells
        assert len({look["marker"] for look in looks if (look["mfc"] == "white") == fill}) == 8
    many = [method_look(i) for i in range(32)]
    assert len({(m["color"], m["marker"], m["mfc"], str(m["ls"])) for m in many}) == 32


def drawn(comparison: Comparison) -> tuple[Any, np.ndarray]:
    figure = plots.methods_figure(comparison)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return figure, np.asarray(canvas.buffer_rgba())


def test_the_figure_shows_every_point_once_and_in_its_column(sweep: Rows, write: Write) -> None:
    (found,) = compare(load(write(sweep)).methods)
    figure, picture = drawn(found)
    assert picture[..., :3].std() > 10
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [*found.methods, "Pareto-best", "no image"]
    by_tokens, by_flops = figure.axes
    assert by_tokens.get_xscale() == by_flops.get_xscale() == "log"
    for axes in (by_tokens, by_flops):
        marked = [line for line in axes.get_lines() if line.get_marker() not in ("None", "")]
        rings = [line for line in marked if line.get_markersize() > 10]
        points = [line for line in marked if line.get_markersize() <= 10]
        assert len(points) == len(found.methods)
        flag = "best_at_v" if axes is by_tokens else "best_at_flops"
        assert len(rings) == sum(getattr(point, flag) for point in found.points)
        low, high = axes.get_xlim()
        bottom, top = axes.get_ylim()
        for method, line in zip(found.methods, points, strict=True):
            own = found.of(method)
            x, y = line.get_xdata(), line.get_ydata()
            assert list(y) == [point.error for point in own]
            assert all(low < a < high for a in x)
            assert all(bottom < b < top for b in y)
            exact = [point.v if axes is by_tokens else point.infer_flops for point in own]
            # Within a column of its own: no nearer to another of the shared counts 1, 4 and 16.
            slack = 1.9 if axes is by_tokens and len(own) > 1 else 1 + 1e-9
            assert all(1 / slack <= a / b <= slack for a, b in zip(x, exact, strict=True))
    legend = figure.legends[0].get_window_extent()
    assert all(axes.get_window_extent().x1 <= legend.x0 for axes in figure.axes)


def test_a_figure_of_two_points_or_thirty_methods_can_be_drawn(row: Make, write: Write) -> None:
    two = cell(row, "pool", 4, 0.4) + cell(row, "m3", 4, 0.3)
    (found,) = compare(load(write(two)).methods)
    drawn(found)
    many = [line for i in range(30) for line in cell(row, f"method-{i}", 2 + i % 3, 0.3 + 0.01 * i)]
    (found,) = compare(load(write(many)).methods)
    assert found.blind is None
    drawn(found)
