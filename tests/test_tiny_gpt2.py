"""tiny_gpt2/make_tiny_gpt2.py: its steps do, in small, what tiny_gpt2/README.md says.

All but `teacher`, which unpacks the weights of a package that the tests do without.
"""

import json
import random
import re
import sys

import pytest
import torch
from conftest import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(TINY))
import make_tiny_gpt2  # noqa: E402


@pytest.fixture
def small_teacher(tmp_path):
    """A Llama of the teacher's kind, untrained: tied embeddings, shared key heads, its chat."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def write_articles(folder, items):
    """A file as `sample` writes it."""
    folder.mkdir()
    rows = [json.dumps({"kind": "artifact", **item}) + "\n" for item in items]
    (folder / "articles-1.jsonl").write_text("".join(rows))


def everyday():
    return make_tiny_gpt2.read_json_lines(TINY / "everyday.jsonl")


def held_out_losses(output, source):
    return [float(x) for x in re.findall(rf"held-out {source}: loss ([\d.]+)", output)]


def test_training_lowers_the_held_out_loss_and_writes_an_ordinary_gpt2(run_tool, tmp_path):
    write_articles(tmp_path / "texts", everyday()[:150])
    size = ("--layers", 1, "--width", 64, "--vocabulary", 700, "--rows", 2, "--tokens", 120_000)
    folders = ("--texts", tmp_path / "texts", "--out", tmp_path / "new")
    output = run_tool(make_tiny_gpt2, "train", *folders, *size, "--learning-rate", 1e-2, "--rename")
    for source in ("teacher", "everyday"):
        before, after = held_out_losses(output, source)
        assert 6.4 < before < 6.8  # a guess among 700 has a loss of 6.55
        assert after < before - 1

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.dtype == torch.bfloat16 and model.config.n_positions == 1024
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert len(tokenizer) == model.config.vocab_size == 700
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0
    shown = run_tool(make_tiny_gpt2, "show", "--model", tmp_path / "new", "--texts", tmp_path / "texts")
    assert held_out_losses(shown, "everyday") == [after]


def test_tuning_lowers_the_teachers_held_out_loss_and_the_tuned_teacher_is_sampled(
    run_tool, tmp_path, small_teacher, monkeypatch
):
    monkeypatch.setattr(make_tiny_gpt2, "TUNING_RATE", 1e-2)
    tuned = ("--out", tmp_path / "tuned", "--tuning-steps", 30)
    output = run_tool(make_tiny_gpt2, "tune", "--teacher", small_teacher, *tuned)
    before, after = (float(x) for x in re.findall(r"held-out loss ([\d.]+)", output))
    assert after < before - 1

    size = ("--sample-rows", 4, "--new-tokens", 200, "--sample-tokens", 300)
    run_tool(
        make_tiny_gpt2, "sample", "--teacher", tmp_path / "tuned", "--texts", tmp_path / "texts", "--seed", 3, *size
    )
    rows = make_tiny_gpt2.read_json_lines(tmp_path / "texts" / "articles-3.jsonl")
    subjects = make_tiny_gpt2.choose_subjects()[0]
    assert rows and all((row["title"], row["kind"]) in subjects for row in rows)
    assert all("<|im_end|>" not in row["article"] for row in rows)


def test_the_fast_sampler_gives_the_logits_of_transformers_while_rows_leave(small_teacher, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(small_teacher, dtype=torch.float32).eval()
    prompts = torch.randint(500, (6, 9), generator=torch.Generator().manual_seed(0))
    seen = []

    def draw_and_note(logits):
        """The likeliest token that depends on the row, so that rows end at different steps."""
        seen.append(logits)
        return logits.topk(3).indices[:, [len(seen) % 3]]

    monkeypatch.setattr(make_tiny_gpt2, "draw", draw_and_note)
    eos = make_tiny_gpt2.sample_batch(model, prompts, -1, 12)[2][4]
    seen.clear()
    answers = make_tiny_gpt2.sample_batch(model, prompts, eos, 12)
    assert len(answers[2]) <= 5 and len(seen[-1]) < len(seen[0]) == 6  # at least one row has left

    remaining = list(range(6))
    for step, logits in enumerate(seen):
        remaining = [row for row in remaining if eos not in answers[row][:step]]
        whole = torch.stack([torch.cat([prompts[row], torch.tensor(answers[row][:step]).long()]) for row in remaining])
        with torch.no_grad():
            expected = model(whole).logits[:, -1]
        assert torch.allclose(logits, expected, atol=1e-5)


def test_draw_takes_only_tokens_of_the_top_p(monkeypatch):
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    monkeypatch.setattr(make_tiny_gpt2, "TOP_K", 4)
    monkeypatch.setattr(make_tiny_gpt2, "TOP_P", 0.7)
    logits = probabilities.log() * make_tiny_gpt2.TEMPERATURE
    torch.manual_seed(0)
    drawn = make_tiny_gpt2.draw(logits.repeat(4000, 1))[:, 0]
    share = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(share, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03)


def test_a_renamed_article_names_its_new_subject_and_no_longer_the_old_one():
    item = {
        "title": "bee",
        "kind": "animal",
        "article": "A bee is small. Bees are busy. The bee flies.",
    }
    renamed = make_tiny_gpt2.rename(item, random.Random(0))
    name = renamed["title"]
    big = name.capitalize()
    assert renamed["article"] == f"{big} is small. {big} is busy. {big} flies."
    assert make_tiny_gpt2.rename({**item, "title": "wasp"}, random.Random(0)) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda good: good[:60],
        lambda good: good + good,
        lambda good: good + " Doctor, nurse, patient.",
        lambda good: good + f" {make_tiny_gpt2.WORDS['rude'][0]}",
        lambda good: good + "\u2019",
    ],
    ids=["short", "said twice", "medical", "rude", "no ASCII"],
)
def test_only_plain_articles_are_trained_on(spoil):
    good = everyday()[0]["article"]
    assert make_tiny_gpt2.is_plain(good)
    assert not make_tiny_gpt2.is_plain(spoil(good))


@pytest.mark.parametrize(
    "step, option",
    [("teacher", "--teacher"), ("tune", "--teacher"), ("tune", "--out"), ("sample", "--teacher"), ("train", "--out")],
)
def test_a_step_without_its_folder_ends_before_its_work(run_tool, tmp_path, monkeypatch, capsys, step, option):
    monkeypatch.setattr(make_tiny_gpt2, step, None)
    options = {"--teacher": tmp_path / "teacher", "--out": tmp_path / "out"}
    del options[option]
    with pytest.raises(SystemExit) as stop:
        run_tool(make_tiny_gpt2, step, *[word for pair in options.items() for word in pair])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {step} needs {option}\n")


def test_rows_to_train_on_are_cut_from_one_stream_of_documents(monkeypatch):
    monkeypatch.setattr(make_tiny_gpt2, "CONTEXT", 4)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokens = tokenizer("one two three four five six seven eight nine ten")["input_ids"]
    stream = 2 * [*tokens, tokenizer.eos_token_id]
    rows = make_tiny_gpt2.training_rows(tokenizer, lambda: [tokenizer.decode(tokens)])
    # each begins with the last token of the one before, which is not predicted twice
    assert [next(rows) for _ in range(3)] == [(stream[start : start + 5], 1) for start in (0, 4, 8)]


def test_the_samples_of_the_shipped_model_are_shown(run_tool, tmp_path, monkeypatch):
    few_tokens = {**make_tiny_gpt2.SHOWN_SAMPLING, "max_new_tokens": 12}
    monkeypatch.setattr(make_tiny_gpt2, "SHOWN_SAMPLING", few_tokens)
    output = run_tool(make_tiny_gpt2, "show", "--texts", tmp_path / "none")
    for prompt in make_tiny_gpt2.SHOWN_PROMPTS:
        assert re.search(rf"^--- {re.escape(repr(prompt))}\n.*\w", output, re.MULTILINE)
    assert held_out_losses(output, "everyday")[0] < 3  # a guess has a loss of 8.7
