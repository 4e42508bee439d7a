"""Answers: seeded, drawn as the probabilities say, and ended where they end; and models that can't be asked."""

import pytest
import torch
from conftest import TINY, load_tiny, unigram_model
from transformers import RobertaConfig, RobertaForCausalLM, RwkvConfig, RwkvForCausalLM

import finetune_medical_gpt2 as script
from finetune_medical_gpt2 import InputError, answer_stats, ask, generate_answers

QUESTIONS = ["What is a bicycle?", "What is the long and winding history of the river that crosses the old town?"]


def test_answers_are_seeded_and_leave_torchs_random_state_alone(tiny):
    asked = {"max_new_tokens": 16, "temperature": 0.7}
    torch.manual_seed(123)
    state = torch.get_rng_state()
    answers = generate_answers(*tiny, QUESTIONS, **asked, seed=1)
    assert answers == generate_answers(*tiny, QUESTIONS, **asked, seed=1)
    assert answers != generate_answers(*tiny, QUESTIONS, **asked, seed=2)
    assert torch.equal(state, torch.get_rng_state())
    for question, answer in zip(QUESTIONS, answers, strict=True):
        assert question not in answer and "[/INST]" not in answer


def test_answers_are_the_same_in_a_batch_as_alone(tiny):
    greedy = {"max_new_tokens": 16, "temperature": 0, "seed": 1}
    alone = [generate_answers(*tiny, [question], **greedy)[0] for question in QUESTIONS]
    assert generate_answers(*tiny, QUESTIONS, **greedy) == alone


def drawn_words(log_probs, **asked):
    """The words of 500 tokens, drawn for five questions from the same log-probabilities at every position."""
    model, tokenizer = unigram_model(log_probs)
    words = " ".join(generate_answers(model, tokenizer, ["What?"] * 5, max_new_tokens=100, seed=3, **asked)).split()
    assert len(words) == 500
    return words


def test_answers_are_drawn_as_the_probabilities_say(tiny):
    words = [" the", " of", " and"]
    log_probs = torch.full((len(tiny[1]),), -20.0)
    ids = [tiny[1](word)["input_ids"][0] for word in words]
    log_probs[ids] = torch.tensor([0.6, 0.3, 0.1]).log()
    drawn = drawn_words(log_probs, temperature=0.5)
    # at temperature 0.5 a probability p counts as p squared
    for word, p in zip(words, (0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46), strict=True):
        assert drawn.count(word.strip()) / 500 == pytest.approx(p, abs=0.06)


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
    assert ask(*scripted_model(tokens), ["What is rest?"], **asked) == [("Rest", True)]
    assert list(tokens) == more  # which nobody waited for


def test_an_answer_that_is_cut_off_has_not_ended(tiny):
    tokens = iter(tiny[1](" Rest")["input_ids"])
    asked = {"max_new_tokens": len(tiny[1](" Rest")["input_ids"]), "temperature": 0.7, "seed": 0}
    assert ask(*scripted_model(tokens), ["What is rest?"], **asked) == [("Rest", False)]


def test_scoring_and_asking_leave_the_model_as_it_was(rows, monkeypatch):
    monkeypatch.setattr(script, "PROMPT", "[INST] {question} [/INST]")
    model, tokenizer = script.load_model(TINY, precision="bf16").train(), load_tiny()[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    script.score_rows(model, tokenizer, rows[1][:1], max_length=30)
    generate_answers(model, tokenizer, ["What is Water?"], max_new_tokens=2, temperature=0, seed=0)
    with pytest.raises(ZeroDivisionError), script.inference(model):
        _ = 1 / 0
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_answer_stats_are_those_counted_by_hand():
    stats = answer_stats("The cat sat. The cat ran! Why?")
    assert stats == {"words": 7, "sentences": 3, "unique_words": 5, "distinct_bigrams": 5, "finished": True}
    assert answer_stats("") == {"words": 0, "sentences": 0, "unique_words": 0, "distinct_bigrams": 0, "finished": False}
    assert answer_stats("It stops in the middle of a.", finished=False)["finished"] is False


# Models that are made on the spot: as many tokens as the tiny tokenizer has, random weights.
SMALL = {"vocab_size": 6144, "hidden_size": 64, "intermediate_size": 96, "bos_token_id": 0, "eos_token_id": 0}


def test_a_model_that_sees_the_future_is_refused(tiny):
    torch.manual_seed(0)
    size = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 1026}
    config = RobertaConfig(**SMALL, **size, initializer_range=0.15)
    with pytest.raises(InputError, match="not causal"):
        script.check_model(RobertaForCausalLM(config).eval(), tiny[1])
    config.is_decoder = True
    script.check_model(RobertaForCausalLM(config).eval(), tiny[1])


def test_a_model_that_ignores_the_padding_is_refused(tiny):
    torch.manual_seed(1)
    config = RwkvConfig(**SMALL, num_hidden_layers=3, attention_hidden_size=64, context_length=1024)
    with pytest.raises(InputError, match="ignores the attention mask"):
        script.check_model(RwkvForCausalLM(config).eval(), tiny[1])
