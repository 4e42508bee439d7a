"""Scoring: perplexities that are known beforehand, and the same figures by another way."""

import math
import os

import numpy as np
import pytest
import torch
from conftest import load_tiny, plain_nll, unigram_model

import finetune_medical_gpt2 as script
from finetune_medical_gpt2 import (
    InputError,
    bootstrap_ci95,
    evaluate_perplexity,
    paired_change,
    summarize_scores,
)


def test_uniform_logits_give_the_vocabulary_size(rows):
    model, tokenizer = load_tiny()
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    scores = evaluate_perplexity(model, tokenizer, rows[1][:7], max_length=200)
    for kind in ("full_text", "answer", "seed_protocol"):
        assert scores[kind] == pytest.approx(model.config.vocab_size, rel=1e-5)
    assert scores["answer_ci95"] == pytest.approx([model.config.vocab_size] * 2, rel=1e-5)


# In bfloat16, numbers near -90 are half a unit apart: without centring the head the last case is off by more.
@pytest.mark.parametrize("precision, offset, tolerance", [("fp32", 0, 1e-5), ("bf16", 0, 1e-3), ("bf16", -90, 1e-3)])
def test_known_logits_give_the_perplexity_computed_by_hand(tiny, precision, offset, tolerance):
    torch.manual_seed(0)
    log_probs = torch.randn(len(tiny[1])).mul(2).log_softmax(0)
    model, tokenizer = unigram_model(log_probs, offset)
    prompt, answer = "[INST] What is Water? [/INST]", " Water is wet. </s>"
    ids = tokenizer(prompt + answer)["input_ids"]
    answer_ids = tokenizer(answer)["input_ids"]
    assert ids[-len(answer_ids) :] == answer_ids
    nll = -log_probs[ids[1:]].mean().item()
    answer_nll = -log_probs[answer_ids].sum().item()

    script.speed_up(model, precision)
    scores = evaluate_perplexity(model, tokenizer, [prompt + answer], max_length=512)
    assert scores["tokens"] == len(ids) - 1
    assert scores["answer_tokens"] == len(answer_ids)
    assert math.log(scores["full_text"]) == pytest.approx(nll, rel=tolerance)
    assert math.log(scores["answer"]) == pytest.approx(answer_nll / len(answer_ids), rel=tolerance)
    assert scores["bits_per_byte"] == pytest.approx(answer_nll / math.log(2) / len(answer.encode()), rel=tolerance)


# Rows that begin alike go on from what is run once; others are run whole.
@pytest.mark.parametrize(
    "others", [[], ["What is Water? [/INST] It is wet. </s>"]], ids=["one system prompt", "several"]
)
def test_scores_equal_a_plain_loop_and_do_not_depend_on_the_batch(tiny, rows, others):
    model, tokenizer = tiny
    texts = rows[1][: 8 - len(others)] + others
    nll, answer_nll, means, tokens, answer_tokens = [], [], [], 0, 0
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=300)["input_ids"]
        row = plain_nll(model, ids).double()
        prompt_length = len(tokenizer(text[: text.index("[/INST]") + 7])["input_ids"])
        nll.append(row.sum())
        answer_nll.append(row[prompt_length - 1 :].sum())
        means.append(row.mean())
        tokens += len(row)
        answer_tokens += len(row) - prompt_length + 1
    for batch_size in (1, 4, 8):
        scores = evaluate_perplexity(model, tokenizer, texts, max_length=300, batch_size=batch_size)
        assert (scores["tokens"], scores["answer_tokens"]) == (tokens, answer_tokens)
        assert scores["full_text"] == pytest.approx(math.exp(sum(nll) / tokens), rel=1e-5)
        assert scores["answer"] == pytest.approx(math.exp(sum(answer_nll) / answer_tokens), rel=1e-5)
        assert scores["seed_protocol"] == pytest.approx(math.exp(sum(means) / len(texts)), rel=1e-5)


def test_what_all_rows_begin_with_is_run_once(tiny, rows, monkeypatch):
    label_nll, widths = script.label_nll, []

    def label_nll_and_note(model, input_ids, *args):
        widths.append(input_ids.shape[1])
        return label_nll(model, input_ids, *args)

    monkeypatch.setattr(script, "label_nll", label_nll_and_note)
    texts = rows[1][:4]  # all of more than 300 tokens
    start = len(os.path.commonprefix([tiny[1](text)["input_ids"] for text in texts]))
    evaluate_perplexity(*tiny, texts, max_length=300, batch_size=1)
    assert widths == [start] + 4 * [300 - (start - 1)]  # the rows begin with the start's last token
    widths.clear()
    evaluate_perplexity(*tiny, [*texts, "No row."], max_length=300, batch_size=1)
    assert widths == 4 * [300] + [8]


def score_line(nll, tokens, answer_nll=0.0, answer_tokens=0, answer_bytes=0):
    """A line of a `score_rows` array."""
    return [nll, tokens, answer_nll, answer_tokens, answer_bytes]


def test_the_reference_protocol_is_the_mean_of_the_means_of_the_first_hundred_rows():
    # The first half has 1 nat a token in 10 tokens, the second 3 in 30, and what follows doesn't count.
    lines = [score_line(10.0, 10)] * 50 + [score_line(90.0, 30)] * 50 + [score_line(100.0, 20)] * 30
    scores = summarize_scores(np.array(lines))
    assert scores["seed_protocol"] == pytest.approx(math.exp(2))
    assert scores["full_text"] == pytest.approx(math.exp((500 + 4500 + 3000) / (500 + 1500 + 600)))


def test_text_without_an_answer_has_no_answer_score(tiny):
    model, tokenizer = tiny
    text = "No mark here at all."
    scores = evaluate_perplexity(model, tokenizer, [text], max_length=64)
    assert scores["answer"] is None
    assert scores["answer_ci95"] is None
    assert scores["bits_per_byte"] is None
    assert scores["answer_tokens"] == 0
    nll = plain_nll(model, tokenizer(text)["input_ids"])
    assert scores["full_text"] == pytest.approx(nll.mean().exp().item(), rel=1e-5)


def test_an_empty_text_changes_nothing(tiny, rows):
    without = evaluate_perplexity(*tiny, rows[1][:3], max_length=128)
    scores = evaluate_perplexity(*tiny, ["", *rows[1][:3]], max_length=128)
    interval = without.pop("answer_ci95")
    assert scores.pop("answer_ci95") == pytest.approx(interval, rel=1e-5)
    assert scores == pytest.approx(without, rel=1e-5)


def test_a_loss_that_is_not_finite_names_the_row():
    model, tokenizer = load_tiny()
    texts = ["What is water? [/INST] It is wet.", "What is fire? [/INST] It is hot."]
    first, second = (tokenizer(text)["input_ids"] for text in texts)
    only_in_the_second = next(token for token in second if token not in first)
    with torch.no_grad():
        # the head gets weights of its own, or the other row would meet the NaN there
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.get_input_embeddings().weight[only_in_the_second] = float("nan")
    with pytest.raises(InputError, match="row 1 is not finite"):
        evaluate_perplexity(model, tokenizer, texts, max_length=100)


def test_bootstrap_is_seeded_and_covers_the_mean():
    values = np.random.default_rng(1).normal(3.0, 1.0, 400)
    interval = bootstrap_ci95(values, np.ones(400))
    assert interval.tolist() == bootstrap_ci95(values, np.ones(400)).tolist()
    mean, standard_error = values.mean(), values.std() / math.sqrt(400)
    assert interval == pytest.approx([mean - 1.96 * standard_error, mean + 1.96 * standard_error], abs=0.03)


def test_paired_change_is_the_mean_of_the_rows_changes():
    before = np.array([score_line(9, 9, 4.0, 4), score_line(9, 9, 6.0, 2), score_line(9, 9)])
    after = np.array([score_line(9, 9, 2.0, 4), score_line(9, 9, 7.0, 2), score_line(9, 9)])
    change = paired_change(before, after)
    assert change["rows"] == 2
    assert change["mean"] == pytest.approx((-2 / 4 + 1 / 2) / 2)
    assert change["improved"] == 0.5
    # of a thousand draws of two rows, a quarter each has one of them twice
    assert change["ci95"] == pytest.approx([-0.5, 0.5])


def test_rows_without_answers_have_no_paired_change():
    scores = np.array([score_line(9, 9), score_line(5, 3)])
    assert paired_change(scores, scores - 1) is None
