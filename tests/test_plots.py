"""Results: the plots show the figures that they are given, each where it belongs."""

import pytest

import finetune_medical_gpt2 as script


@pytest.fixture
def axes(monkeypatch):
    """The axes of each figure that was to be saved."""
    drawn = []
    monkeypatch.setattr(script.Figure, "savefig", lambda figure, *args, **kwargs: drawn.extend(figure.axes))
    return drawn


HISTORY = [
    {"step": 0, "eval_loss": 3.0, "eval_answer_loss": 4.0},
    {"step": 10, "loss": 2.5},
    {"step": 20, "loss": 2.0},
    {"step": 20, "eval_loss": 1.5, "eval_answer_loss": 3.5},
]


def curves(ax):
    return {line.get_label(): line.get_xydata().tolist() for line in ax.lines}


def test_losses_stand_at_their_steps_and_the_training_loss_in_the_middle_of_its_window(axes):
    script.plot_training_loss(HISTORY, "plot.png", title="cost$_$data", loss_on="all tokens")
    assert curves(axes[0]) == {
        "validation, answers only: 4.00 to 3.50": [[0, 4.0], [20, 3.5]],
        "validation, all tokens: 3.00 to 1.50": [[0, 3.0], [20, 1.5]],
        "training, all tokens: 2.50 to 2.00": [[5, 2.5], [15, 2.0]],
    }
    assert axes[0].get_title() == "cost$_$data"


def test_the_answers_curve_is_not_drawn_twice_where_the_loss_is_on_them(axes):
    script.plot_training_loss(HISTORY, "plot.png", loss_on="the answers only")
    assert list(curves(axes[0])) == [
        "validation, the answers only: 3.00 to 1.50",
        "training, the answers only: 2.50 to 2.00",
    ]


def test_bars_are_the_perplexities_before_and_after_the_answers_with_their_interval(axes):
    before = {"answer": 40.0, "answer_ci95": [35.0, 45.0], "full_text": 80.0, "seed_protocol": 82.0}
    after = {"answer": 20.0, "answer_ci95": [18.0, 22.0], "full_text": 8.0, "seed_protocol": 8.2}
    script.plot_perplexity(before, after, "plot.png")
    (ax,) = axes
    assert [bar.get_width() for bar in ax.patches] == [40.0, 20.0, 80.0, 8.0, 82.0, 8.2]
    assert [text.get_text() for text in ax.texts] == [
        "before 40.00",
        "after 20.00 (-50 %)",
        "before 80.00",
        "after 8.00 (-90 %)",
        "before 82.00",
        "after 8.20 (-90 %)",
    ]
    intervals = [lines.get_segments()[0][:, 0].tolist() for lines in ax.collections]
    assert intervals == [[35.0, 45.0], [18.0, 22.0]]
    middles = [bar.get_y() + bar.get_height() / 2 for bar in ax.patches]
    between = [(middles[i] + middles[i + 1]) / 2 for i in (0, 2, 4)]
    assert ax.get_yticks().tolist() == pytest.approx(between)
    assert [label.get_text().split("\n")[0] for label in ax.get_yticklabels()] == [
        "answers only",
        "full text,",
        "reference protocol,",
    ]
