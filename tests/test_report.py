"""Results: the report's figures are those computed by hand, and text from outside stays in its place."""

import shutil

import huggingface_hub
import pytest
from conftest import read

import finetune_medical_gpt2 as script

P = {"bits_per_byte": 1.0, "tokens": 100, "answer_tokens": 40}
PERPLEXITY = {
    "before": P | {"answer": 50.0, "answer_ci95": [45.0, 55.5], "full_text": 80.0, "reference_protocol": 82.0},
    "after": P | {"answer": 20.0, "answer_ci95": [18.0, 22.0], "full_text": 8.0, "reference_protocol": 8.2},
    "shown_one_row": 40.0,
    "trained": {"before": 48.0, "after": 12.0},
    "everyday": {"before": 100.0, "after": 120.0},
    "prompt_share": 0.8,
}
FACTS = {"count": 400, "before": 0.66, "after": 0.6725, "change": 0.0125, "change_ci95": [-0.03, 0.05]}
TABLE = [
    ["Answers, held-out articles", "50.00 (45.00 to 55.50)", "20.00 (18.00 to 22.00)", "-60%"],
    ["the same, base model shown one training row first", "40.00", "", ""],
    ["Answers, training articles", "48.00", "12.00", "-75%"],
    ["Everyday text", "100.00", "120.00", "+20%"],
    ["Medical facts, right of 400 (chance: 25%)", "66.0%", "67.2%", "+1.2 points (-3.0 to +5.0)"],
    ["Whole rows, prompts too", "80.00", "8.00", "-90%"],
    ["Reference protocol", "82.00", "8.20", "-90%"],
]


@pytest.fixture
def results(short_run):
    """The results of a finished run, with the figures above."""
    return read(short_run) | {"perplexity": PERPLEXITY, "facts": FACTS}


def prose_of(results, folder):
    script.write_report(results, folder / "report.md")
    return " ".join((folder / "report.md").read_text().split())


def test_the_table_holds_the_figures_in_words(results):
    assert script.result_table(results) == TABLE


def test_what_was_not_measured_has_no_line(results):
    results |= {"perplexity": PERPLEXITY | {"shown_one_row": None, "everyday": None}, "facts": None}
    assert script.result_table(results) == [TABLE[i] for i in (0, 2, 5, 6)]


def test_screen_report_and_card_show_the_same_lines(short_run, capsys, tmp_path):
    table = script.result_table(read(short_run))
    for path in (short_run / "report.md", short_run / "adapter" / "README.md"):
        lines = path.read_text().splitlines()
        assert all(f"| {' | '.join(line)} |" in lines for line in table), path


def test_a_report_can_be_written_again_from_the_results(short_run, tmp_path):
    script.write_report(read(short_run), tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text() == (short_run / "report.md").read_text()


def test_the_result_stands_before_the_answers(results, tmp_path):
    text = prose_of(results, tmp_path)
    assert text.index("| Reference protocol |") < text.index("![Perplexity before") < text.index("## The answers")


@pytest.mark.parametrize(
    "ci95, said",
    [
        ([-0.03, 0.05], "Medical facts: no change that 400 facts can detect."),
        ([0.01, 0.05], "Medical facts: gained."),
        ([-0.05, -0.01], "Medical facts: lost."),
    ],
)
def test_of_the_facts_it_says_what_the_interval_allows(results, tmp_path, ci95, said):
    results["facts"] = FACTS | {"change_ci95": ci95}
    assert said in prose_of(results, tmp_path)


@pytest.mark.parametrize("share, said", [(0.8, True), (None, False), (1.4, False), (-0.2, False)])
def test_the_prompts_share_of_the_fall_is_told_where_it_is_a_share(results, tmp_path, share, said):
    results["perplexity"] = PERPLEXITY | {"prompt_share": share}
    text = prose_of(results, tmp_path)
    assert ("of the fall in loss is on prompts" in text, ": 80.0% of the fall" in text) == (said, said)


@pytest.mark.parametrize("epochs, said", [(0.29, True), (1.0, False), (4.0, False)])
def test_training_articles_that_were_not_all_seen_are_said(results, tmp_path, epochs, said):
    results["training"]["log_history"][-1]["epoch"] = epochs
    text = prose_of(results, tmp_path)
    assert ("(it has seen 29% of all)" in text, "trained on (or would be later)" in text) == (said, said)


def test_beside_each_question_stands_where_its_article_is(results, tmp_path):
    for answer, seen in zip(results["answers"], ["trained on", "held out", "not in the data"], strict=False):
        answer["seen"] = seen
        assert f"<b>{answer['topic']}</b> ({seen})<br>" in prose_of(results, tmp_path)


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
    local = huggingface_hub.ModelCard((run / "adapter" / "README.md").read_text()).data
    assert (local.library_name, local.pipeline_tag) == ("peft", "text-generation")
    assert (local.base_model, local.datasets) == (None, None)  # nothing that the Hub would know

    results = read(run)
    results |= {"model": "gpt2", "model_revision": "a" * 40, "dataset": "some/data", "dataset_revision": "b" * 40}
    script.write_results(results, run)
    card = huggingface_hub.ModelCard((run / "adapter" / "README.md").read_text())
    assert (card.data.base_model, card.data.datasets) == ("gpt2", ["some/data"])
    assert card.text.startswith("\n# LoRA fine-tuning of gpt2 on data\n")
