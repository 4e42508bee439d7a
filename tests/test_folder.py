"""Folder: a run's name stands for all that its training depends on, and for nothing else."""

import re
import shutil
from types import SimpleNamespace

import pytest
from conftest import TINY

import finetune_medical_gpt2 as script

# A value of each setting that the training depends on, other than its own.
TRAINED = {
    "TEST_SIZE": 0.2,
    "MAX_LENGTH": 128,
    "SEED": 43,
    "DROP_EMPTY_ANSWERS": False,
    "LORA_R": 4,
    "LORA_ALPHA": 8,
    "LORA_DROPOUT": 0.0,
    "LORA_TARGET_MODULES": ["c_attn"],
    "NUM_EPOCHS": 2,
    "MAX_STEPS": 5,
    "LEARNING_RATE": 2e-4,
    "BATCH_SIZE": 2,
    "GRADIENT_ACCUMULATION_STEPS": 3,
    "WARMUP_RATIO": 0.1,
    "MAX_GRAD_NORM": 1.0,
    "LOGGING_STEPS": 1,
    "EVAL_STEPS": 7,
    "TRAIN_ON_PROMPT": False,
    "BASE_DROPOUT": 0.1,
}
# And of those that it does not depend on; model and data count by their content.
NOT_TRAINED = {
    "QUESTIONS": {"Asthma": "What triggers asthma?"},
    "MAX_NEW_TOKENS": 3,
    "TEMPERATURE": 0,
    "REPORT_TO": "wandb",
    "OFFLINE_FALLBACK": False,
    "MODEL_REVISION": "main",
    "DATASET_REVISION": "main",
    "DATASET_NAME": "elsewhere.jsonl",
    "MODEL_NAME": "elsewhere/tiny_gpt2",
    "OUTPUT_DIR": "elsewhere",
    "GRADIENT_CHECKPOINTING": True,
}


def folder_name(train=("a row",), held_out=("another",), model=TINY, commit="c" * 40, **changes):
    settings = {name: getattr(script, name) for name in script.SETTINGS}
    settings |= {"MODEL_NAME": "tiny_gpt2", **changes}
    return script.run_folder(SimpleNamespace(**settings), model, commit, train, held_out).name


def test_a_run_with_another_training_has_another_folder(tmp_path, monkeypatch):
    assert {*TRAINED, *NOT_TRAINED} == set(script.SETTINGS)
    names = [folder_name(**{name: value}) for name, value in TRAINED.items()]
    names += [folder_name(train=["other rows"]), folder_name(held_out=["other rows"]), folder_name()]
    model = shutil.copytree(TINY, tmp_path / "model")
    names += [folder_name(commit="d" * 40), folder_name(model=model, commit=None)]
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    names.append(folder_name(model=model, commit=None))
    monkeypatch.setattr(script, "PROMPT", "[INST] {question} [/INST]")
    names.append(folder_name())
    assert len(set(names)) == len(names) == len(TRAINED) + 7


@pytest.mark.parametrize("name", NOT_TRAINED)
def test_what_training_does_not_depend_on_leaves_the_folder_as_it_is(name):
    assert folder_name(**{name: NOT_TRAINED[name]}) == folder_name()


@pytest.mark.parametrize(
    "model, start",
    [
        ("gpt2", "gpt2-"),
        ("openai-community/gpt2", "gpt2-"),
        (".", "my-model-"),  # the folder that one is in
        ("models/v1.5_b/", "v1.5_b-"),
        ("a: b$c", "a-b-c-"),
        ("m" * 250, "m" * 60 + "-"),
    ],
)
def test_a_runs_folder_has_a_name_that_any_disk_takes(tmp_path, monkeypatch, model, start):
    (tmp_path / "my model").mkdir()
    monkeypatch.chdir(tmp_path / "my model")
    assert re.fullmatch(re.escape(start) + "[0-9a-f]{8}", folder_name(MODEL_NAME=model))


def test_a_data_files_name_stands_without_its_ending():
    assert script.short_name("data/terms.v2.jsonl.gz") == script.short_name("someone/terms.v2") == "terms.v2"
