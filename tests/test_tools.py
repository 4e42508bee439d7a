"""The programs beside the script: that their commands, as the README and tiny_gpt2/README.md print them, run."""

import functools
import json
import random
import re
import sys

import benchmark
import make_tiny_gpt2
import pytest
import torch
from conftest import TESTS
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, LlamaForCausalLM


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Run a tool's main() with a command line in this process -> what it printed; threads and patches are put back."""
    threads = torch.get_num_threads()

    def run(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool.__file__, *map(str, arguments)])
        tool.main()
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


MATMUL_RATES = functools.cache(benchmark.measure_matmul)


@pytest.fixture
def tiny_benchmark(monkeypatch):
    """The benchmark with a small layer, few words, short rows and answers, its measurements in this process."""
    small = {"n_layer": 1, "n_embd": 48, "n_head": 4, "vocab_size": 500}
    monkeypatch.setattr(benchmark, "GPT2Config", functools.partial(GPT2Config, **small))
    monkeypatch.setattr(benchmark, "make_tokenizer", functools.partial(benchmark.make_tokenizer, 500))
    monkeypatch.setattr(benchmark, "measure_matmul", MATMUL_RATES)
    monkeypatch.setattr(benchmark, "ANSWER_TOKENS", range(3, 25, 2))

    def in_this_process(function, *args, checkout=None):
        return getattr(benchmark, function)(*(min(x, 60) if type(x) is int else x for x in args))

    monkeypatch.setattr(benchmark, "in_own_process", in_this_process)


@pytest.mark.parametrize(
    ("options", "tables"), [((), (3, 4)), (("--beside", "."), (4, 6)), (("--pieces",), (8,)), (("--rows",), (3,))]
)
def test_the_benchmark_prints_its_tables(run_tool, tiny_benchmark, options, tables):
    output = run_tool(benchmark, "--steps", "1", *options)
    found = [re.findall(r"^\| (?!training|scoring and|rows)(.+) \|$", x, re.M) for x in output.split("|---|\n")[1:]]
    assert tuple(map(len, found)) == tables
    if not options:
        assert found[0][0].endswith("%") and " | 1.0 | " in found[0][0] and output.count(" hours") == tables[1] // 2


def write_wordnet(folder, words):
    """A WordNet of nouns that are all kinds of the first, in its own format."""
    folder.mkdir()
    lines, counts = ["  1 the licence"], []
    for i, word in enumerate(words):
        kinds = "".join(f" ~ {j:08d} n 0000" for j in range(1, len(words))) if i == 0 else " @ 00000000 n 0000"
        number = len(words) - 1 if i == 0 else 1
        lines.append(f'{i:08d} 06 n 01 {word} 0 {number:03d}{kinds} | a thing that is number {i}; "a {word}"  ')
        counts.append(f"{word}%1:06:00:: 1 {i + 1}")
    for name in ("noun", "verb", "adj", "adv"):
        (folder / f"data.{name}").write_text("\n".join(lines if name == "noun" else lines[:1]) + "\n")
    (folder / "cntlist.rev").write_text("\n".join(counts) + "\n")


def test_a_tiny_gpt2_is_made_from_wordnet_and_sampled_articles_and_trained_on(run_tool, tmp_path):
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghij", k=7)) for _ in range(200)]
    write_wordnet(tmp_path / "wordnet", words)
    subjects = make_tiny_gpt2.choose_subjects(tmp_path / "wordnet", plain=True)
    assert {"artifact", "problem", "body"} == {kind for _, kind, _ in subjects}
    assert (words[0], "artifact") in [subject[:2] for subject in subjects]
    (tmp_path / "work").mkdir()
    with open(tmp_path / "work" / "plain-1.jsonl", "w") as file:
        for item in make_tiny_gpt2.read_everyday()[:150]:
            answer = {"subject": item["title"], "kind": "artifact", "prompt": "", "text": item["article"]}
            file.write(json.dumps(answer | {"finished": True}) + "\n")
    small = ("--wordnet", tmp_path / "wordnet", "--work", tmp_path / "work", "--length", 64, "--rows", 16)
    small += ("--width", 64, "--epochs", 1, "--everyday", 1, "--common", "--rename")
    first = run_tool(make_tiny_gpt2, "train", *small, "--layers", 1, "--vocabulary", 700, "--out", tmp_path / "one")
    more = ("--layers", 2, "--init", tmp_path / "one", "--out", tmp_path / "two")
    second = run_tool(make_tiny_gpt2, "train", *small, *more)
    one, two = (float(re.search(r"held-out everyday: loss ([\d.]+)", output).group(1)) for output in (first, second))
    assert two < one < 5.5  # 6.5 is the loss of a guess among 700
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert model.config.n_layer == 2 and model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(tmp_path / "two")) == model.config.vocab_size == 700


@pytest.fixture
def small_teacher(tmp_path):
    """A Llama of the teacher's kind, untrained: tied embeddings, shared key heads, the markers of its chat."""
    tokenizer = AutoTokenizer.from_pretrained(TESTS / "tiny_gpt2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **size, **heads)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_the_teacher_is_tuned_and_sampled(run_tool, tmp_path, small_teacher):
    options = ("--epochs", 1, "--lr", 1e-2, "--out", tmp_path / "tuned")
    output = run_tool(make_tiny_gpt2, "tune", "--teacher", small_teacher, *options)
    first, last = (float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", output))
    assert last < first - 1

    write_wordnet(tmp_path / "wordnet", ["thing", "chair", "table", "spoon"])
    options = ("--wordnet", tmp_path / "wordnet", "--work", tmp_path, "--batch", 2, "--new-tokens", 5, "--tokens", 30)
    run_tool(make_tiny_gpt2, "sample", "--teacher", tmp_path / "tuned", "--plain", "--seed", 3, *options)
    lines = [json.loads(line) for line in (tmp_path / "plain-3.jsonl").read_text().splitlines()]
    assert len(lines) >= 6 and all(line["text"] and line["subject"] in line["prompt"] for line in lines)


def test_the_fast_llama_gives_the_logits_of_the_slow_one(small_teacher):
    model, ids = AutoModelForCausalLM.from_pretrained(small_teacher).eval(), torch.randint(500, (3, 9))
    fast = make_tiny_gpt2.FastLlama(model, batch=3, length=16)
    with torch.no_grad():
        stepwise = torch.stack([fast.forward(ids[:, :7], 0), fast.forward(ids[:, 7:8], 7), fast.forward(ids[:, 8:], 8)])
        assert torch.allclose(stepwise.transpose(0, 1).float(), model(ids).logits[:, 6:], rtol=0.03, atol=0.01)


def test_the_samples_are_shown(run_tool):
    output = run_tool(make_tiny_gpt2, "show")
    assert [output.count(f"--- {prompt!r}\n") for prompt in make_tiny_gpt2.SHOW] == [1] * 5
