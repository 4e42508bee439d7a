"""Training: what the loss sees, what is counted, and which checkpoints are kept."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import ONE_STEP, SHORT_RUN, read, set_constants

import finetune_medical_gpt2 as script


def test_the_tokens_counted_are_those_of_the_rows_without_padding(short_run, tiny, rows):
    lengths = [len(tiny[1](text)["input_ids"]) + 1 for text in rows[0]]  # EOS follows
    cut = [min(length, SHORT_RUN["MAX_LENGTH"]) for length in lengths]
    results = read(short_run)
    assert results["training"]["tokens"] / (24 * 2) == pytest.approx(sum(cut) / len(cut), rel=0.05)
    assert results["data"]["truncated_train_rows"] == sum(length > SHORT_RUN["MAX_LENGTH"] for length in lengths)


@pytest.mark.parametrize(
    "on_prompt, labels", [(True, [[-100, 6, 7, 8], [-100, 6, 9]]), (False, [[-100, -100, 7, 8], [-100, -100, -100]])]
)
def test_labels_are_the_tokens_that_the_loss_is_over(on_prompt, labels):
    encoded = [script.Row([5, 6, 7, 8], first=2, answer_bytes=9), script.Row([5, 6, 9], first=3, answer_bytes=0)]
    data = script.training_data(encoded, on_prompt)
    assert data["input_ids"][:] == [[5, 6, 7, 8], [5, 6, 9]]
    assert data["labels"][:] == labels


@pytest.mark.parametrize("on_prompt", [True, False])
def test_the_loss_of_a_real_batch_is_over_what_train_on_prompt_says(tmp_path, monkeypatch, tiny, few_rows, on_prompt):
    length = 224  # cuts some of the rows
    changes = {**ONE_STEP, "DATASET_NAME": str(few_rows), "BATCH_SIZE": 8, "MAX_LENGTH": length}
    set_constants(monkeypatch, tmp_path / "out", TRAIN_ON_PROMPT=on_prompt, **changes)
    compute_loss, seen = script.LoRATrainer.compute_loss, []

    def compute_and_note(self, model, inputs, **kwargs):
        seen.extend(zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True))
        return compute_loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(script.LoRATrainer, "compute_loss", compute_and_note)
    monkeypatch.setattr(script, "choose_hardware", lambda: script.Machine("cpu", "fp32", "a CPU"))
    results = read(script.main())
    model, tokenizer = tiny

    # a fresh adapter changes nothing, so the first step's loss is the base model's
    nll = tokens = 0
    for ids, labels, _ in seen:
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        nll += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()  # but for -100
        tokens += int((labels[1:] != -100).sum())
    losses = [entry["loss"] for entry in results["training"]["log_history"] if "loss" in entry]
    assert losses == [pytest.approx(nll / tokens, rel=1e-4)]

    assert results["training"]["tokens"] == sum(int(mask.sum()) for _, _, mask in seen)
    cut_rows = 0
    assert len(seen) == 8
    for ids, labels, mask in seen:
        end = int(mask.sum())
        assert (labels[end:] == -100).all()
        begin = 1 if on_prompt else int((labels == -100)[:end].sum())  # the first token is never predicted
        assert (labels[:begin] == -100).all()
        assert (labels[begin:end] == ids[begin:end]).all()
        if not on_prompt:
            assert tokenizer.decode(ids[:begin]).endswith("[/INST]")
        ended = bool(ids[end - 1] == tokenizer.eos_token_id)
        assert labels[:end].tolist().count(tokenizer.eos_token_id) == ended
        assert ended or end == length
        cut_rows += not ended
    assert 0 < cut_rows < 8
    first = results["training"]["log_history"][0]["eval_loss"]
    assert math.exp(first) == pytest.approx(results["perplexity"]["before"]["full_text" if on_prompt else "answer"])


def test_validation_losses_are_sums_over_counts():
    scores = [[10.0, 5, 4.0, 2, 99], [20.0, 5, 6.0, 3, 99]]
    assert script.validation_losses(scores, True) == {"eval_loss": 3.0, "eval_answer_loss": 2.0}
    assert script.validation_losses(scores, False) == {"eval_loss": 2.0, "eval_answer_loss": 2.0}


@pytest.mark.parametrize("processes", [1, 2])
def test_activations_are_computed_twice_where_they_would_fill_the_memory(tiny, monkeypatch, processes):
    # 2 rows of 100 tokens; 7 layers, each of 34 numbers of the width 256 and 5 of each of 4 heads for every token
    needed = 2 * 100 * 7 * (34 * 256 + 5 * 4 * 100)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    for share_needed, expected in ((0.61, True), (0.59, False)):
        free = SimpleNamespace(available=processes * needed / share_needed)
        monkeypatch.setattr(script.psutil, "virtual_memory", lambda free=free: free)
        assert script.needs_checkpointing(tiny[0], 2, 100) is expected


def test_a_loss_that_turns_nan_names_the_step_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys, few_rows):
    changes = {**ONE_STEP, "MAX_STEPS": 5, "DATASET_NAME": str(few_rows), "LOGGING_STEPS": 2}
    set_constants(monkeypatch, tmp_path / "out", **changes)
    compute_loss = script.LoRATrainer.compute_loss

    def compute_broken(self, *args, **kwargs):
        if self.state.global_step == 3:
            adapter = next(parameter for parameter in self.model.parameters() if parameter.requires_grad)
            adapter.data.fill_(float("nan"))
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(script.LoRATrainer, "compute_loss", compute_broken)
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    assert "the training loss is not finite at step 4" in capsys.readouterr().err
    (folder,) = tmp_path.glob("out/*/checkpoints")
    assert script.checkpoints(folder)[-1].name == "checkpoint-2"


def make_checkpoint(folder, step, state="{}"):
    """As the Trainer leaves one: with None, it was killed before its last file."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    if state is not None:
        (checkpoint / "trainer_state.json").write_text(state)
    return checkpoint


def test_a_checkpoint_without_its_last_file_is_passed_over(tmp_path):
    make_checkpoint(tmp_path, 100, state=None)
    make_checkpoint(tmp_path, 20, state=json.dumps({"global_step": 20})[:10])
    whole = [make_checkpoint(tmp_path, step) for step in (9, 10)]
    assert script.checkpoints(tmp_path) == whole


def test_the_two_last_checkpoints_by_step_are_kept_whatever_their_dates(tmp_path):
    made = [make_checkpoint(tmp_path, step) for step in (8, 9, 10, 11)]
    for age, checkpoint in enumerate(made):  # as where the clock was set back: the later the step, the older
        os.utime(checkpoint, (2**31 - age, 2**31 - age))
    arguments = SimpleNamespace(should_save=True, output_dir=tmp_path)
    script.Progress().on_save(arguments, None, None)
    assert sorted(tmp_path.iterdir()) == sorted(made[2:])
