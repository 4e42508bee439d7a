"""Answers: seeded, drawn as the probabilities say, ended where they end, and asked with and without the adapter."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, load_tiny, row, unigram_model
from peft import LoraConfig, get_peft_model
from tokenizers import processors

import finetune_medical_gpt2 as script
from finetune_medical_gpt2 import answer_stats, generate_answers, where_seen

QUESTIONS = ["What is a bicycle?", "What is the long and winding history of the river that crosses the old town?"]


def test_answers_are_seeded_and_hold_no_prompt(tiny):
    asked = {"max_new_tokens": 16, "temperature": 0.7}
    answers = generate_answers(*tiny, QUESTIONS, **asked, seed=1)
    assert answers == generate_answers(*tiny, QUESTIONS, **asked, seed=1)
    assert answers != generate_answers(*tiny, QUESTIONS, **asked, seed=2)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        assert question not in answer and "[/INST]" not in answer


def test_an_answer_does_not_depend_on_what_else_is_asked(tiny):
    asked = {"max_new_tokens": 16, "temperature": 0.7, "seed": 1}
    alone = [generate_answers(*tiny, [question], **asked)[0] for question in reversed(QUESTIONS)]
    assert generate_answers(*tiny, QUESTIONS, **asked) == alone[::-1]


def drawn_words(log_probs, **asked):
    """The words of 300 tokens, drawn with three seeds from the same log-probabilities at every position."""
    model, tokenizer = unigram_model(log_probs)
    asked |= {"max_new_tokens": 100}
    answers = [generate_answers(model, tokenizer, ["What?"], seed=seed, **asked) for seed in range(3)]
    words = " ".join(answer for (answer,) in answers).split()
    assert len(words) == 300
    return words


def test_answers_are_drawn_as_the_probabilities_say(tiny):
    words = [" the", " of", " and"]
    log_probs = torch.full((len(tiny[1]),), -20.0)
    ids = [tiny[1](word)["input_ids"][0] for word in words]
    log_probs[ids] = torch.tensor([0.6, 0.3, 0.1]).log()
    drawn = drawn_words(log_probs, temperature=0.5)
    # at temperature 0.5 a probability p counts as p squared
    for word, p in zip(words, (0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46), strict=True):
        assert drawn.count(word.strip()) / 300 == pytest.approx(p, abs=0.06)


def test_only_the_fifty_likeliest_tokens_are_drawn(tiny):
    tokenizer = tiny[1]
    vocabulary = tokenizer.get_vocab().items()
    words = [(token[1:], id) for token, id in vocabulary if token.startswith("Ġ") and token[1:].isalpha()][:60]
    log_probs = torch.full((len(tokenizer),), -20.0)
    for place, (_, id) in enumerate(words):
        log_probs[id] = -4 - 0.001 * place
    drawn = set(drawn_words(log_probs, temperature=1.0))
    assert len(drawn) > 40
    assert drawn <= {word for word, _ in words[:50]}


def scripted_model(tokens):
    """A model whose next token is always the next of the iterator `tokens`, and a tokenizer."""
    model, tokenizer = load_tiny()
    forward = model.forward

    def scripted_forward(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[:, -1] = -1e4
        output.logits[:, -1, next(tokens)] = 0.0
        return output

    model.forward = scripted_forward
    return model, tokenizer


@pytest.mark.parametrize("end", ["</s>", "<|endoftext|>"])
def test_an_answer_ends_at_the_end_mark_or_eos(tiny, end):
    more = tiny[1](" More of it")["input_ids"]
    tokens = iter([*tiny[1](f" Rest{end}")["input_ids"], *more])
    asked = {"max_new_tokens": 20, "temperature": 0.7, "seed": 0}
    assert generate_answers(*scripted_model(tokens), ["What is rest?"], **asked) == ["Rest"]
    assert list(tokens) == more  # which nobody waited for


def test_scoring_and_asking_leave_the_model_as_it_was(rows, monkeypatch):
    monkeypatch.setattr(script, "PROMPT", "[INST] {question} [/INST]")
    model, tokenizer = script.load_model(TINY, precision="bf16").train(), load_tiny()[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    script.score_rows(model, tokenizer, rows[1][:1], max_length=30)
    generate_answers(model, tokenizer, ["What is Water?"], max_new_tokens=2, temperature=0, seed=0)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_answer_stats_are_those_counted_by_hand():
    stats = answer_stats("The cat sat. The cat ran! Why?")
    assert stats == {"words": 7, "sentences": 3, "unique_words": 5, "distinct_bigrams": 5, "finished": True}
    assert answer_stats("") == {"words": 0, "sentences": 0, "unique_words": 0, "distinct_bigrams": 0, "finished": False}
    assert not answer_stats("It is seen in the")["finished"] and answer_stats('He said: "Why?" ')["finished"]


@pytest.mark.parametrize(
    "topic, seen",
    [
        ("gout", "trained on"),
        ("Vitamin C", "trained on"),
        ("anthrax", "held out"),
        ("Cancer (lung)", "held out"),
        ("Out", "not in the data"),  # no part of a word
        ("Scurvy", "not in the data"),  # answers don't count
        ("helpful", "not in the data"),  # nor does the system prompt
        ("in detail", "trained on"),  # of both sides, the one that was trained on
    ],
)
def test_a_topic_is_found_in_the_rows_questions(topic, seen):
    train = [row("Gout"), row("vitamin c", "It prevents scurvy.")]
    assert where_seen(topic, train, [row("Anthrax"), row("cancer (lung)")]) == seen


def test_both_are_asked_the_same_once_without_the_adapter_and_once_with_it():
    base, tokenizer = load_tiny()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    greedy = {"max_new_tokens": 12, "temperature": 0, "seed": 0}
    before = generate_answers(base, tokenizer, QUESTIONS, **greedy)
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, init_lora_weights=False)
    model = get_peft_model(base, lora)
    cfg = SimpleNamespace(
        QUESTIONS=dict(zip(["bicycle", "river"], QUESTIONS, strict=True)), MAX_NEW_TOKENS=12, TEMPERATURE=0, SEED=0
    )
    answers = script.ask_both(model, tokenizer, cfg, [row("a bicycle")], [row("a river")])
    after = generate_answers(model.merge_and_unload(), tokenizer, QUESTIONS, **greedy)
    assert [answer["seen"] for answer in answers] == ["trained on", "held out"]
    for answer, question, one, other in zip(answers, QUESTIONS, before, after, strict=True):
        assert answer["question"] == question and answer["before"] != answer["after"]
        assert (answer["before"], answer["before_stats"]) == (one, answer_stats(one))
        assert (answer["after"], answer["after_stats"]) == (other, answer_stats(other))
        # what the card's snippet gives to the model, as it is
        assert answer["prompt"] == "<|endoftext|>" + script.format_prompt(question)
