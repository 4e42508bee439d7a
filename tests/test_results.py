"""Results: the files of a run and what they say; what was saved can be used."""

import json
import math
import re
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from conftest import ONE_STEP, TESTS, flat, read, set_constants
from peft import AutoPeftModelForCausalLM
from transformers import pipeline

import finetune_medical_gpt2 as script


def test_a_run_leaves_all_its_files_whole(short_run):
    for name in ("results.json", "report.md", "training_loss.png", "perplexity_comparison.png", "adapter/README.md"):
        assert (short_run / name).stat().st_size > 500, name
    assert not list(short_run.rglob("*.tmp"))
    assert short_run.name.startswith("tiny_gpt2-")


def test_results_json_has_the_keys_that_readers_rely_on(short_run):
    results = read(short_run)
    assert set(results) == {
        "model",
        "model_revision",
        "dataset",
        "dataset_revision",
        "offline_fallback",
        "settings",
        "versions",
        "hardware",
        "data",
        "perplexity",
        "training",
        "answers",
    }
    assert set(results["perplexity"]["before"]) == {
        "full_text",
        "answer",
        "seed_protocol",
        "bits_per_byte",
        "tokens",
        "answer_tokens",
        "answer_ci95",
    }
    for answer in results["answers"]:
        assert answer["prompt"] == script.format_prompt(answer["question"])
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
    assert training["trainable_parameters"] == 7 * 8 * (256 + 3 * 256)  # r 8, on c_attn in each of 7 layers
    assert training["total_parameters"] == 7_363_840 + training["trainable_parameters"]


def test_the_interval_holds_the_answer_perplexity(short_run):
    after = read(short_run)["perplexity"]["after"]
    low, high = after["answer_ci95"]
    assert low < after["answer"] < high


def test_a_report_can_be_written_again_from_the_results(short_run, tmp_path):
    script.write_report(read(short_run), tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text() == (short_run / "report.md").read_text()


# 100 tokens at 3 nats, of which 40 in answers at 4: so 60 in prompts at 140 / 60. After it all 100 at 2, the answers
# at 3.5, and the prompts at 60 / 60. The fall of 100 nats is 80 on the prompts and 20 on the answers.
BEFORE = {"tokens": 100, "answer_tokens": 40, "full_text": math.exp(3), "answer": math.exp(4)}
AFTER = {"tokens": 100, "answer_tokens": 40, "full_text": math.exp(2), "answer": math.exp(3.5)}


def test_the_fall_in_loss_is_split_between_prompts_and_answers():
    prompts, answers, both = script.split_fall(BEFORE, AFTER)
    assert prompts.pop("name") == "prompts" and answers.pop("name") == "answers" and both.pop("name") == "all"
    assert prompts == pytest.approx({"tokens": 60, "before": 140 / 60, "after": 1.0, "fall": 80})
    assert answers == pytest.approx({"tokens": 40, "before": 4.0, "after": 3.5, "fall": 20})
    assert both == pytest.approx({"tokens": 100, "before": 3.0, "after": 2.0, "fall": 100})


def test_a_fall_without_answers_is_all_on_the_prompts():
    nothing = {"answer": None, "answer_tokens": 0}
    prompts, answers, _ = script.split_fall(BEFORE | nothing, AFTER | nothing)
    assert (prompts["tokens"], answers["tokens"], answers["fall"]) == (100, 0, 0)
    assert prompts["fall"] == pytest.approx(100)


def test_the_figures_in_the_report_are_those_computed_by_hand(short_run, tmp_path):
    results = read(short_run)
    results["perplexity"]["before"] |= BEFORE
    results["perplexity"]["after"] |= AFTER
    results["answers"][0]["before_stats"] |= {"words": 5, "distinct_bigrams": 3, "finished": False}
    results["answers"][0]["after_stats"] |= {"words": 9, "distinct_bigrams": 4, "finished": True}
    script.write_report(results, tmp_path / "report.md")
    report = (tmp_path / "report.md").read_text()
    lines = report.splitlines()
    assert "| prompts | 60 | 2.33 | 1.00 | 80 | 80 % |" in lines
    assert "| answers | 40 | 4.00 | 3.50 | 20 | 20 % |" in lines
    assert "| all | 100 | 3.00 | 2.00 | 100 | 100 % |" in lines
    assert "| answers only | 54.60 | 33.12 | -39 % |" in lines  # exp(4), exp(3.5)
    assert "| full text | 20.09 | 7.39 | -63 % |" in lines  # exp(3), exp(2)
    assert f"| {results['answers'][0]['topic']} | 5 → 9 | 25 % → 50 % | no → yes |" in lines  # 3 of 4, 4 of 8 differ
    assert "Of the whole fall in loss, 80 % is on the prompts" in report


def test_an_answer_without_two_words_repeats_no_pair():
    assert script.repeated_pairs({"words": 0, "distinct_bigrams": 0}) == "0 %"
    assert script.repeated_pairs({"words": 1, "distinct_bigrams": 0}) == "0 %"


def test_hostile_text_stays_in_its_cell(short_run, tmp_path):
    hostile = "```\n\n# Heading\n</td></tr></table>\n\n| a | b |\n<script>alert(1)</script> \x1b[31m ![x](http://y.org)"
    results = read(short_run)
    results["answers"][0] |= {"topic": hostile, "question": hostile, "before": hostile, "after": hostile}
    script.write_report(results, tmp_path / "hostile.md")
    harmless = (short_run / "report.md").read_text().splitlines()
    text = (tmp_path / "hostile.md").read_text()
    lines = text.splitlines()
    assert len(lines) == len(harmless)  # so nothing begins a line, or a paragraph, of its own
    assert text.count("<table>") == text.count("</table>") == 1
    assert "<script>" not in text and "\x1b" not in text
    structure = [line for line in harmless if line.startswith(("#", "```"))]
    assert [line for line in lines if line.startswith(("#", "```"))] == structure


def test_the_card_tells_the_hub_what_the_adapter_is_of(short_run, tmp_path):
    run = shutil.copytree(short_run, tmp_path / "run")
    results = read(run)
    local = huggingface_hub.ModelCard((run / "adapter" / "README.md").read_text()).data
    assert (local.library_name, local.pipeline_tag) == ("peft", "text-generation")
    assert (local.base_model, local.datasets) == (None, None)  # nothing that the Hub would know
    assert (local.license, local.license_name) == ("other", "as-the-base-model")

    results |= {"model": "gpt2", "model_revision": "a" * 40, "dataset": "some/data", "dataset_revision": "b" * 40}
    script.write_model_card(results, run / "adapter")
    card = huggingface_hub.ModelCard((run / "adapter" / "README.md").read_text())
    assert (card.data.base_model, card.data.datasets) == ("gpt2", ["some/data"])
    assert (card.data.license, card.data.license_name) == ("mit", None)
    assert card.data.model_name == "gpt2-data-lora"
    assert card.text.startswith("\n# LoRA fine-tuning of gpt2 on data\n")


SCORE_AS_THE_SCRIPT = """
import json
import finetune_medical_gpt2 as script
for module in model.modules():
    if hasattr(module, "act"):  # as the script loads it: the same function, rounded once
        module.act = script.torch.nn.GELU(approximate="tanh")
settings = json.loads(open("../results.json", encoding="utf-8").read())["settings"]
split = {"test_size": settings["TEST_SIZE"], "seed": settings["SEED"]}
texts = script.load_splits(settings["DATASET_NAME"], **split)[1]["text"]
print(json.dumps(script.evaluate_perplexity(model, tokenizer, texts, max_length=settings["MAX_LENGTH"])))
"""


def test_in_a_new_process_the_cards_snippet_runs_as_printed_and_its_model_scores_what_the_results_say(short_run):
    card = (short_run / "adapter" / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.S).group(1)
    command = [sys.executable, "-c", snippet + SCORE_AS_THE_SCRIPT]
    done = subprocess.run(command, cwd=short_run / "adapter", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer, scores = done.stdout.rsplit("\n", 2)[:2]
    assert answer.strip()
    tolerance = 0.01 if read(short_run)["hardware"]["precision"] == "bf16" else 1e-3  # the snippet runs in fp32
    assert flat(json.loads(scores)) == pytest.approx(flat(read(short_run)["perplexity"]["after"]), rel=tolerance)


def test_the_merged_model_is_plain_and_answers_as_the_adapter(short_run):
    adapter = AutoPeftModelForCausalLM.from_pretrained(short_run / "adapter", dtype=torch.float32).eval()
    generator = pipeline("text-generation", model=str(short_run / "merged"), dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(generator.model(ids).logits, adapter(input_ids=ids).logits, atol=1e-3)
    assert not list((short_run / "merged").glob("adapter*"))
    prompt = script.format_prompt("What is a fever?")
    (told,) = generator(prompt, max_new_tokens=4, do_sample=False)
    assert told["generated_text"].startswith(prompt) and len(told["generated_text"]) > len(prompt)


@pytest.mark.parametrize("folder", ["adapter", "merged"])
def test_a_saved_tokenizer_neither_cuts_nor_pads(short_run, folder):
    state = json.loads((short_run / folder / "tokenizer.json").read_text())
    assert state["truncation"] is None and state["padding"] is None


def test_the_adapter_of_a_relative_model_name_finds_its_base_from_anywhere(tmp_path, monkeypatch, few_rows):
    monkeypatch.chdir(TESTS)
    set_constants(monkeypatch, tmp_path / "out", MODEL_NAME="tiny_gpt2", DATASET_NAME=str(few_rows), **ONE_STEP)
    adapter = json.loads((script.main() / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(TESTS / "tiny_gpt2")
