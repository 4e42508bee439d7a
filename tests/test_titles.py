"""Medicine, or its tone: the title test and the general text, against figures computed by hand."""

import json

import numpy as np
import pytest
from conftest import row

import finetune_medical_gpt2 as script
from finetune_medical_gpt2 import compare_titles, score_titles, summarize_titles

TITLES = ["Hyperthyroidism", "Gout", "Iron deficiency", "Non-Hodgkin lymphoma", "Botulism"]
TEXTS = [row(title, f"{title} is number {i}. (Hyperactive hodgkin ironing.)") for i, title in enumerate(TITLES)]


def fake_scores(monkeypatch, nll, tokens=lambda title: 10):
    """Let `score_rows` give nll(title, article) to an article's tokens(title); returns the rows that it was given."""
    seen = []

    def score_rows(model, tokenizer, texts, **kwargs):
        seen.extend(texts)
        scores = []
        for text in texts:
            title, article = script.TITLE.search(text)[1], text.split("[/INST]")[1]
            scores.append([50.0, 40, nll(title, article), tokens(title), 60])
        return np.array(scores)

    monkeypatch.setattr(script, "score_rows", score_rows)
    return seen


def own_title(title, article):
    return f"number {TITLES.index(title)}." in article


def test_a_model_that_knows_its_titles_gains_what_was_computed_by_hand(monkeypatch):
    def nll(title, article):
        if own_title(title, article):
            return 20
        return 23 if title in ("Gout", "Botulism") else 26

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
    assert len(seen) == 20 and all(text.count("[/INST]") == 1 for text in seen)


def test_a_model_that_ignores_the_prompt_gains_nothing(monkeypatch):
    fake_scores(monkeypatch, lambda title, article: len(article))
    summary = summarize_titles(score_titles(None, None, TEXTS, 512))
    assert (summary["gain"], summary["gain_ci95"], summary["own_wins"]) == (0, [0, 0], 0)


def test_the_change_of_the_gain_compares_each_article_with_itself():
    before = [[2.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0]]  # gains 1 and 0
    after = [[1.0, 3.0, 3.0, 3.0], [1.0, 1.0, 0.0, 2.0]]  # gains 2 and 0
    compared = compare_titles(before, after)
    assert compared["before"]["gain"] == pytest.approx(0.5)
    assert compared["after"]["gain"] == pytest.approx(1.0)
    assert compared["gain_change"]["mean"] == pytest.approx(0.5)
    # of a thousand draws of two articles, a quarter each has one of them twice
    assert compared["gain_change"]["ci95"] == pytest.approx([0.0, 1.0])
    assert compare_titles([], []) == {"before": None, "after": None, "gain_change": None}


def test_nothing_of_the_title_can_be_copied_from_it(monkeypatch):
    seen = fake_scores(monkeypatch, lambda title, article: 1)
    score_titles(None, None, TEXTS, 512)
    articles = [text.split("[/INST]")[1].strip() for text in seen[::4]]
    assert articles == [
        "is number 0. ( hodgkin ironing.)",
        "is number 1. (Hyperactive hodgkin ironing.)",
        "is number 2. (Hyperactive hodgkin .)",
        "Non- is number 3. (Hyperactive ironing.)",
        "is number 4. (Hyperactive hodgkin ironing.)",
    ]


def test_of_a_question_in_other_words_no_word_can_be_copied(monkeypatch):
    questions = ["Why do joints hurt?", "Who gets scurvy?", "Is it catching?", "What about rabies?"]
    texts = [f"[INST] {question} [/INST] The joint is hurting, scurvy whoever. </s>" for question in questions]
    seen = []

    def score_rows(model, tokenizer, rows, **kwargs):
        seen.extend(rows)
        return np.ones((len(rows), 5))

    monkeypatch.setattr(script, "score_rows", score_rows)
    assert len(score_titles(None, None, texts, 512)) == 4
    # article 0 without "joint" and "hurting", under the questions 0, 1, 2, 3; article 1 without "scurvy", from 1 on
    assert seen[:2] == [
        "[INST] Why do joints hurt? [/INST] The is , scurvy whoever.",
        "[INST] Who gets scurvy? [/INST] The is , scurvy whoever.",
    ]
    assert seen[4] == "[INST] Who gets scurvy? [/INST] The joint is hurting, whoever."


def test_too_few_articles_are_no_title_test(monkeypatch):
    fake_scores(monkeypatch, lambda title, article: 1)
    for texts in ([], TEXTS[:3]):
        assert score_titles(None, None, texts, 512) == []
    assert summarize_titles([]) is None


def test_articles_of_which_a_title_pushes_a_part_out_are_left_out(monkeypatch):
    def tokens(title):
        return 9 if title == "Botulism" else 10  # as if the others were shorter

    def nll(title, article):
        return tokens(title) * (2 if own_title(title, article) else 3)

    fake_scores(monkeypatch, nll, tokens)
    # Of the five, only Hyperthyroidism's article is not scored under Botulism, which is four rows away.
    assert score_titles(None, None, TEXTS, 512) == [[2.0, 3.0, 3.0, 3.0]]


def test_the_longest_title_pushes_a_part_out_where_the_rows_are_cut(tiny):
    model, tokenizer = tiny
    texts = [row(title, f"It is number {i}.") for i, title in enumerate("ABCDE")]
    texts[2] = row("C, which has a very long name", "It is number 2.")
    whole = len(tokenizer(texts[0].replace(" </s>", ""))["input_ids"])
    assert len(score_titles(model, tokenizer, texts, 512)) == 5
    # C's title comes before the articles of A, B, C and E; D's are under D, E, A and B
    assert len(score_titles(model, tokenizer, texts, whole)) == 1


def test_general_text_is_the_mean_loss_of_the_everyday_articles(monkeypatch, tiny):
    monkeypatch.setattr(script, "GENERAL_ARTICLES", 2)
    lines = (script.Path(script.__file__).parent / script.GENERAL_TEXT).read_text().splitlines()[:2]
    articles = [json.loads(line)["article"] for line in lines]
    expected = script.evaluate_perplexity(*tiny, articles, max_length=512)["full_text"]
    assert script.score_general_text(*tiny, 512) == pytest.approx(np.log(expected))
    monkeypatch.setattr(script, "GENERAL_TEXT", "tests/not_there.jsonl")
    assert script.score_general_text(*tiny, 512) is None
