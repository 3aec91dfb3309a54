"""Pictures: what is drawn is what was measured, all of it can be read, and nothing is imported before."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from pictures import svg_texts

import bench
from benches import RESULTS, ROOT, distil, kernels, step
from minidistil import plot
from minidistil.run import draw_curve

STUDENTS = {"distilled": 0.41, "same start, no teacher": 0.36, "random start, no teacher": 0.08}


def painted(panel):
    """The axes that a panel has painted on."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    panel[1](axes, 6.0)
    return axes


def bar_ends(axes):
    return [[(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in c.patches]
            for c in axes.containers if hasattr(c, "patches")]  # fmt: skip


def test_a_running_mean_has_its_points_behind():
    points = [(i, float(i % 2)) for i in range(100)] + [(100, float("nan"))]
    axes = painted(plot.lines("loss", "nats", {"loss": points}, ("teacher", 0.25), window=10))
    raw, mean, teacher = axes.lines
    assert raw.get_alpha() < 0.5 and list(raw.get_ydata()) == [y for _, y in points[:100]]
    np.testing.assert_allclose(mean.get_ydata(), np.full(91, 0.5))
    assert list(mean.get_xdata()) == list(range(9, 100)) and mean.get_color() == raw.get_color()
    assert teacher.get_ydata() == [0.25, 0.25] and teacher.get_linestyle() == "--"
    assert len(painted(plot.lines("loss", "nats", {"loss": points})).lines) == 1


def test_bars_are_as_high_as_the_middle_and_stand_together():
    series = {"eager": {"few": [1, 2, 4], "many": "out of memory"}, "ours": {"few": [5, 5, 5], "many": [6, 7, 8]},
              "Liger": {"many": [1, 1, 1]}}  # fmt: skip
    axes = painted(plot.bars("speed", "GB/s", series, dashed=("a copy", 9)))
    eager, ours, liger = bar_ends(axes)
    assert [bar[2] for bar in eager + ours + liger] == [2, 0, 5, 7, 1]
    assert eager[0][0] == pytest.approx(-ours[0][1])  # two stand around the first group's middle
    assert eager[0][1] < ours[0][0] and eager[1][1] < ours[1][0] and ours[1][1] < liger[0][0]
    errors = [c.lines[2][0].get_segments()[0][:, 1].tolist() for c in axes.containers if not hasattr(c, "patches")]
    assert errors == [[1, 4], [6, 8]]
    assert [t.get_text() for t in axes.texts] == ["2", "out of memory", "5", "7", "1"]
    assert axes.get_ylim()[1] > 9 and [t.get_text() for t in axes.get_xticklabels()] == ["few", "many"]
    assert len({c.patches[0].get_facecolor() for c in axes.containers if hasattr(c, "patches")}) == 3


def test_stacks_lie_end_to_end():
    rows = {"all": {"teacher": 3, "loss": 5}, "masked": {"loss": 2}}
    teacher, loss = bar_ends(painted(plot.stacks("phases", "ms", rows)))
    assert [bar[:2] for bar in teacher] == [(0, 3), (0, 0)] and [bar[:2] for bar in loss] == [(3, 8), (0, 2)]


def test_colours_are_each_name_s_own_and_differ():
    names = ["distilled", "undistilled", "teacher", "another", "a third"]
    chosen = plot.colours(names)
    assert len(set(chosen.values())) == 5 and chosen["distilled"] == plot.BLUE
    assert plot.colours(names[::-1])["teacher"] == chosen["teacher"]
    assert len(plot.colours(list(map(str, range(20))))) == 20


def test_the_same_data_give_the_same_bytes(tmp_path):
    for name in ("one.svg", "two.svg"):
        plot.draw(tmp_path / name, plot.lines("loss", "nats", {"a & b": [(0, 1.0), (1, 2.0)]}))
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert {"loss", "nats", "a & b", "update"} <= set(svg_texts(tmp_path / "one.svg"))
    assert len(list(tmp_path.iterdir())) == 2


def test_without_matplotlib_nothing_is_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot.draw(tmp_path / "curve.svg", plot.lines("loss", "nats", {"loss": [(0, 1.0)]}))
    said = capsys.readouterr().err
    assert said.endswith("curve.svg is not drawn, for want of matplotlib: pip install matplotlib\n")
    assert said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_matplotlib_is_imported_by_drawing_alone():
    code = "import train, finetune, bench, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- all of it can be read


def demo_rows():
    curves = {name: [[u, top1 * u / 1000, 9 - 10 * top1 * u / 1000] for u in range(0, 1001, 100)]
              for name, top1 in STUDENTS.items()}  # fmt: skip
    teacher = {"provider": "teacher", "top1": 0.437, "mlm_loss": 3.29}
    return [teacher] + [{"provider": name, "curve": curve, "seeds": 3} for name, curve in curves.items()]


def loss_rows():
    """As a GPU gives them: three shapes, five providers, one of which is out of memory."""
    shares = {"eager": 0.12, "torch.compile": 0.41, "ours": 0.97, "ours, unpadded rows": 0.88, "Liger": 0.2}
    rows = [{"case": "loss", "provider": name, "shape": dict(N=N, V=30522, labelled=labelled, dtype="bfloat16"),
             "ms": [0.95, 1.0, 1.1], "share_of_copy": share}
            for N, labelled in ((512, 1.0), (4915, 1.0), (32768, 0.15)) for name, share in shares.items()]  # fmt: skip
    return [*rows[:-5], rows[-5] | {"error": "out of memory"}, *rows[-4:]]


def step_rows():
    names = ["original's way", *step.OURS, *step.OURS_ON_GPU]
    rows = [{"provider": f"{name}, T = {T}", "shape": {"T": T}, "tokens_per_second": [9e4, 1e5 + 7e3 * i, 1.4e5]}
            for T in (512, 128) for i, name in enumerate(names)]  # fmt: skip
    phases = dict(zip(step.PHASES, (0.5, 300, 200, 250, 400, 12), strict=True))
    return [row | ({"phases": phases} if row["provider"].partition(", T")[0] in step.OURS else {}) for row in rows]


def history():
    losses = [{"step": i, "loss": 40 / i + 5, "kl": 3 / i, "ce": 9 / i + 3} for i in range(1, 2001)]
    return losses + [{"step": i, "held_out": {"top1": i / 5000, "mlm_loss": 9 - i / 400}} for i in range(0, 2001, 200)]


def of_results(name):
    rows = json.loads((RESULTS / f"{name}.json").read_text())["results"]
    return lambda path: bench.CASES[pathlib.Path(name).name].draw(path, rows)


@pytest.mark.parametrize("draw", [
    lambda path: distil.draw_demo(path, demo_rows()), lambda path: kernels.draw(path, loss_rows()),
    lambda path: step.draw(path, step_rows()),
    lambda path: draw_curve(path, history(), {"top1": 0.44, "mlm_loss": 3.3}),
    lambda path: draw_curve(path, history()[:2] + history()[-1:], None),
    *map(of_results, ("demo", "loss", "linear", "layernorm", "step", "infer", "minilm/infer", "retention")),
    of_results("temperature"),
])  # fmt: skip
def test_no_text_is_cut_off_nor_lies_on_another(draw, tmp_path, monkeypatch):
    from matplotlib.text import Text

    draw_text, places = Text.draw, {}

    def recorded(text, renderer):
        if text.get_text() and text.get_visible():
            places[text] = Text.get_window_extent(text, renderer), text.get_figure().bbox.frozen()
        draw_text(text, renderer)

    monkeypatch.setattr(Text, "draw", recorded)
    draw(tmp_path / "picture.svg")
    assert len(places) > 10
    for text, (box, whole) in places.items():
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1, text
        for other, (its, _) in places.items():
            assert text is other or not box.padded(-0.5).overlaps(its.padded(-0.5)), (text, other)
