"""Results: the files of a run and what they say; what was saved can be used."""

import json
import math

import pytest
from conftest import MICRO, ONE_STEP, TINY, read, set_constants

import finetune_medical_gpt2 as script


def test_a_run_leaves_all_its_files_whole(short_run):
    for name in ("results.json", "report.md", "training_loss.png", "perplexity_comparison.png", "adapter/README.md"):
        assert (short_run / name).stat().st_size > 500, name
    assert not list(short_run.rglob("*.tmp"))
    assert short_run.name.startswith("micro_gpt2-")


PERPLEXITIES = {"answer", "answer_ci95", "full_text", "reference_protocol", "bits_per_byte", "tokens", "answer_tokens"}
KEYS = {
    "": "model model_revision dataset dataset_revision offline_fallback settings versions hardware data perplexity "
    "facts training stage_seconds answers",
    "hardware": "device precision name processes threads",
    "data": "rows train_rows test_rows dropped_empty dropped_duplicate dropped_malformed truncated_train_rows",
    "perplexity": "before after shown_one_row trained everyday prompt_share",
    "facts": "count before after change change_ci95",
    "training": "steps tokens seconds tokens_per_second trainable_parameters total_parameters log_history",
    "stage_seconds": "before training after answers",
}


def test_results_json_has_the_keys_that_readers_rely_on(short_run):
    results = read(short_run)
    for group, names in KEYS.items():
        assert set(results[group] if group else results) == set(names.split()), group
    assert set(results["settings"]) == set(script.SETTINGS)
    for when in ("before", "after"):
        assert set(results["perplexity"][when]) == PERPLEXITIES
    for answer in results["answers"]:
        assert answer["prompt"] == script.format_prompt(answer["question"])
        assert answer["seen"] in ("trained on", "held out", "not in the data")
        assert set(answer["after_stats"]) == {"words", "sentences", "unique_words", "distinct_bigrams", "finished"}


def test_the_log_history_goes_from_the_base_model_to_the_saved_adapter(short_run):
    training = read(short_run)["training"]
    assert training["steps"] == 24
    history = training["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 10, 20, 24]
    assert [entry["step"] for entry in history if "loss" in entry] == [5, 10, 15, 20, 24]
    for when, entry in (("before", history[0]), ("after", history[-1])):
        scores = read(short_run)["perplexity"][when]
        assert math.exp(entry["eval_loss"]) == pytest.approx(scores["full_text"])
        assert math.exp(entry["eval_answer_loss"]) == pytest.approx(scores["answer"])


def test_trained_parameters_are_counted_by_hand(short_run):
    training = read(short_run)["training"]
    assert training["trainable_parameters"] == 8 * (64 + 3 * 64)  # r 8, on c_attn in its one layer
    assert training["total_parameters"] == 508_864 + training["trainable_parameters"]


def test_a_rounded_head_that_shares_its_embeddings_is_counted_once():
    model = script.load_model(TINY, precision="bf16")
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    model = script.add_adapter(model, script.LoraConfig(task_type="CAUSAL_LM", r=8, fan_in_fan_out=True), seed=0)
    assert model.get_base_model().size == 7_363_840


def test_the_interval_holds_the_answer_perplexity(short_run):
    after = read(short_run)["perplexity"]["after"]
    low, high = after["answer_ci95"]
    assert low < after["answer"] < high


def test_a_saved_tokenizer_neither_cuts_nor_pads(short_run):
    state = json.loads((short_run / "adapter" / "tokenizer.json").read_text())
    assert state["truncation"] is None and state["padding"] is None
    settings = json.loads((short_run / "adapter" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # which transformers 4 knows, too


def test_the_adapter_of_a_relative_model_name_finds_its_base_from_anywhere(tmp_path, monkeypatch, few_rows):
    monkeypatch.chdir(MICRO.parent)
    changes = {**ONE_STEP, "MODEL_NAME": "micro_gpt2", "DATASET_NAME": str(few_rows)}
    set_constants(monkeypatch, tmp_path / "out", **changes)
    adapter = json.loads((script.main() / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(MICRO)
