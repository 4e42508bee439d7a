"""Training: what the loss sees, what is counted, and which checkpoints are kept."""

import json
import math
import os
from types import SimpleNamespace

import pandas
import pytest
import torch
from conftest import MICRO, ONE_STEP, SHORT_RUN, TINY, load_tiny, read, set_constants
from safetensors.torch import save_file

import finetune_medical_gpt2 as script


def test_the_tokens_counted_are_those_of_the_rows_without_padding(short_run, tiny, rows):
    lengths = [len(tiny[1](text)["input_ids"]) + 1 for text in rows[0]]  # EOS follows
    cut = [min(length, SHORT_RUN["MAX_LENGTH"]) for length in lengths]
    results = read(short_run)
    assert results["training"]["tokens"] / (24 * 2) == pytest.approx(sum(cut) / len(cut), rel=0.05)
    assert results["data"]["truncated_train_rows"] == sum(length > SHORT_RUN["MAX_LENGTH"] for length in lengths)


@pytest.mark.parametrize(
    "on_prompt, labels", [(True, [[5, 6, 7, 8], [5, 6, 9]]), (False, [[-100, -100, 7, 8], [-100, -100, -100]])]
)
def test_labels_are_the_tokens_that_the_loss_is_over(on_prompt, labels):
    encoded = [
        script.Row([5, 6, 7, 8], answer_start=2, answer_bytes=9),
        script.Row([5, 6, 9], answer_start=3, answer_bytes=0),
    ]
    data = script.training_data(encoded, on_prompt)
    assert data["input_ids"][:] == [[5, 6, 7, 8], [5, 6, 9]]
    assert data["labels"][:] == labels


@pytest.mark.parametrize("on_prompt", [True, False])
def test_the_loss_of_a_real_batch_is_over_what_train_on_prompt_says(tmp_path, monkeypatch, few_rows, on_prompt):
    length = 224  # cuts some of the rows
    changes = {**ONE_STEP, "DATASET_NAME": str(few_rows), "BATCH_SIZE": 8, "MAX_LENGTH": length}
    set_constants(monkeypatch, tmp_path / "out", TRAIN_ON_PROMPT=on_prompt, **changes)
    compute_loss, seen = script.LoRATrainer.compute_loss, []

    def compute_and_note(self, model, inputs, **kwargs):
        seen.extend(zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True))
        return compute_loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(script.LoRATrainer, "compute_loss", compute_and_note)
    monkeypatch.setattr(script, "choose_hardware", lambda: {"device": "cpu", "precision": "fp32", "name": "a CPU"})
    results = read(script.main())
    model, tokenizer = load_tiny(MICRO)

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
        begin = 0 if on_prompt else int((labels == -100)[:end].sum())
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
    scores = pandas.DataFrame(
        {
            "nll": [10.0, 20.0],
            "tokens": [5, 5],
            "answer_nll": [4.0, 6.0],
            "answer_tokens": [2, 3],
            "answer_bytes": [9, 9],
        }
    )
    perplexity = script.summarize_scores(scores)
    assert script.mean_losses(perplexity, True) == pytest.approx({"eval_loss": 3.0, "eval_answer_loss": 2.0})
    assert script.mean_losses(perplexity, False) == pytest.approx({"eval_loss": 2.0})


def test_a_large_model_trains_one_row_at_a_time_on_a_cpu_and_a_small_one_by_batches(tmp_path):
    cfg = SimpleNamespace(**{name: getattr(script, name) for name in script.SETTINGS})
    model = script.add_adapter(script.load_model(TINY), script.LoraConfig(task_type="CAUSAL_LM"), seed=0)
    for device, size, rows in (("cpu", 7e6, 4), ("cpu", 124e6, 1), ("cuda", 124e6, 4)):
        model.get_base_model().size = size
        hardware = {"device": device, "precision": "fp32"}
        if device == "cuda":  # which SFTConfig would look for
            hardware["device"] = "mps"
        config = script.training_config(cfg, hardware, model, tmp_path)
        assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (rows, 16 // rows)


def test_with_gradient_checkpointing_it_trains_to_the_same_figures(tmp_path, monkeypatch, few_rows):
    results = []
    for checkpointing in (False, True):
        changes = {**ONE_STEP, "MAX_STEPS": 2, "MAX_LENGTH": 180, "DATASET_NAME": str(few_rows)}
        set_constants(monkeypatch, tmp_path / str(checkpointing), **changes, GRADIENT_CHECKPOINTING=checkpointing)
        results.append(read(script.main())["training"]["log_history"])
    for name in ("loss", "grad_norm", "eval_loss"):
        values, expected = ([entry[name] for entry in history if name in entry] for history in results)
        assert values == pytest.approx(expected, rel=1e-4)


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
    assert "the training loss is not finite by step 4" in capsys.readouterr().err
    (left,) = tmp_path.glob("out/*/checkpoints/checkpoint-*")
    assert left.name == "checkpoint-2" and script.is_whole(left)


def make_checkpoint(folder, step, without=(), cut=()):
    """As the Trainer leaves one, but for some files that are missing or cut off."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    save_file({"weight": torch.ones(9)}, checkpoint / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(9)}, checkpoint / name)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name in without:
        (checkpoint / name).unlink()
    for name in cut:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])
    return checkpoint


FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_lacks_a_file_or_half_of_one_is_not_whole(tmp_path, name):
    assert script.is_whole(make_checkpoint(tmp_path, 1))
    assert not script.is_whole(make_checkpoint(tmp_path, 2, without=[name]))
    assert not script.is_whole(make_checkpoint(tmp_path, 3, cut=[name]))
    (tmp_path / "checkpoint-3" / name).write_bytes(bytes(500))  # as a power cut may leave it
    assert not script.is_whole(tmp_path / "checkpoint-3")


def test_a_checkpoint_of_several_processes_has_a_random_state_of_each(tmp_path, monkeypatch):
    checkpoint = make_checkpoint(tmp_path, 1, without=["rng_state.pth"])
    monkeypatch.setattr(script, "PartialState", lambda: SimpleNamespace(num_processes=2))
    torch.save({}, checkpoint / "rng_state_0.pth")
    assert not script.is_whole(checkpoint)
    torch.save({}, checkpoint / "rng_state_1.pth")
    assert script.is_whole(checkpoint)


def test_the_two_last_checkpoints_by_step_are_kept_whatever_their_dates(tmp_path):
    lines = script.StepLines()
    for step in (2, 4, 6, 8):
        checkpoint = make_checkpoint(tmp_path, step)
        os.utime(checkpoint, (2**31 - step, 2**31 - step))  # as where the clock was set back: the later, the older
        lines.on_save(SimpleNamespace(save_steps=2, output_dir=tmp_path), SimpleNamespace(global_step=step), None)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-6", "checkpoint-8"}
