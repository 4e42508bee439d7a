"""Oracles for the figures: perplexities that are known beforehand, and the same figure by another way."""

import math

import numpy as np
import pytest
import torch
from conftest import TESTS, load_tiny, script

from finetune_medical_gpt2 import (
    InputError,
    answer_stats,
    ask,
    bootstrap_ci95,
    encode,
    evaluate_perplexity,
    format_prompt,
    generate_answers,
    paired_change,
    score_rows,
)

SCORES = ("full_text", "answer", "seed_protocol", "bits_per_byte")


def plain_nll(model, ids):
    """NLL of every token but the first, from the model's own logits: one row, no padding, no tricks."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def unigram_model(log_probs, offset=0.0):
    """A tiny GPT-2 with the same known log-probabilities at every position; `offset` shifts all logits."""
    model, tokenizer = load_tiny()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()[0] = 1.0
        model.get_input_embeddings().weight.zero_()[:, 0] = log_probs + offset
    return model, tokenizer


def test_uniform_logits_give_the_vocabulary_size(rows):
    model, tokenizer = load_tiny()
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    scores = evaluate_perplexity(model, tokenizer, rows[1][:7], max_length=200)
    for kind in ("full_text", "answer", "seed_protocol"):
        assert scores[kind] == pytest.approx(model.config.vocab_size, rel=1e-5)
    assert scores["answer_ci95"] == pytest.approx([model.config.vocab_size] * 2, rel=1e-5)


@pytest.mark.parametrize("precision, offset, tolerance", [("fp32", 0, 1e-5), ("bf16", 0, 5e-3), ("bf16", -90, 5e-3)])
def test_known_logits_give_the_perplexity_computed_by_hand(precision, offset, tolerance):
    # in bfloat16, numbers near -90 are half a unit apart: without centring the head the last case is far off
    torch.manual_seed(0)
    log_probs = torch.randn(load_tiny()[0].config.vocab_size).mul(2).log_softmax(0)
    model, tokenizer = unigram_model(log_probs, offset)
    prompt, answer = format_prompt("What is Water and explain in detail?"), " Water is wet. </s>"
    ids = tokenizer(prompt + answer)["input_ids"]
    answer_ids = tokenizer(answer)["input_ids"]
    assert ids[-len(answer_ids) :] == answer_ids
    expected_full = math.exp(-log_probs[ids[1:]].mean())
    answer_nll = -log_probs[answer_ids].sum().item()
    script.speed_up(model, precision)
    scores = evaluate_perplexity(model, tokenizer, [prompt + answer], max_length=512)
    assert scores["tokens"] == len(ids) - 1 and scores["answer_tokens"] == len(answer_ids)
    assert math.log(scores["full_text"]) == pytest.approx(math.log(expected_full), rel=tolerance)
    assert math.log(scores["answer"]) == pytest.approx(answer_nll / len(answer_ids), rel=tolerance)
    assert scores["bits_per_byte"] == pytest.approx(answer_nll / math.log(2) / len(answer.encode()), rel=tolerance)


@pytest.mark.parametrize("kind", ["one system prompt", "nothing in common", "one begins the others"])
def test_scores_equal_a_plain_loop_and_do_not_depend_on_the_batch(tiny, rows, kind):
    model, tokenizer = tiny
    texts = rows[1][:11]
    if kind == "nothing in common":
        texts.append("What is Water? [/INST] It is wet. </s>")
    if kind == "one begins the others":  # what the rows share is computed once: here that is a whole row
        texts.append(texts[0][: texts[0].index("[/INST]") + 40])
        texts = [texts[0], texts[-1]]
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


def load_bf16():
    return script.load_model(TESTS / "tiny_gpt2", precision="bf16")


def test_bfloat16_scores_are_those_of_float32(tiny, rows):
    model, tokenizer = tiny
    exact = evaluate_perplexity(model, tokenizer, rows[1][:3], max_length=256)
    rounded = evaluate_perplexity(load_bf16(), tokenizer, rows[1][:3], max_length=256)
    for kind in SCORES:
        assert rounded[kind] == pytest.approx(exact[kind], rel=0.01)


def test_scoring_and_asking_leave_the_model_as_it_was(rows):
    model, tokenizer = load_bf16().train(), load_tiny()[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score_rows(model, tokenizer, rows[1][:1], max_length=100)
    generate_answers(model, tokenizer, ["What is Water?"], max_new_tokens=2, temperature=0, seed=0)
    with pytest.raises(ZeroDivisionError), script.inference(model):
        _ = 1 / 0
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_only_the_matrices_are_rounded_and_the_embeddings_stay_as_they_are(tiny):
    rounded, exact = load_bf16().state_dict(), tiny[0].state_dict()
    for name, value in exact.items():
        is_matrix = name.endswith("weight") and ".c_" in name or name == "lm_head.weight"
        assert rounded[name].dtype == (torch.bfloat16 if is_matrix else torch.float32), name
        if not is_matrix:
            assert torch.equal(rounded[name], value)
    head = exact["lm_head.weight"] - exact["lm_head.weight"].mean(0)
    assert torch.equal(rounded["lm_head.weight"], head.bfloat16())


def test_a_head_with_more_than_a_matrix_is_scored_by_its_own_logits(rows):
    model, tokenizer = load_tiny()
    assert script.has_plain_head(model)
    expected = evaluate_perplexity(model, tokenizer, rows[1][:3], max_length=100)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    assert not script.has_plain_head(model)
    nll = [plain_nll(model, tokenizer(text, truncation=True, max_length=100)["input_ids"]) for text in rows[1][:3]]
    scores = evaluate_perplexity(model, tokenizer, rows[1][:3], max_length=100)
    assert scores["full_text"] == pytest.approx(torch.cat(nll).double().mean().exp().item(), rel=1e-5)
    assert scores["full_text"] != pytest.approx(expected["full_text"], rel=0.01)


def test_the_reference_protocol_is_the_first_hundred_rows(tiny, rows):
    model, tokenizer = tiny
    texts = [rows[0][i % 40] for i in range(130)]
    scored = score_rows(model, tokenizer, texts, max_length=64)
    expected = math.exp(np.mean(scored[:100, 0] / scored[:100, 1]))
    assert evaluate_perplexity(model, tokenizer, texts, max_length=64)["seed_protocol"] == pytest.approx(expected)


def test_encode_marks_the_answer_and_truncates(tiny, rows):
    _, tokenizer = tiny
    text, eos = rows[0][0], tokenizer.eos_token
    whole, first, _ = encode(tokenizer, [text], 10_000, end=True)[0]
    prompt = text[: text.index("[/INST]") + 7]
    assert whole[:first] == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(whole) == text + eos and whole.count(tokenizer.eos_token_id) == 1
    assert encode(tokenizer, [text], 10_000)[0][2] == len(text[len(prompt) :].encode())
    for length, ends in ((len(whole) + 1, True), (len(whole), True), (len(whole) - 1, False), (first + 3, False)):
        ids, start, _ = encode(tokenizer, [text], length, end=True)[0]
        assert (ids, start) == (whole[:length], first)
        assert (ids[-1] == tokenizer.eos_token_id) is ends
    ids, start, covered = encode(tokenizer, [text], first - 5)[0]
    assert start == len(ids) == first - 5 and covered == 0


def test_text_without_an_answer_has_no_answer_score(tiny):
    scores = evaluate_perplexity(*tiny, ["No mark here at all."], max_length=64)
    assert scores["answer"] is None and scores["answer_ci95"] is None and scores["answer_tokens"] == 0
    assert scores["full_text"] > 1


def test_an_empty_text_changes_nothing(tiny, rows):
    assert evaluate_perplexity(*tiny, ["", *rows[1][:3]], max_length=128) == pytest.approx(
        evaluate_perplexity(*tiny, rows[1][:3], max_length=128), rel=1e-5
    )


def test_a_loss_that_is_not_finite_names_the_row(rows):
    model, tokenizer = load_tiny()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="row 0 is not finite|row 1 is not finite"):
        evaluate_perplexity(model, tokenizer, rows[1][:2], max_length=100)


def test_bootstrap_is_seeded_and_covers_the_mean():
    values = np.random.default_rng(1).normal(3.0, 1.0, 400)
    interval = bootstrap_ci95(lambda w: (w @ values) / len(values), len(values))
    assert interval == bootstrap_ci95(lambda w: (w @ values) / len(values), len(values))
    standard_error = values.std() / 20
    assert interval == pytest.approx(
        [values.mean() - 1.96 * standard_error, values.mean() + 1.96 * standard_error], abs=0.03
    )


def test_paired_change_is_the_mean_of_the_rows_changes():
    before = np.array([[9, 9, 4.0, 4, 1], [9, 9, 6.0, 2, 1], [9, 9, 0, 0, 0]])
    after = before - [[0, 0, 2.0, 0, 0], [0, 0, -1.0, 0, 0], [0, 0, 0, 0, 0]]
    change = paired_change(before, after)
    assert change["rows"] == 2 and change["mean"] == pytest.approx((-2 / 4 + 1 / 2) / 2) and change["improved"] == 0.5


def test_answers_are_seeded_cut_and_the_same_in_a_batch_as_alone(tiny):
    model, tokenizer = tiny
    questions = ["What is a bicycle?", "What is the long and winding history of the river that crosses the old town?"]

    def ask(asked, **change):
        settings = {"max_new_tokens": 16, "temperature": 0.7, "seed": 1} | change
        return generate_answers(model, tokenizer, asked, **settings)

    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert ask(questions) == ask(questions)
    assert torch.equal(state, torch.get_rng_state())
    assert ask(questions) != ask(questions, seed=2)
    padded = questions[:1]
    assert ask(questions, temperature=0)[0] == ask(padded, temperature=0)[0]
    exact = {"temperature": 0}
    assert ask(questions, **exact) == [ask([question], **exact)[0] for question in questions]
    assert not any(
        question in answer or "[/INST]" in answer for question, answer in zip(questions, ask(questions), strict=True)
    )


def test_answers_are_drawn_as_the_probabilities_say():
    words = [" the", " of", " and"]
    log_probs = torch.full((load_tiny()[0].config.vocab_size,), -20.0)
    ids = [load_tiny()[1](word)["input_ids"][0] for word in words]
    log_probs[ids] = torch.tensor([0.6, 0.3, 0.1]).log()
    model, tokenizer = unigram_model(log_probs)
    asked = {"max_new_tokens": 100, "temperature": 0.5, "seed": 3}
    drawn = " ".join(generate_answers(model, tokenizer, ["What?"] * 5, **asked)).split()
    assert len(drawn) == 500
    for word, p in zip(words, (0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46), strict=True):
        assert drawn.count(word.strip()) / 500 == pytest.approx(p, abs=0.06)


def test_an_answer_ends_at_the_end_mark_or_eos():
    model, tokenizer = load_tiny()
    mark = tokenizer("</s>")["input_ids"]
    plan = tokenizer(" Rest")["input_ids"] + mark + tokenizer(" More")["input_ids"]
    scripted = iter(plan)
    real_forward = model.forward

    def forward(*args, **kwargs):
        output = real_forward(*args, **kwargs)
        output.logits[:, -1] = -1e4
        output.logits[:, -1, next(scripted)] = 0.0
        return output

    model.forward = forward
    asked = {"max_new_tokens": len(plan), "temperature": 0.7, "seed": 0}
    assert ask(model, tokenizer, ["What is rest?"], **asked) == [("Rest", True)]
    scripted = iter([*plan[:1], tokenizer.eos_token_id])
    assert ask(model, tokenizer, ["What is rest?"], **asked)[0][1] is True
    scripted = iter(plan[:1])
    assert ask(model, tokenizer, ["What?"], **(asked | {"max_new_tokens": 1}))[0][1] is False


def test_answer_stats_by_hand():
    stats = answer_stats("The cat sat. The cat ran! Why?")
    assert stats == {"words": 7, "sentences": 3, "unique_words": 5, "distinct_bigrams": 5, "finished": True}
    assert answer_stats("") == {"words": 0, "sentences": 0, "unique_words": 0, "distinct_bigrams": 0, "finished": False}
    assert answer_stats("It stops in the middle of a", finished=False)["finished"] is False
