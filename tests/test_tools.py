"""The programs beside the script: that their commands, as tests/README.md prints them, run."""

import functools
import json

import ablation
import benchmark
import pytest
from conftest import TINY, read
from transformers import GPT2Config

import finetune_medical_gpt2 as script


@pytest.fixture(scope="module")
def matmul_rates():
    """What the machine can do, measured once for all tests."""
    return benchmark.measure_matmul(repeats=1, tokens=64)


@pytest.fixture
def tiny_benchmark(monkeypatch, matmul_rates):
    """The benchmark with a small layer, few words, short rows and answers, its measurements in this process."""
    small = {"n_layer": 1, "n_embd": 48, "n_head": 4, "vocab_size": 500}
    monkeypatch.setattr(benchmark, "GPT2Config", functools.partial(GPT2Config, **small))
    monkeypatch.setattr(benchmark, "make_tokenizer", functools.partial(benchmark.make_tokenizer, 500))
    monkeypatch.setattr(benchmark, "measure_matmul", lambda: matmul_rates)
    monkeypatch.setattr(benchmark, "ANSWER_TOKENS", range(3, 25, 2))

    def in_this_process(function, *arguments, checkout=None):
        small_arguments = [min(x, 60) if type(x) is int else x for x in arguments]
        return getattr(benchmark, function)(*small_arguments)

    monkeypatch.setattr(benchmark, "in_own_process", in_this_process)


def tables(output):
    """The Markdown tables in a text, without their heads, as lists of lists of cells; trainers print in between."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    heads = [number - 1 for number, line in enumerate(lines) if line.startswith("|---")]
    found = []
    for head, next_head in zip(heads, [*heads[1:], len(lines)], strict=True):
        found.append([line.strip("| ").split(" | ") for line in lines[head + 2 : next_head]])
    return found


@pytest.mark.parametrize(
    "options, lengths", [((), [3, 4]), (("--beside", "."), [4, 6]), (("--pieces",), [8]), (("--rows",), [3])]
)
def test_the_benchmark_prints_its_tables(run_tool, tiny_benchmark, options, lengths):
    output = run_tool(benchmark, "--steps", "1", *options)
    found = tables(output)
    assert [len(table) for table in found] == lengths
    if not options:
        reference = found[0][0]
        assert reference[2] == "1.0" and reference[-1].endswith("%")
        assert output.count(" hours") == 2


ECHO = "import json, sys; print('not this'); print(json.dumps([sys.argv[1:], __file__]))"


def test_a_measurement_of_another_checkout_is_made_in_a_process_of_its_own(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "benchmark.py").write_text(ECHO)
    arguments, file = benchmark.in_own_process("measure", {"b", "a"}, 5, checkout=tmp_path)
    assert (arguments, file) == (["--call", '["measure", ["a", "b"], 5]'], str(tmp_path / "tests" / "benchmark.py"))


def test_what_is_called_in_that_process_prints_its_result(run_tool):
    shown = run_tool(benchmark, "--call", '["make_texts", 2, 5]')
    assert json.loads(shown) == benchmark.make_texts(2, seed=5)


def test_the_ablation_prints_the_untouched_model_and_each_variant(run_tool, tmp_path, monkeypatch, few_rows):
    for name in (*script.SETTINGS, "TITLE_ROWS", "score_rows"):  # which it changes: put back at the end
        monkeypatch.setattr(script, name, getattr(script, name))
    monkeypatch.setattr(script, "GENERAL_ARTICLES", 3)
    options = ("--steps", 2, "--only", "rate 3e-3", "--title-rows", 4, "--max-length", 100)
    output = run_tool(ablation, TINY, few_rows, *options, "--output-dir", tmp_path / "out")
    (table,) = tables(output)
    untouched, variant = table
    assert [untouched[0], variant[0]] == ["untouched model", "learning rate 3e-3"]
    assert float(variant[1]) < float(untouched[1])
    (run,) = (tmp_path / "out").iterdir()
    assert read(run)["training"]["steps"] == 2
    assert variant[1] == f"{read(run)['perplexity']['after']['answer']:.2f}"
