"""Scoring: perplexities that are known beforehand, and the same figures by another way."""

import math

import numpy as np
import pandas
import pytest
import torch
from conftest import load_tiny, plain_nll, unigram_model

import finetune_medical_gpt2 as script
from finetune_medical_gpt2 import InputError, bootstrap_ci95, encode, evaluate_perplexity, score_rows, summarize_scores


def test_uniform_logits_give_the_vocabulary_size(rows):
    model, tokenizer = load_tiny()
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    scores = evaluate_perplexity(model, tokenizer, rows[1][:7], max_length=200)
    for kind in ("full_text", "answer", "reference_protocol"):
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


def test_scores_equal_a_plain_loop_and_do_not_depend_on_the_batch(tiny, rows):
    model, tokenizer = tiny
    texts = [*rows[1][:7], "What is Water? [/INST] It is wet. </s>"]
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
        assert scores["reference_protocol"] == pytest.approx(math.exp(sum(means) / len(texts)), rel=1e-5)


def test_a_row_shown_first_is_seen_and_not_counted_as_answer(tiny, rows):
    model, tokenizer = tiny
    (shown,) = encode(tokenizer, rows[0][:1], 200, end=True)
    texts = rows[1][:3]
    alone = score_rows(model, tokenizer, texts, max_length=250)
    scores = score_rows(model, tokenizer, texts, max_length=250, batch_size=2, shown=shown)
    assert scores.answer_tokens.tolist() == alone.answer_tokens.tolist()
    assert scores.answer_bytes.tolist() == alone.answer_bytes.tolist()
    for i, (ids, first, _) in enumerate(encode(tokenizer, texts, 250)):
        nll = plain_nll(model, shown.ids + ids)
        assert scores.answer_nll[i] == pytest.approx(nll[len(shown.ids) + first - 1 :].sum().item(), rel=1e-4)
    assert not np.allclose(scores.answer_nll, alone.answer_nll, rtol=1e-3)


def score_table(*lines):
    """A `score_rows` table of (nll, tokens, answer_nll, answer_tokens, answer_bytes)."""
    return pandas.DataFrame(
        lines, columns=["nll", "tokens", "answer_nll", "answer_tokens", "answer_bytes"], dtype=float
    )


def test_the_reference_protocol_is_the_mean_of_the_means_of_the_first_hundred_rows():
    # The first half has 1 nat a token in 10 tokens, the second 3 in 30, and what follows doesn't count.
    answer = (4.0, 4, 16)
    lines = [(10.0, 10, *answer)] * 50 + [(90.0, 30, *answer)] * 50 + [(100.0, 20, *answer)] * 30
    scores = summarize_scores(score_table(*lines))
    assert scores["reference_protocol"] == pytest.approx(math.exp(2))
    assert scores["full_text"] == pytest.approx(math.exp((500 + 4500 + 3000) / (500 + 1500 + 600)))


def test_the_answer_figures_are_those_computed_by_hand():
    scores = summarize_scores(score_table((9, 9, 4.0, 4, 10), (9, 9, 6.0, 1, 6)))
    assert scores["answer"] == pytest.approx(math.exp(10 / 5))
    assert scores["bits_per_byte"] == pytest.approx(10 / math.log(2) / 16)
    # of a thousand draws of two rows, a quarter each has one of them twice
    assert scores["answer_ci95"] == pytest.approx([math.exp(1), math.exp(6)])


def test_text_without_an_answer_has_no_answer_score(tiny):
    model, tokenizer = tiny
    text = "No mark here at all."
    scores = evaluate_perplexity(model, tokenizer, [text], max_length=64)
    assert scores["answer_tokens"] == 0
    assert scores["answer"] is scores["answer_ci95"] is scores["bits_per_byte"] is None
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
    assert interval == bootstrap_ci95(values, np.ones(400))
    mean, standard_error = values.mean(), values.std() / math.sqrt(400)
    assert interval == pytest.approx([mean - 1.96 * standard_error, mean + 1.96 * standard_error], abs=0.03)
