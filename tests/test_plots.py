"""Results: the plots show the figures that they are given, each where it belongs."""

import os
import runpy
import sys

import pytest

import finetune_medical_gpt2 as script


@pytest.fixture
def axes(monkeypatch):
    """The axes of each figure that was to be saved."""
    drawn = []
    monkeypatch.setattr(script.Figure, "savefig", lambda figure, *args, **kwargs: drawn.extend(figure.axes))
    return drawn


@pytest.mark.parametrize("in_notebook", [True, False])
def test_only_a_notebook_keeps_its_backend(monkeypatch, in_notebook):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    if in_notebook:
        monkeypatch.setitem(sys.modules, "IPython", script)  # any module
    runpy.run_path(script.__file__)
    assert ("MPLBACKEND" in os.environ) == in_notebook


HISTORY = [
    {"step": 0, "eval_loss": 3.0, "eval_answer_loss": 4.0},
    {"step": 10, "loss": 2.5},
    {"step": 20, "loss": 2.0},
    {"step": 20, "eval_loss": 1.5, "eval_answer_loss": 3.5},
]


def curves(ax):
    return {line.get_label(): line.get_xydata().tolist() for line in ax.lines}


def test_losses_stand_at_their_steps(axes):
    script.plot_training_loss(HISTORY, "plot.png", title="cost$_$data")
    assert curves(axes[0]) == {
        "training: 2.50 to 2.00": [[10, 2.5], [20, 2.0]],
        "validation: 3.00 to 1.50": [[0, 3.0], [20, 1.5]],
        "validation, answers alone: 4.00 to 3.50": [[0, 4.0], [20, 3.5]],
    }
    assert axes[0].get_title() == "cost$_$data"


def test_a_loss_that_was_not_logged_has_no_curve(axes):
    script.plot_training_loss([{"step": 10, "loss": 2.5}], "plot.png")
    script.plot_training_loss([], "plot.png")
    assert [curves(ax) for ax in axes] == [{"training: 2.50 to 2.50": [[10, 2.5]]}, {}]


BEFORE = {"answer": 40.0, "answer_ci95": [35.0, 45.0]}
AFTER = {"answer": 20.0, "answer_ci95": [18.0, 22.0]}


def test_bars_are_the_perplexities_before_and_after_the_answers_with_their_interval(axes):
    trained, everyday = {"before": 41.0, "after": 15.0}, {"before": 90.0, "after": 99.0}
    script.plot_perplexity(BEFORE, AFTER, "plot.png", trained=trained, everyday=everyday)
    (ax,) = axes
    before, after = ax.containers
    assert [bar.get_width() for bar in before] == [40.0, 41.0, 90.0]
    assert [bar.get_width() for bar in after] == [20.0, 15.0, 99.0]
    expected = ["before 40.00", "before 41.00", "before 90.00", "after 20.00", "after 15.00", "after 99.00"]
    assert [text.get_text() for text in ax.texts] == expected
    intervals = [lines.get_segments()[0] for lines in ax.collections]
    assert [ends[:, 0].tolist() for ends in intervals] == [[35.0, 45.0], [18.0, 22.0]]
    for ends, bars in zip(intervals, ax.containers, strict=True):
        assert ends[0, 1] == pytest.approx(bars[0].get_y() + bars[0].get_height() / 2)
    for tick, pair in zip(ax.get_yticks(), zip(before, after, strict=True), strict=True):
        assert tick == pytest.approx((pair[0].get_y() + pair[1].get_y() + pair[1].get_height()) / 2)
    labels = [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()]
    assert labels == ["answers, held-out articles (95% interval)", "answers, training articles", "everyday text"]


def test_without_everyday_text_there_is_no_bar_of_it(axes):
    script.plot_perplexity(BEFORE, AFTER, "plot.png")
    assert [len(bars) for bars in axes[0].containers] == [1, 1]


def test_a_users_own_style_takes_no_part(tmp_path):
    with script.matplotlib.rc_context({"text.usetex": True}):  # and there may be no LaTeX
        script.plot_training_loss(HISTORY, tmp_path / "loss.png", title="100 % of tiny_gpt2")
        script.plot_perplexity(BEFORE, AFTER, tmp_path / "perplexity.png")
        assert script.matplotlib.rcParams["text.usetex"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
