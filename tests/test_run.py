"""main() as users run it: what it writes, that it learns, that the baseline is honest, and that nothing gets lost."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SHORT_RUN, TESTS, load_tiny, set_constants
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, pipeline
from trl import SFTConfig, SFTTrainer

import finetune_medical_gpt2 as script


def read(folder):
    return json.loads((folder / "results.json").read_text())


def flat(scores):
    """Perplexities as one list of numbers, for pytest.approx."""
    return [x for value in scores.values() for x in (value if isinstance(value, list) else [value])]


def without_times(results):
    """What two runs of the same command must share: everything but times and memory."""
    results = json.loads(json.dumps(results))
    for group, name in (
        ("training", "seconds"),
        ("training", "tokens_per_second"),
        ("hardware", "stage_seconds"),
        ("hardware", "peak_memory_gib"),
        ("settings", "OUTPUT_DIR"),
        ("settings", "SAVE_MERGED"),
    ):
        del results[group][name]
    return results


def start(output_dir, before="", launcher=(), **changes):
    """Run main() in another process, with `before` executed first; returns the Popen."""
    constants = {**SHORT_RUN, "OUTPUT_DIR": str(output_dir), **changes}
    code = f"import finetune_medical_gpt2 as script\nvars(script).update({constants!r})\n{before}\n"
    code += "import signal\nfor number in (signal.SIGINT, signal.SIGTERM):\n"  # a background job ignores SIGINT
    code += "    signal.signal(number, signal.default_int_handler)\nscript.main()\n"
    program = Path(output_dir).parent / "program.py"
    program.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    return subprocess.Popen(
        [sys.executable, *launcher, program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# ---------------------------------------------------------------- one run


def test_every_file_is_there_and_says_what_the_contract_says(short_run):
    for name in ("results.json", "report.md", "training_loss.png", "perplexity_comparison.png", "adapter/README.md"):
        assert (short_run / name).stat().st_size > 500, name
    assert not list(short_run.rglob("*.tmp"))
    assert short_run.name.startswith("tiny_gpt2-")
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
    assert results["training"]["steps"] == 24 and results["training"]["tokens_per_second"] > 0
    assert results["training"]["trainable_parameters"] < results["training"]["total_parameters"] / 20
    history = results["training"]["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 10, 20, 24]
    assert [entry["step"] for entry in history if "loss" in entry] == [5, 10, 15, 20, 24]
    for answer in results["answers"]:
        assert answer["prompt"] == script.format_prompt(answer["question"])
        assert set(answer["after_stats"]) == {"words", "sentences", "unique_words", "distinct_bigrams", "finished"}
    low, high = results["perplexity"]["after"]["answer_ci95"]
    assert low < results["perplexity"]["after"]["answer"] < high


def test_training_tokens_are_the_real_ones(short_run, tiny, rows):
    encoded = script.encode(tiny[1], rows[0], SHORT_RUN["MAX_LENGTH"], end=True)
    tokens = sum(len(ids) for ids, _, _ in encoded)
    results = read(short_run)
    per_row = results["training"]["tokens"] / (24 * 4)
    assert per_row == pytest.approx(tokens / len(rows[0]), rel=0.05)
    cut = sum(ids[-1] != tiny[1].eos_token_id for ids, _, _ in encoded)
    assert results["data"]["truncated_train_rows"] == cut


def test_it_learns_and_the_answers_not_only_the_prompt(short_run):
    before, after = (read(short_run)["perplexity"][key] for key in ("before", "after"))
    assert after["answer"] < 0.85 * before["answer"]
    assert after["full_text"] < 0.6 * before["full_text"]
    assert read(short_run)["perplexity"]["change"]["ci95"][1] < 0


def test_before_is_a_fresh_load_of_the_base_model(short_run, tiny, rows):
    results, tokenizer = read(short_run), tiny[1]
    model = script.load_model(TESTS / "tiny_gpt2", precision=results["hardware"]["precision"])
    fresh = script.evaluate_perplexity(model, tokenizer, rows[1], max_length=SHORT_RUN["MAX_LENGTH"])
    assert results["perplexity"]["before"] == fresh
    asked = {"max_new_tokens": SHORT_RUN["MAX_NEW_TOKENS"], "temperature": 0.7, "seed": 42}
    answers = script.generate_answers(model, tokenizer, list(script.QUESTIONS.values()), **asked)
    assert [answer["before"] for answer in results["answers"]] == answers
    assert answers != [answer["after"] for answer in results["answers"]]


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
    surroundings = {"cwd": short_run / "adapter", "env": {**os.environ, "PYTHONPATH": str(TESTS.parent)}}
    done = subprocess.run(command, **surroundings, capture_output=True, text=True)
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


def test_a_report_can_be_written_again_and_hostile_text_stays_in_its_cell(short_run, tmp_path):
    results = read(short_run)
    script.write_report(results, tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text() == (short_run / "report.md").read_text()
    hostile = "```\n\n# Heading\n</td></tr></table>\n\n| a | b |\n<script>alert(1)</script> \x1b[31m ![x](http://y.org)"
    results["answers"][0] |= {"topic": hostile, "question": hostile, "before": hostile, "after": hostile}
    script.write_report(results, tmp_path / "hostile.md")
    lines = [(tmp_path / name).read_text().splitlines() for name in ("report.md", "hostile.md")]
    assert len(lines[0]) == len(lines[1])  # so nothing begins a line, or a paragraph, of its own
    text = "\n".join(lines[1])
    assert text.count("<table>") == text.count("</table>") == 1 and "<script>" not in text and "\x1b" not in text
    assert [line for line in lines[1] if line.startswith(("#", "```"))] == [
        line for line in lines[0] if line.startswith(("#", "```"))
    ]


def test_a_finished_run_is_not_repeated_and_other_settings_go_elsewhere(short_run, monkeypatch, capsys):
    set_constants(monkeypatch, short_run.parent, SAVE_MERGED=True)
    times = {path: path.stat().st_mtime_ns for path in short_run.rglob("*") if path.is_file()}
    monkeypatch.setattr(script, "score_rows", None)  # nothing may be measured again
    assert script.main() == short_run
    assert "finished" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in short_run.rglob("*") if path.is_file()}
    for name, value in (("SEED", 43), ("PROMPT", "[INST] {question} [/INST]")):
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(script, name, value)
            script.main()
    assert len(list(short_run.parent.iterdir())) == 3


@pytest.mark.parametrize("finished", [True, False])
def test_other_questions_are_asked_without_training(short_run, tmp_path, monkeypatch, capsys, finished):
    run = shutil.copytree(short_run, tmp_path / short_run.name)
    if not finished:
        (run / "results.json").unlink()
    before = read(short_run)
    changes = {"QUESTIONS": {"Asthma": "What triggers asthma?"}, "MAX_NEW_TOKENS": 5, "TEMPERATURE": 0}
    set_constants(monkeypatch, tmp_path, SAVE_MERGED=True, **changes)
    for name in ("fine_tune", "score_rows"):
        monkeypatch.setattr(script, name, None)
    assert script.main() == run and "without training" in capsys.readouterr().out
    after = read(run)
    assert [(x["topic"], x["before_stats"]["words"] < 6) for x in after["answers"]] == [("Asthma", True)]
    for name in ("report.md", "adapter/README.md"):
        assert "What triggers asthma?" in (run / name).read_text()
        assert "anthrax" not in (run / name).read_text().lower()
    for name in ("data", "perplexity", "training"):
        assert after[name] == before[name]
    assert script.main() == run and "already finished" in capsys.readouterr().out


def test_a_finished_run_without_its_checkpoints_is_not_measured_anew(short_run, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(short_run, tmp_path / short_run.name, ignore=shutil.ignore_patterns("checkpoints"))
    (run / "report.md").unlink()
    set_constants(monkeypatch, tmp_path, SAVE_MERGED=True)
    monkeypatch.setattr(script, "score_rows", None)
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2 and "its checkpoints/ are gone" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["adapter", "merged"])
def test_a_saved_tokenizer_neither_cuts_nor_pads(short_run, folder):
    state = json.loads((short_run / folder / "tokenizer.json").read_text())
    assert state["truncation"] is None and state["padding"] is None


def test_the_same_seed_gives_the_same_results_and_the_samples_shown_in_training_change_none(
    short_run, tmp_path, monkeypatch
):
    set_constants(monkeypatch, tmp_path)
    real, samples = script.ask, []

    def ask(*args, **kwargs):
        if kwargs["max_new_tokens"] != 30:
            return real(*args, **kwargs)
        samples.append(kwargs)
        return [("not asked", True)]

    monkeypatch.setattr(script, "ask", ask)
    again = script.main()
    assert len(samples) == 2  # validations before the last step
    assert again.name == short_run.name
    assert without_times(read(again)) == without_times(read(short_run))


# ---------------------------------------------------------------- training


def train_losses(trainer_class, dtype, rows, **kwargs):
    model = script.load_model(TESTS / "tiny_gpt2", precision=dtype, dropout=0.0)  # no chance in it
    tokenizer = load_tiny()[1]
    encoded = script.encode(tokenizer, rows[0][:16], 64, end=True)
    data = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids, _, _ in encoded])
    config = SFTConfig(
        output_dir="unused",
        max_steps=4,
        learning_rate=5e-3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        bf16=dtype == "bf16",
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        max_length=64,
        disable_tqdm=True,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, fan_in_fan_out=True)
    trainer = trainer_class(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora, **kwargs
    )
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    adapters = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in frozen.items())
    assert not any(torch.equal(p, after[name]) for name, p in adapters.items())
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-4), ("bf16", 1e-2)])
def test_the_fast_loss_is_the_stock_trainers_and_only_the_adapter_moves(rows, dtype, tolerance):
    stock = train_losses(SFTTrainer, "fp32", rows)
    ours = train_losses(script.LoRATrainer, dtype, rows, validate=None)
    assert ours == pytest.approx(stock, rel=tolerance) and len(stock) == 4


def test_labels_of_a_real_batch(tiny, rows):
    tokenizer = tiny[1]
    encoded = script.encode(tokenizer, rows[0][:8], 10_000, end=True)
    longest = sorted(len(ids) for ids, _, _ in encoded)[4]  # cuts some of the rows
    encoded = script.encode(tokenizer, rows[0][:8], longest, end=True)
    data = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids, _, _ in encoded])
    config = SFTConfig(
        output_dir="unused",
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=longest,
        per_device_train_batch_size=8,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True)
    trainer = script.LoRATrainer(
        model=load_tiny()[0],
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora,
        validate=None,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    cut = 0
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        n = int(mask.sum())
        assert (labels[n:] == -100).all() and (labels[:n] == ids[:n]).all()
        ended = labels[n - 1] == tokenizer.eos_token_id
        assert labels[:n].tolist().count(tokenizer.eos_token_id) == ended and (ended or n == longest)
        cut += not ended
    assert 0 < cut < 8


def test_without_train_on_prompt_the_loss_sees_the_answers_only(tmp_path, monkeypatch, tiny):
    set_constants(monkeypatch, tmp_path, TRAIN_ON_PROMPT=False, MAX_STEPS=1, MAX_NEW_TOKENS=1)
    real, seen = script.LoRATrainer.compute_loss, []

    def compute_loss(self, model, inputs, **kwargs):
        seen.extend(zip(inputs["input_ids"], inputs["labels"], strict=True))
        return real(self, model, inputs, **kwargs)

    monkeypatch.setattr(script.LoRATrainer, "compute_loss", compute_loss)
    results = read(script.main())
    assert len(seen) == 4
    for ids, labels in seen:
        assert tiny[1].decode(ids[labels == -100]).split("[/INST]")[1].replace(tiny[1].eos_token, "") == ""
        assert "[/INST]" not in tiny[1].decode(ids[labels != -100]) and (labels != -100).sum() > 20
    first = results["training"]["log_history"][0]["eval_loss"]
    assert math.exp(first) == pytest.approx(results["perplexity"]["before"]["answer"])


def test_every_training_prompt_begins_with_the_ids_that_generation_uses(tiny, rows):
    tokenizer = tiny[1]
    for text in rows[0]:
        question = re.search(r"<</SYS>> (.*?) \[/INST\]", text).group(1)
        prompt = tokenizer(script.format_prompt(question))["input_ids"]
        assert tokenizer(text)["input_ids"][: len(prompt)] == prompt


@pytest.mark.parametrize("width", [1024, 1280, 1600, "llama"])
def test_other_models_by_name_only(tmp_path, monkeypatch, width):
    _, tokenizer = load_tiny()
    size = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    if width == "llama":
        config = LlamaConfig(
            **size,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = LlamaForCausalLM(config)
    else:
        model = GPT2LMHeadModel(
            GPT2Config(**size, n_embd=width, n_head={1024: 16, 1280: 20, 1600: 25}[width], n_layer=1)
        )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    few = tmp_path / "few.jsonl"
    few.write_text("".join((TESTS / "medical_terms.jsonl").read_text().splitlines(keepends=True)[:24]))
    set_constants(
        monkeypatch,
        tmp_path / "out",
        MODEL_NAME=str(tmp_path / "model"),
        DATASET_NAME=str(few),
        MAX_STEPS=1,
        MAX_LENGTH=64,
        MAX_NEW_TOKENS=2,
    )
    assert read(script.main())["training"]["steps"] == 1


# ---------------------------------------------------------------- interruptions

KILL = """
import os, signal
owner, name, moment = script, "write_json", {moment!r}
if moment.startswith("checkpoint"):  # whose last file is its state
    import transformers
    owner, name = transformers.TrainerState, "save_to_json"
real = getattr(owner, name)
def patched(*args):
    kill = moment in str(args[1] if name == "save_to_json" else args[0])  # the path
    if not (kill and moment.startswith(("checkpoint", "results"))): real(*args)
    if kill: os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, patched)
"""
MOMENTS = ("before-scores", "before-answers", "checkpoint-20", "training.json", "after-scores", "results.json")


def test_killed_at_any_moment_it_goes_on_to_the_same_end(short_run, tmp_path):
    for moment in MOMENTS:
        process = start(tmp_path / "out", before=KILL.format(moment=moment))
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, moment
    run = tmp_path / "out" / short_run.name
    assert (run / "report.md").exists() and not (run / "results.json").exists()
    process = start(tmp_path / "out", before="script.score_rows = script.fine_tune = script.ask = None")
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert without_times(read(run)) == without_times(read(short_run))
    for name in ("report.md", "training_loss.png", "perplexity_comparison.png", "adapter/README.md"):
        assert (run / name).exists()


def test_a_checkpoint_without_its_last_file_is_passed_over(tmp_path):
    for step, state in ((100, None), (20, '{"global_st'), (10, "{}"), (9, "{}")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state:
            (folder / "trainer_state.json").write_text(state)
    assert script.checkpoints(tmp_path) == [tmp_path / "checkpoint-9", tmp_path / "checkpoint-10"]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_with_one_line(tmp_path, signal_number):
    process = start(tmp_path / "out")
    while "data:" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    time.sleep(1)
    process.send_signal(signal_number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    last = error.splitlines()[-1]
    assert last.startswith("interrupted: ") and "Traceback" not in error


def test_ctrl_c_during_the_imports_is_one_line():
    command = [sys.executable, str(TESTS.parent / "finetune_medical_gpt2.py")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == "interrupted: nothing was done yet\n"


def test_a_full_disk_is_one_line_and_what_exists_stays(short_run, tmp_path, monkeypatch, capsys):
    set_constants(monkeypatch, tmp_path)
    real = script.write_text

    def full(path, text):
        if "before" not in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, text)

    monkeypatch.setattr(script, "write_text", full)
    monkeypatch.setattr(script, "MAX_STEPS", 1)
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2 and "error: no space left" in capsys.readouterr().err
    kept = [path.name for path in tmp_path.glob("*/checkpoints/*.json")]
    assert "before-answers.json" in kept and all(name.startswith("before-") for name in kept)


def test_a_loss_that_turns_nan_names_the_step_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    set_constants(monkeypatch, tmp_path, LOGGING_STEPS=2)
    real = script.LoRATrainer.compute_loss

    def broken(self, *args, **kwargs):
        if self.state.global_step == 3:
            next(p for p in self.model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(script.LoRATrainer, "compute_loss", broken)
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2 and "the training loss is not finite at step 4" in capsys.readouterr().err
    assert script.checkpoints(next(tmp_path.glob("*/checkpoints")))[-1].name == "checkpoint-2"


def test_a_second_process_in_the_same_run_is_turned_away(tmp_path):
    lock = script.lock_run(tmp_path / "run")
    code = "import sys, pathlib, finetune_medical_gpt2 as script\n"
    code += "try: script.lock_run(pathlib.Path(sys.argv[1]))\nexcept script.InputError: sys.exit(7)"
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "run"], env=environment).returncode == 7
    lock.release()


def test_the_ablation_prints_the_untouched_model_and_each_variant(tmp_path):
    command = [
        sys.executable,
        "ablation.py",
        "tiny_gpt2",
        "medical_terms.jsonl",
        "--steps",
        "2",
        "--only",
        "rate 3e-3",
        "--title-rows",
        "4",
    ]
    run = subprocess.run([*command, "--output-dir", tmp_path], cwd=TESTS, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.strip("| ").split(" | ") for line in run.stdout.splitlines()[2:]]
    assert [line[0] for line in lines] == ["untouched model", "learning rate 3e-3"]
    assert float(lines[1][1]) < float(lines[0][1])
    (results,) = (read(folder) for folder in tmp_path.iterdir())
    assert results["training"]["steps"] == 2 and lines[1][1] == f"{results['perplexity']['after']['answer']:.2f}"


@pytest.mark.parametrize("error", ["script.InputError('not this one')", "ZeroDivisionError(lambda: 0)"])
def test_what_fails_on_the_first_process_ends_the_others_too(tmp_path, error):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29732")
    fail = f"def fail(*args): raise {error}\nscript.fetch = fail"
    process = start(tmp_path / "out", before=fail, launcher=launcher)
    output, error_text = process.communicate(timeout=120)
    assert process.returncode != 0
    if "InputError" in error:
        assert error_text.count("error: not this one") == 1 and "exitcode  : 2" in error_text


def test_two_processes_give_the_figures_of_one(tmp_path, monkeypatch):
    changes = {"MAX_STEPS": 6, "LORA_DROPOUT": 0.0}  # whose random draws differ between processes
    set_constants(monkeypatch, tmp_path / "one", **changes)
    one = read(script.main())
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29731")
    process = start(tmp_path / "out", launcher=launcher, BATCH_SIZE=2, **changes)
    output, error = process.communicate(timeout=240)
    assert process.returncode == 0, error[-2000:]
    (run,) = (tmp_path / "out").iterdir()
    two = read(run)
    assert two["hardware"]["processes"] == 2 and output.count("Everything is in") == 1
    assert flat(two["perplexity"]["before"]) == pytest.approx(flat(one["perplexity"]["before"]), rel=1e-3)
    assert two["perplexity"]["after"]["answer"] == pytest.approx(one["perplexity"]["after"]["answer"], rel=0.01)
