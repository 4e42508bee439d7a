"""The story as main() tells it: it learns, its baseline is honest, and what is done is not done again."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import NOT_DRAWN, ONE_STEP, SHORT_RUN, TINY, first_lines, flat, read, set_constants, without_times

import finetune_medical_gpt2 as script

STAGES = ["before", "training", "after", "answers"]
FEW_ROWS = first_lines("medical_terms.jsonl", 16)
FEW_STEPS = {**ONE_STEP, "DATASET_NAME": str(FEW_ROWS), "MAX_LENGTH": 192}
LEARNED = {**NOT_DRAWN, "LORA_TARGET_MODULES": "all-linear", "MAX_STEPS": 12, "EVAL_STEPS": 100, "LOGGING_STEPS": 12}
LEARNED["QUESTIONS"] = {"Gout": "What is gout?", "Asthma": "What triggers asthma?"}
FIVE_STEPS = {**FEW_STEPS, "MAX_STEPS": 5, "EVAL_STEPS": 2, "LOGGING_STEPS": 1}


@pytest.fixture(scope="module")
def learned_run(tmp_path_factory):
    """A finished run of a model that can learn."""
    with pytest.MonkeyPatch.context() as patch:
        set_constants(patch, tmp_path_factory.mktemp("learned"), MODEL_NAME=str(TINY), **LEARNED)
        return script.main()


def test_it_learns_and_the_answers_not_only_the_prompt(learned_run):
    perplexity = read(learned_run)["perplexity"]
    before, after = perplexity["before"], perplexity["after"]
    assert after["answer"] < 0.85 * before["answer"]
    assert after["full_text"] < 0.6 * before["full_text"]
    assert perplexity["trained"]["after"] < 0.9 * perplexity["trained"]["before"]


def test_before_is_a_fresh_load_of_the_base_model(learned_run, tiny, rows):
    results, tokenizer = read(learned_run), tiny[1]
    model = script.load_model(TINY, results["hardware"]["device"], results["hardware"]["precision"])
    size = {"max_length": SHORT_RUN["MAX_LENGTH"], "batch_size": SHORT_RUN["BATCH_SIZE"]}
    fresh = script.evaluate_perplexity(model, tokenizer, rows[1], **size)
    assert results["perplexity"]["before"] == fresh
    asked = {"max_new_tokens": SHORT_RUN["MAX_NEW_TOKENS"], "temperature": 0.7, "seed": 42}
    answers = script.generate_answers(model, tokenizer, LEARNED["QUESTIONS"].values(), **asked)
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


def test_in_a_new_process_the_cards_snippet_runs_as_printed_and_its_model_scores_what_the_results_say(learned_run):
    card = (learned_run / "adapter" / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.S).group(1)
    command = [sys.executable, "-c", snippet + SCORE_AS_THE_SCRIPT]
    done = subprocess.run(command, cwd=learned_run / "adapter", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer, scores = done.stdout.rsplit("\n", 2)[:2]
    assert answer.strip()
    tolerance = 0.01 if read(learned_run)["hardware"]["precision"] == "bf16" else 1e-3  # the snippet runs in fp32
    assert flat(json.loads(scores)) == pytest.approx(flat(read(learned_run)["perplexity"]["after"]), rel=tolerance)


@pytest.mark.parametrize("on_purpose", [True, False])
def test_the_demo_runs_on_purpose_or_where_the_hub_is_out_of_reach(tmp_path, monkeypatch, capsys, on_purpose):
    def fetch(*args):
        assert not on_purpose, "the Hub was asked"
        raise ConnectionError("no cable")

    changes = {"MODEL_NAME": "no/model", "DATASET_NAME": "no/data", "DATASET_REVISION": "0" * 40}
    # more than the demo's model takes, and a run of another length
    changes |= {"MAX_LENGTH": 100_000, "MAX_NEW_TOKENS": 100_000, "NUM_EPOCHS": 9, "MAX_STEPS": 100}
    set_constants(monkeypatch, tmp_path / "out", **{**FEW_STEPS, **changes})
    short = {"DATASET_NAME": str(FEW_ROWS), "MAX_LENGTH": 192, "MAX_NEW_TOKENS": 2, "NUM_EPOCHS": 1, "MAX_STEPS": 1}
    for name, value in short.items():
        assert name in script.DEMO_SETTINGS  # whatever the constants say
        monkeypatch.setitem(script.DEMO_SETTINGS, name, value)
    monkeypatch.setattr(script, "fetch", fetch)
    monkeypatch.chdir(tmp_path)  # tests/ is not there
    results = read(script.main(demo=on_purpose))
    assert results["offline_fallback"] != on_purpose
    assert results["settings"].items() >= script.DEMO_SETTINGS.items()
    assert (results["model"], results["dataset"]) == ("tests/tiny_gpt2", str(FEW_ROWS))
    assert (results["model_revision"], results["dataset_revision"]) == (None, None)
    shown = capsys.readouterr().out
    assert ("RUNNING THE DEMO" in shown, "Why: no cable." in shown) == (not on_purpose, not on_purpose)


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
    set_constants(monkeypatch, tmp_path / "out", **{**FEW_STEPS, "DATASET_NAME": str(data)})
    monkeypatch.setattr(script, "measure", stop_here)
    with pytest.raises(StopHere):
        script.main()
    assert ("warning: the rows don't start like PROMPT" in capsys.readouterr().out) == said


def dates(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_not_repeated(short_run, tmp_path, monkeypatch, capsys):
    ignore = shutil.ignore_patterns("checkpoints")  # which may be deleted then
    run = shutil.copytree(short_run, tmp_path / short_run.name, ignore=ignore)
    before = dates(run)
    set_constants(monkeypatch, tmp_path)
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
    set_constants(monkeypatch, tmp_path, **changes)
    for name in ("fine_tune", "score_rows"):
        monkeypatch.setattr(script, name, None)
    assert script.main() == run
    after = read(run)
    (answer,) = after["answers"]
    assert answer["topic"] == "Asthma"
    assert answer["before_stats"]["words"] < 6
    for name in ("report.md", "adapter/README.md"):
        assert "What triggers asthma?" in (run / name).read_text()
        assert "anthrax" not in (run / name).read_text().lower()
    for name in ("data", "perplexity", "facts", "training"):
        assert after[name] == before[name]
    capsys.readouterr()
    assert script.main() == run
    assert "already finished" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["checkpoints", "adapter"])
def test_a_finished_run_that_lost_a_part_is_not_trained_again(short_run, tmp_path, monkeypatch, capsys, lost):
    ignore = shutil.ignore_patterns(lost)
    run = shutil.copytree(short_run, tmp_path / short_run.name, ignore=ignore)
    before = dates(run)
    set_constants(monkeypatch, tmp_path, TEMPERATURE=0)
    monkeypatch.setattr(script, "score_rows", None)
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    assert "is finished, but its checkpoints/ or adapter/ is gone: move it away" in capsys.readouterr().err
    assert dates(run).items() >= before.items()


@pytest.fixture(scope="module")
def five_steps(tmp_path_factory):
    """A finished run of five steps with a checkpoint after each but the last."""
    with pytest.MonkeyPatch.context() as patch:
        set_constants(patch, tmp_path_factory.mktemp("five_steps"), **FIVE_STEPS)
        return script.main()


def test_pairs_of_questions_and_answers_give_the_figures_of_the_same_rows(five_steps, tmp_path, monkeypatch):
    pairs = tmp_path / "pairs.jsonl"
    with pairs.open("w") as file:
        for line in FEW_ROWS.read_text().splitlines():
            prompt, answer = json.loads(line)["text"].removesuffix("</s>").split("[/INST]")
            print(json.dumps({"answer": answer, "question": prompt.split("<</SYS>>")[1]}), file=file)
    set_constants(monkeypatch, tmp_path / "out", **{**FIVE_STEPS, "DATASET_NAME": str(pairs)})
    of_texts, of_pairs = without_times(read(five_steps)), without_times(read(script.main()))
    for name in ("data", "perplexity", "facts", "training", "answers"):
        assert of_pairs[name] == of_texts[name]


@pytest.fixture
def resume(five_steps, tmp_path, monkeypatch, capsys):
    """A function: the finished run as it was after `done` of its stages, with `damage(checkpoints)`, started again.

    It must come to the same end. Returns (the stages, the steps) that were done again, and the checkpoints' folder.
    """

    def start_again(done, damage):
        run = shutil.copytree(five_steps, tmp_path / five_steps.name)
        (run / "results.json").unlink()
        progress = run / "checkpoints" / "progress.json"
        stages = json.loads(progress.read_text())
        assert list(stages) == STAGES
        progress.write_text(json.dumps({name: stages[name] for name in STAGES[:done]}))
        damage(run / "checkpoints")
        set_constants(monkeypatch, tmp_path, **FIVE_STEPS)
        assert script.main() == run
        assert without_times(read(run)) == without_times(read(five_steps))
        lines = capsys.readouterr().out.splitlines()
        again = [line.split(":")[0] for line in lines if ": done in " in line]
        steps = [int(line.split()[1].split("/")[0]) for line in lines if line.startswith("step ") if "  loss" in line]
        return again, steps, run / "checkpoints"

    return start_again


@pytest.mark.parametrize("done", range(1, 5))
def test_a_stage_that_is_done_is_not_done_again(resume, done):
    assert resume(done, lambda checkpoints: None)[0] == STAGES[done:]


ZEROS = b"\0" * 200


@pytest.mark.parametrize(
    "torn, again",
    [
        ({"checkpoints/progress.json": b""}, STAGES),
        ({"results.json": ZEROS}, []),
        ({"checkpoints/progress.json": ZEROS, "results.json": b""}, STAGES),
    ],
    ids=["progress", "results", "both"],
)
def test_what_a_power_cut_tore_is_made_again(resume, torn, again):
    def tear(checkpoints):
        for name, content in torn.items():
            (checkpoints.parent / name).write_bytes(content)

    assert resume(4, tear)[:2] == (again, [5] if again else [])


COPIES = {"checkpoint-1-backup", "checkpoint-2 (1)"}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def copy_under_other_names(step):
    """A damage: the copies of one step's checkpoint are there, and no other checkpoint of the last step."""

    def damage(checkpoints):
        for name in COPIES:
            shutil.copytree(checkpoints / f"checkpoint-{step}", checkpoints / name)
        shutil.rmtree(checkpoints / "checkpoint-4")

    return damage


DAMAGES = {
    "adapter cut off": lambda checkpoints: cut(checkpoints / "checkpoint-4" / "adapter_model.safetensors"),
    "optimizer cut off": lambda checkpoints: cut(checkpoints / "checkpoint-4" / "optimizer.pt"),
    "no optimizer": lambda checkpoints: (checkpoints / "checkpoint-4" / "optimizer.pt").unlink(),
    "torn state": lambda checkpoints: (checkpoints / "checkpoint-4" / "trainer_state.json").write_bytes(b"\0" * 900),
    "copies of step 3": copy_under_other_names(3),
    "copies of step 4": copy_under_other_names(4),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_checkpoint_is_used_and_copies_are_left_alone(resume, damage):
    again, steps, checkpoints = resume(1, DAMAGES[damage])
    # a copy will do as well
    steps_left, saved = ([5], set()) if damage == "copies of step 4" else ([4, 5], {"checkpoint-4"})
    assert (again, steps) == (STAGES[1:], steps_left)
    copies = COPIES if damage.startswith("copies") else set()
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-3"} | saved | copies


def test_without_a_whole_checkpoint_the_training_begins_anew(resume):
    def lose_optimizers(checkpoints):
        for path in checkpoints.glob("checkpoint-*/optimizer.pt"):
            path.unlink()

    assert resume(1, lose_optimizers)[1] == [1, 2, 3, 4, 5]
