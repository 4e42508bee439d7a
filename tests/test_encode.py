"""Model and data: texts as a model sees them, whatever a tokenizer adds, cuts or pads by itself."""

import re

import pytest
from conftest import TINY
from tokenizers import processors
from transformers import AutoTokenizer

import finetune_medical_gpt2 as script
from finetune_medical_gpt2 import encode, format_prompt

QUESTIONS = ["What is gout?", "How long does the flu last for most grown people in a cold winter, and why?"]


def test_encode_marks_the_answer_and_truncates(tiny, rows):
    _, tokenizer = tiny
    text, eos = rows[0][0], tokenizer.eos_token
    whole, first, _ = encode(tokenizer, [text], 10_000, end=True)[0]
    prompt = text[: text.index("[/INST]") + 7]
    assert whole[:first] == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(whole) == text + eos
    assert whole.count(tokenizer.eos_token_id) == 1
    assert encode(tokenizer, [text], 10_000)[0].answer_bytes == len(text[len(prompt) :].encode())
    for length, ends in ((len(whole) + 1, True), (len(whole), True), (len(whole) - 1, False), (first + 3, False)):
        ids, start, _ = encode(tokenizer, [text], length, end=True)[0]
        assert (ids, start) == (whole[:length], first)
        assert (ids[-1] == tokenizer.eos_token_id) is ends


def test_a_row_that_is_cut_within_its_prompt_has_no_answer(tiny, rows):
    _, first, _ = encode(tiny[1], [rows[0][0]], 10_000)[0]
    ids, start, answer_bytes = encode(tiny[1], [rows[0][0]], first - 5)[0]
    assert start == len(ids) == first - 5
    assert answer_bytes == 0


def test_every_training_prompt_begins_with_the_ids_that_generation_uses(tiny, rows):
    _, tokenizer = tiny
    for text in rows[0]:
        question = re.search(r"<</SYS>> (.*?) \[/INST\]", text).group(1)
        prompt = tokenizer(format_prompt(question))["input_ids"]
        assert tokenizer(text)["input_ids"][: len(prompt)] == prompt


def tokenizer_that(adds):
    """The tiny tokenizer, made to add tokens by itself, to cut on the left, or to come with saved cuts and padding."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    eos = tokenizer.eos_token  # in GPT-2 the BOS, too
    templates = {"appends EOS": f"$A {eos}", "prepends BOS": f"{eos} $A", "does both": f"{eos} $A {eos}"}
    if adds in templates:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=templates[adds], special_tokens=[(eos, tokenizer.eos_token_id)]
        )
    else:
        tokenizer.backend_tokenizer.enable_truncation(20)
        tokenizer.backend_tokenizer.enable_padding(length=600)
        tokenizer.truncation_side = tokenizer.padding_side = "left"
    return tokenizer


@pytest.mark.parametrize(
    "adds, bos_tokens", [("appends EOS", 0), ("prepends BOS", 1), ("does both", 1), ("cuts and pads", 0)]
)
def test_what_a_tokenizer_does_by_itself_takes_no_part(tiny, rows, adds, bos_tokens):
    tokenizer, plain_tokenizer = tokenizer_that(adds), tiny[1]
    eos = plain_tokenizer.eos_token_id
    for text in rows[0][:5]:
        for length in (10_000, 100):
            (plain,) = encode(plain_tokenizer, [text], length - bos_tokens, end=True)
            (row,) = encode(tokenizer, [text], length, end=True)
            assert row.ids == [eos] * bos_tokens + plain.ids
            assert row.first == bos_tokens + plain.first
            assert row.answer_bytes == plain.answer_bytes
    prompts = script.pad_left(tokenizer, QUESTIONS, "cpu")
    plain_lengths = [len(plain_tokenizer(question)["input_ids"]) for question in QUESTIONS]
    assert prompts["attention_mask"].sum(1).tolist() == [bos_tokens + length for length in plain_lengths]
    assert (prompts["input_ids"][:, -1] != eos).all()


def test_a_row_that_brings_its_own_bos_and_eos_gets_no_second_ones(rows):
    tokenizer = tokenizer_that("does both")
    text = tokenizer.bos_token + rows[0][0] + tokenizer.eos_token
    (row,) = encode(tokenizer, [text], 10_000, end=True)
    assert row.ids.count(tokenizer.bos_token_id) == 2
    assert row.ids[0] == row.ids[-1] == tokenizer.eos_token_id
    assert row.ids == encode(tokenizer, [rows[0][0]], 10_000, end=True)[0].ids


def test_a_model_that_expects_a_bos_gets_it_in_the_cards_prompt():
    tokenizer = tokenizer_that("prepends BOS")
    prompt = script.model_prompt(tokenizer, "What is gout?")
    assert prompt == tokenizer.bos_token + format_prompt("What is gout?")
    ids = script.pad_left(tokenizer, [format_prompt("What is gout?")], "cpu")["input_ids"][0].tolist()
    assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == ids
