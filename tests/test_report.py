"""Results: the figures in the report are those computed by hand, and text from outside stays in its place."""

import math
import shutil

import huggingface_hub
import pytest
from conftest import read

import finetune_medical_gpt2 as script


def test_a_report_can_be_written_again_from_the_results(short_run, tmp_path):
    script.write_report(read(short_run), tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text() == (short_run / "report.md").read_text()


# 100 tokens at 3 nats, of which 40 in answers at 4: so 60 in prompts at 140 / 60. After it all 100 at 2, the answers
# at 3.5, and the prompts at 60 / 60. The fall of 100 nats is 80 on the prompts and 20 on the answers.
BEFORE = {"tokens": 100, "answer_tokens": 40, "full_text": math.exp(3), "answer": math.exp(4)}
AFTER = {"tokens": 100, "answer_tokens": 40, "full_text": math.exp(2), "answer": math.exp(3.5)}


def test_the_fall_in_loss_is_split_between_prompts_and_answers():
    split = script.split_fall(BEFORE, AFTER)
    assert list(split) == ["prompts", "answers", "all"]
    assert split["prompts"] == pytest.approx({"tokens": 60, "before": 140 / 60, "after": 1.0, "fall": 80})
    assert split["answers"] == pytest.approx({"tokens": 40, "before": 4.0, "after": 3.5, "fall": 20})
    assert split["all"] == pytest.approx({"tokens": 100, "before": 3.0, "after": 2.0, "fall": 100})


def test_a_fall_without_answers_is_all_on_the_prompts():
    nothing = {"answer": None, "answer_tokens": 0}
    split = script.split_fall(BEFORE | nothing, AFTER | nothing)
    assert split["answers"] == {"tokens": 0, "before": 0, "after": 0, "fall": 0}
    assert split["prompts"]["tokens"] == 100
    assert split["prompts"]["fall"] == pytest.approx(100)


def test_the_figures_in_the_report_are_those_computed_by_hand(short_run, tmp_path):
    results = read(short_run)
    results["perplexity"]["before"] |= BEFORE
    results["perplexity"]["after"] |= AFTER
    results["answers"][0]["before_stats"] |= {"words": 5, "distinct_bigrams": 3, "finished": False}
    results["answers"][0]["after_stats"] |= {"words": 9, "distinct_bigrams": 4, "finished": True}
    script.write_report(results, tmp_path / "report.md")
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "| prompts | 60 | 2.33 | 1.00 | 80 | 80 % |" in lines
    assert "| answers | 40 | 4.00 | 3.50 | 20 | 20 % |" in lines
    assert "| all | 100 | 3.00 | 2.00 | 100 | 100 % |" in lines
    assert "| answers only | 54.60 | 33.12 | -39 % |" in lines  # exp(4), exp(3.5)
    assert "| full text | 20.09 | 7.39 | -63 % |" in lines  # exp(3), exp(2)
    assert f"| {results['answers'][0]['topic']} | 5 → 9 | 25 % → 50 % | no → yes |" in lines  # 3 of 4, 4 of 8 differ
    prose = " ".join(lines)
    assert "80 % is on the prompts" in prose and "The articles' own share is 20 %." in prose


def prose_of(results, folder):
    script.write_report(results, folder / "report.md")
    return " ".join((folder / "report.md").read_text().split())


@pytest.mark.parametrize(
    "full_text, answer, said",
    [
        # the answers at 2 nats, all at 2.6: so the prompts at 180 / 60, where they were at 140 / 60
        (2.6, 2.0, "from 2.33 to 3.00 nats per token on the prompts, which the rows share, and from 4.00 to 2.00 on"),
        # the answers at 4.5, all at 2.4: the prompts at 60 / 60
        (2.4, 4.5, "from 2.33 to 1.00 nats per token on the prompts, which the rows share, and which are learned by"),
    ],
)
def test_where_one_of_the_losses_rose_the_report_gives_no_shares_of_a_fall(
    short_run, tmp_path, full_text, answer, said
):
    results = read(short_run)
    results["perplexity"]["before"] |= BEFORE
    results["perplexity"]["after"] |= AFTER | {"full_text": math.exp(full_text), "answer": math.exp(answer)}
    prose = prose_of(results, tmp_path)
    assert f"The loss went {said}" in prose and "whole fall" not in prose
    assert prose.count("| – |") >= 3  # the shares in the table


def test_where_no_answer_was_scored_the_report_speaks_of_prompts_alone(short_run, tmp_path):
    results = read(short_run)
    nothing = {"answer": None, "answer_tokens": 0}
    results["perplexity"]["before"] |= BEFORE | nothing
    results["perplexity"]["after"] |= AFTER | nothing
    prose = prose_of(results, tmp_path)
    assert "The loss went from 3.00 to 2.00 nats per token on the prompts, which the rows share, and which are" in prose
    assert "on the articles" not in prose and "articles' own share" not in prose


# The loss falls from 3.0 to 2.5 under the articles' own titles, from 3.1 to 2.8 under others.
TITLE_TEST = {
    "before": {
        "articles": 8,
        "gain": 0.1,
        "gain_ci95": [0.0, 0.2],
        "own_wins": 0.75,
        "own_loss": 3.0,
        "other_loss": 3.1,
    },
    "after": {
        "articles": 8,
        "gain": 0.3,
        "gain_ci95": [0.2, 0.4],
        "own_wins": 0.875,
        "own_loss": 2.5,
        "other_loss": 2.8,
    },
    "gain_change": {"mean": 0.2, "ci95": [0.1, 0.3]},
}


@pytest.mark.parametrize(
    "epochs, were", [(1.0, "that were trained on, were"), (0.29, "of the training rows (29 % had their turn), were")]
)
def test_the_title_test_in_the_report_is_split_as_by_hand(short_run, tmp_path, epochs, were):
    results = read(short_run)
    results["perplexity"]["title"] = {"held_out": TITLE_TEST, "trained": TITLE_TEST}
    results["training"]["log_history"][-1]["epoch"] = epochs
    prose = prose_of(results, tmp_path)
    assert f"of 8 held-out articles, and of 8 {were} scored" in prose
    assert "0.100 (0.000 to 0.200) | 0.300 (0.200 to 0.400) |" in prose
    assert "| 75 % | 88 % |" in prose
    assert "changed by -0.500 nats per token, under wrong titles by -0.300." in prose
    assert "can be about the topic: it changed by +0.200 (0.100 to 0.300) ([" in prose
    assert prose.index("Only the gain") < prose.index("## The answers")  # what is to be read first


@pytest.mark.parametrize(
    "mean, ci95, said",
    [
        (0.1, [-0.1, 0.3], "+0.100 (-0.100 to 0.300), which can't be told from zero"),
        (-0.2, [-0.3, -0.1], "-0.200 (-0.300 to -0.100), so it helps less than before"),
    ],
)
def test_the_report_says_what_a_gain_is_worth(short_run, tmp_path, mean, ci95, said):
    results = read(short_run)
    results["perplexity"]["title"]["held_out"] = TITLE_TEST | {"gain_change": {"mean": mean, "ci95": ci95}}
    assert f"can be about the topic: it changed by {said} ([" in prose_of(results, tmp_path)


def test_the_screen_says_what_the_report_says_first(short_run, capsys):
    results = read(short_run)
    results["perplexity"]["title"]["held_out"] = TITLE_TEST
    results["perplexity"]["general"] = {"before": 3.0, "after": 3.25}
    script.show_results(results, short_run)
    shown = " ".join(capsys.readouterr().out.split())
    assert "changed by -0.500 nats per token, by -0.300 under wrong titles; only the gain" in shown
    assert "can be about the topic: +0.200 (0.100 to 0.300)" in shown
    assert "on everyday text the loss went from 3.000 to 3.250 nats per token" in shown


def test_an_answer_without_two_words_repeats_no_pair():
    assert script.repeated_pairs({"words": 0, "distinct_bigrams": 0}) == "0 %"
    assert script.repeated_pairs({"words": 1, "distinct_bigrams": 0}) == "0 %"


def test_hostile_text_stays_in_its_cell(short_run, tmp_path):
    hostile = "```\n\n# Heading\n</td></tr></table>\n\n| a | b |\n<script>alert(1)</script> \x1b[31m ![x](http://y.org)"
    results = read(short_run)
    results["answers"][0] |= {"topic": hostile, "question": hostile, "before": hostile, "after": hostile}
    script.write_report(results, tmp_path / "hostile.md")
    harmless = (short_run / "report.md").read_text().splitlines()
    text = (tmp_path / "hostile.md").read_text()
    lines = text.splitlines()
    assert len(lines) == len(harmless)  # so nothing begins a line, or a paragraph, of its own
    assert text.count("<table>") == text.count("</table>") == 1
    assert "<script>" not in text and "\x1b" not in text
    structure = [line for line in harmless if line.startswith(("#", "```"))]
    assert [line for line in lines if line.startswith(("#", "```"))] == structure


def test_the_card_tells_the_hub_what_the_adapter_is_of(short_run, tmp_path):
    run = shutil.copytree(short_run, tmp_path / "run")
    results = read(run)
    local = huggingface_hub.ModelCard((run / "adapter" / "README.md").read_text()).data
    assert (local.library_name, local.pipeline_tag) == ("peft", "text-generation")
    assert (local.base_model, local.datasets) == (None, None)  # nothing that the Hub would know
    assert (local.license, local.license_name) == ("other", "as-the-base-model")

    results |= {"model": "gpt2", "model_revision": "a" * 40, "dataset": "some/data", "dataset_revision": "b" * 40}
    script.write_model_card(results, run / "adapter")
    card = huggingface_hub.ModelCard((run / "adapter" / "README.md").read_text())
    assert (card.data.base_model, card.data.datasets) == ("gpt2", ["some/data"])
    assert (card.data.license, card.data.license_name) == ("mit", None)
    assert card.data.model_name == "gpt2-data-lora"
    assert card.text.startswith("\n# LoRA fine-tuning of gpt2 on data\n")
