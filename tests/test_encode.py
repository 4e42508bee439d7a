"""Model and data: texts as a model sees them, whatever a tokenizer adds, cuts or pads by itself."""

import json
import re
import shutil

import pytest
from conftest import TINY, load_tiny
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from finetune_medical_gpt2 import encode, format_prompt, generate_answers, leading_ids, load_tokenizer


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
    templates = {
        "appends EOS": f"$A {eos}",
        "prepends BOS": f"{eos} $A",
        "does both": f"{eos} $A {eos}",
        "prepends two others": f"Ġthe Ġof $A {eos}",
    }
    if adds in templates:
        tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (eos, "Ġthe", "Ġof")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=templates[adds], special_tokens=tokens
        )
    else:
        tokenizer.backend_tokenizer.enable_truncation(20)
        tokenizer.backend_tokenizer.enable_padding(length=600)
        tokenizer.truncation_side = tokenizer.padding_side = "left"
    return tokenizer


LEADING = {
    "appends EOS": "",
    "prepends BOS": "<|endoftext|>",
    "does both": "<|endoftext|>",
    "prepends two others": " the of",
    "cuts and pads": "",
}


@pytest.mark.parametrize("adds", LEADING)
def test_of_what_a_tokenizer_does_by_itself_only_its_leading_tokens_take_part(tiny, rows, adds):
    tokenizer, plain_tokenizer = tokenizer_that(adds), tiny[1]
    leading = plain_tokenizer(LEADING[adds])["input_ids"]
    assert leading_ids(tokenizer) == leading
    for text in rows[0][:5]:
        for length in (10_000, 100):
            (plain,) = encode(plain_tokenizer, [text], length - len(leading), end=True)
            (row,) = encode(tokenizer, [text], length, end=True)
            assert row.ids == leading + plain.ids
            assert row.answer_start == len(leading) + plain.answer_start
            assert row.answer_bytes == plain.answer_bytes


@pytest.mark.parametrize("adds", ["does both", "prepends two others"])
def test_a_row_that_brings_its_own_leading_tokens_and_eos_gets_no_second_ones(rows, adds):
    tokenizer = tokenizer_that(adds)
    text = LEADING[adds] + rows[0][0] + tokenizer.eos_token
    (row,) = encode(tokenizer, [text], 10_000, end=True)
    assert row.ids == encode(tokenizer, [rows[0][0]], 10_000, end=True)[0].ids


@pytest.mark.parametrize("adds", LEADING)
def test_a_question_is_asked_after_the_leading_tokens(tiny, adds):
    model, asked = load_tiny()[0], []
    model.generate = lambda ids, **options: asked.append(ids[0].tolist()) or ids
    generate_answers(model, tokenizer_that(adds), ["What is gout?"], max_new_tokens=1, temperature=0, seed=0)
    assert asked == [tiny[1](LEADING[adds] + format_prompt("What is gout?"))["input_ids"]]


DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
OWN_STEPS = {
    "digits one by one": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}},
    "lower case": {"normalizer": {"type": "Lowercase"}},
}


@pytest.mark.parametrize("steps", OWN_STEPS)
def test_texts_are_tokenized_as_tokenizer_json_says(tmp_path, tiny, steps):
    folder = shutil.copytree(TINY, tmp_path / "model")
    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | OWN_STEPS[steps]))
    # from which transformers builds a plain GPT-2 tokenizer anew
    settings.write_text(json.dumps({"tokenizer_class": "GPT2TokenizerFast", "eos_token": "<|endoftext|>"}))
    text = "[INST] What was THE FLU of 1917? [/INST] In 1918 THE FLU took 17 000 lives. </s>"
    ids = Tokenizer.from_file(str(path)).encode(text).ids
    assert ids != tiny[1](text)["input_ids"]
    tokenizer = load_tokenizer(folder)
    assert encode(tokenizer, [text], 10_000)[0].ids == ids
    tokenizer.save_pretrained(tmp_path / "adapter")  # and so do those who load the adapter
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter")(text)["input_ids"] == ids
