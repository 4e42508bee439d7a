"""Medicine, or its tone: the title test and the general text, against figures computed by hand."""

import json

import numpy as np
import pytest
from conftest import load_tiny

import finetune_medical_gpt2 as script
from finetune_medical_gpt2 import format_prompt, score_titles, summarize_titles

TITLES = ["Hyperthyroidism", "Gout", "Iron deficiency", "Non-Hodgkin lymphoma", "Botulism"]


def text(title, article):
    return format_prompt(f"What is {title} and explain in detail?") + f" {article} </s>"


TEXTS = [text(title, f"{title} is number {i}. (Hyperactive hodgkin ironing.)") for i, title in enumerate(TITLES)]


def fake_scores(monkeypatch, nll):
    """Let `score_rows` give nll(title, article) to an article's 10 tokens; returns the rows that it was given."""
    seen = []

    def score_rows(model, tokenizer, texts, **kwargs):
        seen.extend(texts)
        pairs = [(script.TITLE.search(row)[1], row.split("[/INST]")[1]) for row in texts]
        return np.array([[50.0, 40, nll(*pair), 10, 60] for pair in pairs])

    monkeypatch.setattr(script, "score_rows", score_rows)
    return seen


def test_a_model_that_knows_its_titles_gains_what_was_computed_by_hand(monkeypatch):
    def nll(title, article):  # 20 nats under its own title; 23 and 26 under the others, by turns
        own = f"number {TITLES.index(title)}." in article
        return 20 if own else 23 if title in ("Gout", "Botulism") else 26

    seen = fake_scores(monkeypatch, nll)
    losses = score_titles(None, None, TEXTS, 512)
    assert losses == [
        [2.0, 2.3, 2.6, 2.6],  # under Gout, Iron, Hodgkin
        [2.0, 2.6, 2.6, 2.3],  # Iron, Hodgkin, Botulism
        [2.0, 2.6, 2.3, 2.6],  # Hodgkin, Botulism, Hyperthyroidism
        [2.0, 2.3, 2.6, 2.3],  # Botulism, Hyperthyroidism, Gout
        [2.0, 2.6, 2.3, 2.6],  # Hyperthyroidism, Gout, Iron
    ]
    summary = summarize_titles(losses)
    assert summary["gain"] == pytest.approx((6 * 0.3 + 9 * 0.6) / 15)
    assert (summary["articles"], summary["own_wins"]) == (5, 1.0)
    assert summary["other_loss"] - summary["own_loss"] == pytest.approx(summary["gain"])
    low, high = summary["gain_ci95"]
    assert 0.4 <= low < summary["gain"] < high <= 0.5
    assert len(seen) == 20 and all(row.count("[/INST]") == 1 for row in seen)


def test_a_model_that_ignores_the_prompt_gains_nothing(monkeypatch):
    fake_scores(monkeypatch, lambda title, article: len(article))
    summary = summarize_titles(score_titles(None, None, TEXTS, 512))
    assert (summary["gain"], summary["gain_ci95"], summary["own_wins"]) == (0, [0, 0], 0)


def test_nothing_of_the_title_can_be_copied_from_it(monkeypatch):
    seen = fake_scores(monkeypatch, lambda title, article: 1)
    score_titles(None, None, TEXTS, 512)
    articles = [row.split("[/INST]")[1].strip() for row in seen[::4]]
    assert articles == [
        "is number 0. ( hodgkin ironing.)",
        "is number 1. (Hyperactive hodgkin ironing.)",
        "is number 2. (Hyperactive hodgkin .)",
        "Non- is number 3. (Hyperactive ironing.)",
        "is number 4. (Hyperactive hodgkin ironing.)",
    ]


def test_too_few_titles_are_no_title_test(monkeypatch):
    fake_scores(monkeypatch, lambda title, article: 1)
    for texts in ([], TEXTS[:3], ["[INST] Why? [/INST] So."] * 9):
        assert score_titles(None, None, texts, 512) == [] and summarize_titles([]) is None


def test_articles_of_which_a_title_pushes_a_part_out_are_left_out(monkeypatch):
    real = script.score_rows
    model, tokenizer = load_tiny()
    seen = fake_scores(monkeypatch, lambda title, article: 1)
    score_titles(None, None, TEXTS, 512)
    rows = list(seen)
    monkeypatch.setattr(script, "score_rows", real)
    length = len(tokenizer(rows[4])["input_ids"])  # Gout's article under its own short title
    assert len(score_titles(model, tokenizer, TEXTS, 512)) == 5
    assert len(score_titles(model, tokenizer, TEXTS, length)) < 5


def test_general_text_is_the_mean_loss_of_the_everyday_articles(monkeypatch, tiny):
    monkeypatch.setattr(script, "GENERAL_ARTICLES", 2)
    lines = (script.Path(script.__file__).parent / script.GENERAL_TEXT).read_text().splitlines()[:2]
    articles = [json.loads(line)["article"] for line in lines]
    expected = script.evaluate_perplexity(*tiny, articles, max_length=512)["full_text"]
    assert script.score_general_text(*tiny, 512) == pytest.approx(np.log(expected))
    monkeypatch.setattr(script, "GENERAL_TEXT", "tests/not_there.jsonl")
    assert script.score_general_text(*tiny, 512) is None
