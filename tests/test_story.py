"""The story as main() tells it: it learns, its baseline is honest, and what is done is not done again."""

import json
import re
import shutil

import pytest
from conftest import ONE_STEP, SHORT_RUN, TINY, read, set_constants, without_times

import finetune_medical_gpt2 as script


def test_it_learns_and_the_answers_not_only_the_prompt(short_run):
    perplexity = read(short_run)["perplexity"]
    before, after = perplexity["before"], perplexity["after"]
    assert after["answer"] < 0.85 * before["answer"]
    assert after["full_text"] < 0.6 * before["full_text"]
    assert perplexity["change"]["ci95"][1] < 0


def test_before_is_a_fresh_load_of_the_base_model(short_run, tiny, rows):
    results, tokenizer = read(short_run), tiny[1]
    model = script.load_model(TINY, precision=results["hardware"]["precision"])
    size = {"max_length": SHORT_RUN["MAX_LENGTH"], "batch_size": SHORT_RUN["BATCH_SIZE"]}
    fresh = script.evaluate_perplexity(model, tokenizer, rows[1], **size)
    assert results["perplexity"]["before"] == fresh
    asked = {"max_new_tokens": SHORT_RUN["MAX_NEW_TOKENS"], "temperature": 0.7, "seed": 42}
    answers = script.generate_answers(model, tokenizer, list(script.QUESTIONS.values()), **asked)
    assert [answer["before"] for answer in results["answers"]] == answers
    assert answers != [answer["after"] for answer in results["answers"]]


def test_the_samples_shown_in_training_change_no_result(tmp_path, monkeypatch, few_rows):
    changes = {**ONE_STEP, "MAX_STEPS": 3, "EVAL_STEPS": 1, "DATASET_NAME": str(few_rows)}
    set_constants(monkeypatch, tmp_path / "with", **changes)
    with_samples = script.main()
    ask, samples = script.ask, []

    def ask_all_but_samples(*args, **kwargs):
        if kwargs["max_new_tokens"] != 30:
            return ask(*args, **kwargs)
        samples.append(kwargs)
        return [("not asked", True)]

    set_constants(monkeypatch, tmp_path / "without", **changes)
    monkeypatch.setattr(script, "ask", ask_all_but_samples)
    without_samples = script.main()
    assert len(samples) == 2  # validations before the last step
    assert without_samples.name == with_samples.name
    assert without_times(read(without_samples)) == without_times(read(with_samples))


def test_after_each_stage_its_time_is_said(tmp_path, monkeypatch, capsys, few_rows):
    set_constants(monkeypatch, tmp_path, **ONE_STEP, DATASET_NAME=str(few_rows))
    script.main()
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if re.search(r" in \d\d:\d\d$|^\d\d:\d\d in all", line)]
    assert [line.split(" in")[0] for line in said[:3]] == ["before: all measured", "trained", "after: all measured"]
    assert len(said) == 4


class StopHere(Exception):
    """Ends a main() that has got as far as the test needs it."""


def stop_here(*args, **kwargs):
    raise StopHere


@pytest.mark.parametrize("prompt, said", [(script.PROMPT, False), ("[INST] {question} [/INST]", True)])
def test_rows_of_another_form_than_the_questions_are_noted(tmp_path, monkeypatch, capsys, prompt, said):
    questions = [f"What is illness {i}?" for i in range(12)]
    texts = [prompt.replace("{question}", question) + " It is a thing. </s>" for question in questions]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    set_constants(monkeypatch, tmp_path / "out", DATASET_NAME=str(data), **ONE_STEP)
    monkeypatch.setattr(script, "measure", stop_here)
    with pytest.raises(StopHere):
        script.main()
    assert ("note: no held-out row begins as PROMPT does" in capsys.readouterr().out) == said


def dates(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_not_repeated(short_run, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(short_run, tmp_path / short_run.name)
    before = dates(run)
    set_constants(monkeypatch, tmp_path, SAVE_MERGED=True)
    monkeypatch.setattr(script, "score_rows", None)  # nothing may be measured again
    assert script.main() == run
    assert "already finished" in capsys.readouterr().out
    assert dates(run) == before
    assert list(tmp_path.iterdir()) == [run]


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
    assert script.main() == run
    assert "without training" in capsys.readouterr().out
    after = read(run)
    (answer,) = after["answers"]
    assert answer["topic"] == "Asthma"
    assert answer["before_stats"]["words"] < 6
    for name in ("report.md", "adapter/README.md"):
        assert "What triggers asthma?" in (run / name).read_text()
        assert "anthrax" not in (run / name).read_text().lower()
    for name in ("data", "perplexity", "training"):
        assert after[name] == before[name]
    assert script.main() == run
    assert "already finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "lost, message",
    [
        ("checkpoints", "is finished, but its checkpoints/ are gone"),
        ("adapter", "is trained, but its adapter/ is gone"),
    ],
)
def test_a_trained_run_that_has_lost_a_part_is_not_measured_anew(
    short_run, tmp_path, monkeypatch, capsys, lost, message
):
    run = shutil.copytree(short_run, tmp_path / short_run.name, ignore=shutil.ignore_patterns(lost))
    (run / "report.md").unlink()
    set_constants(monkeypatch, tmp_path, SAVE_MERGED=True)
    monkeypatch.setattr(script, "score_rows", None)
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_kept_is_made_again_only_if_it_depends_on_something_else(tmp_path):
    path, made = tmp_path / "kept.json", []

    def make():
        made.append(len(made))
        return made[-1]

    assert script.kept(path, make, {"precision": "fp32"}) == 0
    assert script.kept(path, make, {"precision": "fp32"}) == 0
    assert script.kept(path, make, {"precision": "bf16"}) == 1
    assert script.kept(path, make, {"precision": "bf16"}) == 1
    assert script.kept(path, make, {"precision": "fp32"}) == 2  # only the newest is kept
    assert made == [0, 1, 2]
    path.write_text(path.read_text()[:-9])  # as a full disk may leave it
    assert script.kept(path, make, {"precision": "fp32"}) == 3
