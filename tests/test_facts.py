"""What is measured beside the held-out articles: facts, everyday text, articles trained on, a row shown first."""

import math
from types import SimpleNamespace

import pandas
import pytest
import torch
from conftest import TESTS, row, unigram_model

import finetune_medical_gpt2 as script


def facts():
    return script.read_lines(TESTS / "medical_facts.jsonl")


def test_there_are_enough_facts_each_of_one_right_ending_and_three_others():
    assert len(facts()) >= 400
    for fact in facts():
        assert set(fact) == {"begins", "right", "wrong"}
        endings = [fact["right"], *fact["wrong"]]
        assert len(set(endings)) == 4, fact
        for text in (fact["begins"], *endings):
            assert text == text.strip() and text.isascii() and not text.endswith("."), text
    for part in ("begins", "right"):
        values = [fact[part].lower() for fact in facts()]
        assert len(set(values)) == len(values)


def test_the_right_ending_is_not_told_by_its_length():
    lengths = [[len(ending) for ending in (fact["right"], *fact["wrong"])] for fact in facts()]
    for extreme in (min, max):
        # a fact in which n endings are the shortest counts for 1 / n of a hit
        hits = [(row[0] == extreme(row)) / row.count(extreme(row)) for row in lengths]
        assert sum(hits) / len(hits) == pytest.approx(0.25, abs=0.06)


def test_everyday_articles_are_short_plain_and_not_those_of_the_tiny_model():
    articles = script.read_lines(TESTS / "everyday.jsonl")
    known = {line["title"] for line in script.read_lines(TESTS / "tiny_gpt2" / "everyday.jsonl")}
    assert len(articles) == 40
    for line in articles:
        assert 60 <= len(line["article"].split()) <= 120
        assert line["article"].isascii() and line["title"] not in known


def test_a_fact_is_right_if_its_right_ending_is_the_likeliest(tiny):
    tokenizer = tiny[1]
    log_probs = torch.full((len(tokenizer),), -9.0)
    for word, value in ((" red", -1.0), (" blue", -2.0), (" green", -2.0), (" black", -3.0)):
        (token,) = tokenizer(word)["input_ids"]
        log_probs[token] = value
    model, _ = unigram_model(log_probs.log_softmax(0))
    questions = [
        {"begins": "Blood is", "right": "red", "wrong": ["blue", "green", "black"]},
        {"begins": "Grass is", "right": "green", "wrong": ["blue", "red", "black"]},
        {"begins": "The sky is", "right": "blue", "wrong": ["green", "black", "blue"]},  # no likelier than one of them
    ]
    assert script.score_facts(model, tokenizer, questions) == [True, False, False]


def measured(nll, answer_nll, facts, **others):
    perplexity = {"answer": 9.0}
    return {"perplexity": perplexity, "nll": nll, "answer_nll": answer_nll, "facts": facts, **others}


def test_before_and_after_are_compared_as_by_hand():
    others = {"trained": 8.0, "everyday": None, "shown_one_row": 7.0}
    before = measured(300.0, 160.0, [True, True, False, False], **others)
    after = measured(200.0, 140.0, [True, False, True, True], **others)
    perplexity, facts = script.compare(before, after).values()
    assert perplexity["prompt_share"] == pytest.approx(0.8)  # the fall of 100 nats is 80 on the prompts
    assert perplexity["trained"] == {"before": 8.0, "after": 8.0}
    assert (perplexity["everyday"], perplexity["shown_one_row"]) == (None, 7.0)
    assert (facts["count"], facts["before"], facts["after"], facts["change"]) == (4, 0.5, 0.75, 0.25)
    low, high = facts["change_ci95"]  # of the changes 0, -1, 1, 1
    assert -0.75 <= low <= -0.25 and high == 1.0


def test_without_facts_and_without_a_fall_there_is_nothing_to_tell():
    others = {"trained": 8.0, "everyday": 6.0, "shown_one_row": None}
    before, after = measured(100.0, 50.0, [], **others), measured(101.0, 40.0, [], **others)
    perplexity, facts = script.compare(before, after).values()
    assert facts is None and perplexity["prompt_share"] is None
    assert perplexity["everyday"] == {"before": 6.0, "after": 6.0}


@pytest.fixture
def scores_by_text(monkeypatch, tmp_path):
    """`measure` with a `score_rows` of known figures; each answer has 10 tokens."""
    nll = {"held out 0": 30.0, "held out 1": 10.0, "trained": 5.0}
    seen = []

    def score_rows(model, tokenizer, texts, *, shown=None, **kwargs):
        seen.append((list(texts), shown))
        values = [nll[text] * (0.5 if shown else 1.0) for text in texts]
        columns = {"nll": values, "tokens": 20.0, "answer_nll": values, "answer_tokens": 10.0, "answer_bytes": 40.0}
        return pandas.DataFrame(columns, index=range(len(texts)), dtype=float)

    monkeypatch.setattr(script, "score_rows", score_rows)
    monkeypatch.setattr(script, "EVERYDAY", tmp_path / "none")
    monkeypatch.setattr(script, "score_facts", lambda *args: [])
    monkeypatch.setattr(script, "SAMPLE_ROWS", 1)
    return seen


@pytest.mark.parametrize("context, is_shown", [(100, True), (99, False)])
def test_a_row_is_shown_first_where_the_context_has_room(scores_by_text, context, is_shown):
    config = SimpleNamespace(max_position_embeddings=context)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    cfg = SimpleNamespace(MAX_LENGTH=60, BATCH_SIZE=4, TRAIN_ON_PROMPT=True)
    rows = [script.Row([1] * 41, 5, 9), script.Row([1] * 40, 5, 9), script.Row([1] * 3, 5, 9)]
    found = script.measure(model, None, cfg, ["trained", "not scored"], ["held out 0", "held out 1"], rows[:2])
    assert found["perplexity"]["answer"] == pytest.approx(math.exp(2))
    assert found["trained"] == pytest.approx(math.exp(0.5))
    assert (found["everyday"], found["facts"]) == (None, [])
    if is_shown:
        # of the one row that is sampled the loss falls from 3 to 1.5 nats a token
        assert found["shown_one_row"] == pytest.approx(math.exp(2 - 1.5))
        assert scores_by_text[-1] == (["held out 0"], rows[1])
    else:
        assert found["shown_one_row"] is None


def test_rows_have_their_topics_in_the_question_and_not_in_the_system_prompt():
    train, held_out = [row("Gout"), row("Iron deficiency")], [row("Botulism (infant)")]
    for topic, seen in (
        ("gout", "trained on"),
        ("Botulism", "held out"),
        ("harmful", "not in the data"),
        ("Go", "not in the data"),
        ("thing", "not in the data"),
    ):
        assert script.where_seen(topic, train, held_out) == seen, topic
