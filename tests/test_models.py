"""Model and data: whatever model comes, the figures are right, or one line says why there are none."""

import json
import math
import shutil

import pytest
import safetensors.torch
import torch
from conftest import ONE_STEP, TINY, load_tiny, plain_nll, read, set_constants
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig

import finetune_medical_gpt2 as script
from finetune_medical_gpt2 import InputError, encode, evaluate_perplexity, generate_answers

QUESTIONS = ["What is gout?", "How long does the flu last for most grown people in a cold winter, and why?"]
GREEDY = {"max_new_tokens": 16, "temperature": 0, "seed": 0}


def edited_folder(tmp_path, name, **changes):
    """A copy of the tiny model's folder with `changes` to one of its JSON files."""
    folder = shutil.copytree(TINY, tmp_path / "model")
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))
    return folder


@pytest.mark.parametrize(
    "missing, message",
    [
        ("*", "no usable tokenizer.json"),
        ("config.json", "can't be loaded: "),
        ("model.safetensors", "no file named model.safetensors"),
        ("tokenizer.json", "no usable tokenizer.json"),
    ],
)
def test_a_model_folder_without_one_of_its_files_ends_with_one_line(tmp_path, expect_error, missing, message):
    folder = shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns(missing))
    expect_error(message, MODEL_NAME=str(folder))


def test_a_model_without_one_of_its_weights_is_refused_by_the_weights_name(tmp_path, expect_error):
    folder = shutil.copytree(TINY, tmp_path / "model")
    weights, name = safetensors.torch.load_file(folder / "model.safetensors"), "transformer.h.3.mlp.c_fc.weight"
    weights[f"_orig_mod.{name}"] = weights.pop(name)  # as torch.compile saves it
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    expect_error(f"lacks 1 of the model's weights, such as {name}", MODEL_NAME=str(folder))


def test_an_encoder_decoder_is_refused_by_its_name_in_a_short_line(tmp_path):
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 6144, "d_model": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="can't be loaded: .*T5Config") as error:
        script.load_model(tmp_path)
    assert len(str(error.value)) <= 400 and "\n" not in str(error.value)


def test_a_folder_that_shadows_a_model_of_the_hub_does_not_stand_in_for_its_revision(
    tmp_path, monkeypatch, expect_error
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    shutil.copytree(TINY, tmp_path / "gpt2", dirs_exist_ok=True)
    assert script.fetch("model", "gpt2") == (tmp_path / "gpt2", None)
    expect_error("gpt2 is local, so set MODEL_REVISION = None", MODEL_NAME="gpt2", MODEL_REVISION="607a30d")


def test_a_tokenizer_without_an_end_token_ends_with_one_line(tmp_path, expect_error):
    folder = edited_folder(tmp_path, "tokenizer_config.json", eos_token=None)
    expect_error("end-of-sequence token", MODEL_NAME=str(folder))


def test_an_adapter_in_the_models_folder_is_refused(tmp_path, expect_error):
    folder = shutil.copytree(TINY, tmp_path / "model")
    lora = LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True)
    get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), lora).save_pretrained(folder)
    expect_error("also holds an adapter", MODEL_NAME=str(folder))


@pytest.mark.parametrize("changes", [{"repetition_penalty": 1.3}, {"num_beams": 4}])
def test_a_folders_generation_config_takes_no_part_in_the_answers(tmp_path, tiny, changes):
    model = script.load_model(edited_folder(tmp_path, "generation_config.json", **changes))
    assert generate_answers(model, tiny[1], QUESTIONS, **GREEDY) == generate_answers(*tiny, QUESTIONS, **GREEDY)


def test_tokens_that_a_folder_suppresses_are_answered_all_the_same(tmp_path, tiny):
    base, tokenizer = tiny
    (prompt,) = encode(tokenizer, [script.format_prompt(QUESTIONS[0])], 1024)
    with torch.no_grad():
        likeliest = base(torch.tensor([prompt.ids])).logits[0, -1].argmax().item()
    folder = edited_folder(tmp_path, "generation_config.json", suppress_tokens=[likeliest])
    (answer,) = generate_answers(script.load_model(folder), tokenizer, QUESTIONS[:1], **GREEDY)
    assert answer.startswith(tokenizer.decode(likeliest).strip())


# Models of other kinds, made on the spot: as many tokens as the tiny tokenizer has, random weights.
SMALL = {"vocab_size": 6144, "hidden_size": 64, "intermediate_size": 96, "bos_token_id": 0, "eos_token_id": 0}
OTHER_MEMORIES = {  # than the keys and values of every token
    "mistral": {"sliding_window": 16},
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


@pytest.mark.parametrize("family", OTHER_MEMORIES)
def test_a_model_of_another_memory_scores_as_a_plain_loop_does(tmp_path, rows, family):
    torch.manual_seed(0)
    size = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
    config = AutoConfig.for_model(family, **{**SMALL, **size, **OTHER_MEMORIES[family]})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, tokenizer = script.load_model(tmp_path).eval(), load_tiny()[1]
    nll = [plain_nll(model, tokenizer(text)["input_ids"][:150]) for text in rows[1][:5]]
    scores = evaluate_perplexity(model, tokenizer, rows[1][:5], max_length=150)
    assert scores["full_text"] == pytest.approx(torch.cat(nll).double().mean().exp().item(), rel=1e-4)
    assert len(generate_answers(model, tokenizer, QUESTIONS, **GREEDY)) == 2


OTHER_MODELS = {
    # c_attn is 128 to 384
    "gpt2": (
        GPT2Config(vocab_size=6144, n_embd=128, n_head=4, n_layer=1, bos_token_id=0, eos_token_id=0),
        8 * (128 + 384),
    ),
    # the queries' matrix is 64 to 64, that of the two values' heads 64 to 32
    "llama": (
        LlamaConfig(**SMALL, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
        2 * 8 * ((64 + 64) + (64 + 32)),
    ),
}


@pytest.mark.parametrize("family", OTHER_MODELS)
def test_another_model_is_trained_when_its_name_is_given(tmp_path, monkeypatch, tiny, few_rows, family):
    config, adapter_parameters = OTHER_MODELS[family]
    torch.manual_seed(0)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny[1].save_pretrained(folder)
    changes = {**ONE_STEP, "MODEL_NAME": str(folder), "DATASET_NAME": str(few_rows)}
    changes["MAX_STEPS"] = 2  # the learning rate of the first is 0: it warms up
    set_constants(monkeypatch, tmp_path / "out", **changes)
    results = read(script.main())
    before, after = results["perplexity"]["before"], results["perplexity"]["after"]
    assert math.log(before["full_text"]) == pytest.approx(math.log(6144), abs=0.3)  # it knows nothing yet
    assert after["full_text"] < before["full_text"]
    assert results["training"]["trainable_parameters"] == adapter_parameters
