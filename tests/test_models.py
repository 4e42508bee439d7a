"""Whatever model and tokenizer come: the figures are right, or one line says why there are none."""

import json
import shutil

import pytest
import torch
from conftest import TESTS, load_tiny, set_constants
from peft import LoraConfig, get_peft_model
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    RobertaConfig,
    RobertaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

import finetune_medical_gpt2 as script
from finetune_medical_gpt2 import InputError, encode, evaluate_perplexity, generate_answers

TINY = TESTS / "tiny_gpt2"
QUESTIONS = ["What is gout?", "How long does the flu last for most grown people in a cold winter, and why?"]
GREEDY = {"max_new_tokens": 8, "temperature": 0, "seed": 0}


def edited_folder(tmp_path, name, **changes):
    """A copy of the tiny model's folder with `changes` to one of its JSON files."""
    folder = shutil.copytree(TINY, tmp_path / "model")
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))
    return folder


@pytest.mark.parametrize(
    "changes", [{"repetition_penalty": 1.3}, {"num_beams": 4}, {"max_length": 130}, {"suppress_tokens": [5]}]
)
def test_a_folders_generation_config_takes_no_part_in_the_answers(tmp_path, tiny, changes):
    model = script.load_model(edited_folder(tmp_path, "generation_config.json", **changes))
    assert generate_answers(model, tiny[1], QUESTIONS, **GREEDY) == generate_answers(*tiny, QUESTIONS, **GREEDY)


def test_a_config_that_asks_for_other_outputs_changes_nothing(tmp_path, tiny, rows):
    changes = {"return_dict": False, "output_hidden_states": True, "output_attentions": True}
    model = script.load_model(edited_folder(tmp_path, "config.json", **changes))
    script.check_model(model, tiny[1])
    for score in (evaluate_perplexity, lambda *args, **kwargs: generate_answers(*args[:2], QUESTIONS, **GREEDY)):
        assert score(model, tiny[1], rows[1][:2], max_length=99) == score(*tiny, rows[1][:2], max_length=99)


def tokenizer_that(adds):
    """The tiny tokenizer, made to add tokens by itself, to cut on the left, or to come with saved cuts and padding."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    end = tokenizer.eos_token
    tokens = [(end, tokenizer.eos_token_id)]
    template = {"appends EOS": f"$A {end}", "prepends BOS": f"{end} $A", "does both": f"{end} $A {end}"}.get(adds)
    if template:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=tokens
        )
    if adds == "cuts and pads":
        tokenizer.backend_tokenizer.enable_truncation(20)
        tokenizer.backend_tokenizer.enable_padding(length=600)
        tokenizer.truncation_side = tokenizer.padding_side = "left"
    return tokenizer


@pytest.mark.parametrize("adds", ["appends EOS", "prepends BOS", "does both", "cuts and pads"])
def test_what_a_tokenizer_does_by_itself_takes_no_part(tiny, rows, adds):
    tokenizer, eos = tokenizer_that(adds), tiny[1].eos_token_id
    bos = [eos] if "BOS" in adds or "both" in adds else []  # GPT-2's BOS and EOS are one token
    for text in rows[0][:5]:
        for length in (10_000, 100):
            plain = encode(tiny[1], [text], length - len(bos), end=True)[0]
            row = encode(tokenizer, [text], length, end=True)[0]
            assert row.ids == bos + plain.ids
            assert row.first == plain.first + len(bos) and row.answer_bytes == plain.answer_bytes
    prompts = script.pad_left(tokenizer, QUESTIONS, "cpu")
    assert prompts["attention_mask"].sum(1).tolist() == [
        len(bos) + len(tiny[1](question)["input_ids"]) for question in QUESTIONS
    ]
    assert (prompts["input_ids"][:, -1] != eos).all()


def test_a_row_that_brings_its_own_bos_and_eos_gets_no_second_ones(rows):
    tokenizer = tokenizer_that("does both")
    text = tokenizer.bos_token + rows[0][0] + tokenizer.eos_token
    (row,) = encode(tokenizer, [text], 10_000, end=True)
    assert row.ids.count(tokenizer.bos_token_id) == 2 and row.ids[0] == row.ids[-1] == tokenizer.eos_token_id
    assert row.ids == encode(tokenizer, [rows[0][0]], 10_000, end=True)[0].ids


def test_a_model_that_expects_a_bos_gets_it_in_the_cards_prompt():
    tokenizer = tokenizer_that("prepends BOS")
    prompt = script.model_prompt(tokenizer, "What is gout?")
    assert prompt == tokenizer.bos_token + script.format_prompt("What is gout?")
    ids = script.pad_left(tokenizer, [script.format_prompt("What is gout?")], "cpu")["input_ids"][0].tolist()
    assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == ids


def error_of(tmp_path, monkeypatch, capsys, folder, **changes):
    """The one line with which main() refuses a model, before any run is begun."""
    set_constants(monkeypatch, tmp_path / "out", MODEL_NAME=str(folder), **changes)
    capsys.readouterr()  # what making the folder showed
    with pytest.raises(SystemExit) as stop:
        script.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert not list(tmp_path.glob("out/*/*"))
    return error


def test_an_adapter_in_the_models_folder_is_refused(tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(TINY, tmp_path / "model")
    lora = LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True)
    get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), lora).save_pretrained(folder)
    assert "also holds an adapter" in error_of(tmp_path, monkeypatch, capsys, folder)


def test_more_tokens_than_embeddings_are_refused(tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(TINY, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    error = error_of(tmp_path, monkeypatch, capsys, folder)
    assert "6,145 tokens" in error and "6,144" in error


SMALL = {"vocab_size": 6144, "hidden_size": 64, "intermediate_size": 96, "bos_token_id": 0, "eos_token_id": 0}


def test_a_model_that_sees_the_future_is_refused():
    torch.manual_seed(0)
    size = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 1026}
    config = RobertaConfig(**SMALL, **size, initializer_range=0.15)
    with pytest.raises(InputError, match="not causal"):
        script.check_model(RobertaForCausalLM(config).eval(), load_tiny()[1])
    config.is_decoder = True
    script.check_model(RobertaForCausalLM(config).eval(), load_tiny()[1])


def test_a_model_that_ignores_the_padding_is_refused():
    torch.manual_seed(1)
    config = RwkvConfig(**SMALL, num_hidden_layers=3, attention_hidden_size=64, context_length=1024)
    with pytest.raises(InputError, match="ignores the attention mask"):
        script.check_model(RwkvForCausalLM(config).eval(), load_tiny()[1])


HYBRIDS = {
    "lfm2": {"full_attn_idxs": [1, 3]},
    "qwen3_5_text": {
        "head_dim": 16,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_hybrid_model_scores_as_a_plain_loop_does(tmp_path, rows, family):
    torch.manual_seed(0)
    size = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
    config = AutoConfig.for_model(family, **{**SMALL, **size, **HYBRIDS[family]})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, tokenizer = script.load_model(tmp_path).eval(), load_tiny()[1]
    script.check_model(model, tokenizer)
    nll = []
    for text in rows[1][:5]:
        ids = torch.tensor([tokenizer(text)["input_ids"][:150]])
        with torch.no_grad():
            nll.append(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    scores = evaluate_perplexity(model, tokenizer, rows[1][:5], max_length=150)
    assert scores["full_text"] == pytest.approx(torch.cat(nll).double().mean().exp().item(), rel=1e-4)
    assert len(generate_answers(model, tokenizer, QUESTIONS, **GREEDY)) == 2
