"""The programs beside the script: that their commands, as tests/README.md prints them, run."""

import functools
import json

import ablation
import benchmark
import pytest
from conftest import MICRO, SHORT_RUN, TINY, read
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
        small_arguments = [min(x, 6) if type(x) is int else x for x in arguments]
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
    "options, lengths", [((), [3, 4, 5]), (("--beside", "."), [4, 6, 5]), (("--pieces",), [8]), (("--rows",), [3])]
)
def test_the_benchmark_prints_its_tables(run_tool, tiny_benchmark, options, lengths):
    output = run_tool(benchmark, "--steps", "1", *options)
    found = tables(output)
    assert [len(table) for table in found] == lengths
    if not options:
        reference = found[0][0]
        assert reference[2] == "1.0" and reference[-1].endswith("%")
        assert output.count(" hours") == 3


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
    for name in (*script.SETTINGS, "score_rows", "SFTConfig"):  # which it changes: put back at the end
        monkeypatch.setattr(script, name, getattr(script, name))
    score_rows, scored = script.score_rows, []

    def counted(model, tokenizer, texts, **options):
        scored.append(texts)
        return score_rows(model, tokenizer, texts, **options)

    monkeypatch.setattr(script, "score_rows", counted)
    for name in ("FACTS", "EVERYDAY", "SAMPLE_ROWS"):
        monkeypatch.setattr(script, name, SHORT_RUN[name])
    monkeypatch.setattr(script, "LOGGING_STEPS", 1)
    options = ("--steps", 4, "--rows", 4, "--max-length", 180, "--test-size", 0.2)
    options += ("--only", "rate 3e-3", "cosine", "--output-dir", tmp_path / "out")
    (table,) = tables(run_tool(ablation, MICRO, few_rows, *options))
    assert [line[0] for line in table] == ["untouched model", "learning rate 3e-3", "cosine schedule at 3e-3"]

    assert len(scored) == 5 + 2 * 4  # the untouched model, which is measured once, and two variants
    (linear,) = (tmp_path / "out").glob("micro_gpt2-*")
    (cosine,) = (tmp_path / "out" / "cosine").iterdir()
    of_thirds = {linear: (1, 2 / 3, 1 / 3), cosine: (1, 0.75, 0.25)}  # 1/2 + cos(pi t) / 2 at t = 0, 1/3, 2/3
    for run, line in zip(of_thirds, table[1:], strict=True):
        results = read(run)
        perplexity, facts = results["perplexity"], results["facts"]
        before, after = perplexity["before"], perplexity["after"]
        assert after["answer"] < before["answer"]
        for cells, when in ((table[0], "before"), (line, "after")):
            figures = [perplexity[when]["answer"], perplexity[when]["full_text"]]
            figures += [perplexity[name][when] for name in ("trained", "everyday")]
            assert [cells[1], *cells[3:6]] == [f"{figure:.2f}" for figure in figures]
            assert cells[6].split(" ")[0] == f"{facts[when]:.1%}"
        change, low, high = (100 * share for share in (facts["change"], *facts["change_ci95"]))
        assert line[6].endswith(f" ({change:+.1f} points: {low:+.1f} to {high:+.1f})")
        assert line[7] == f"{results['training']['trainable_parameters']:,}"
        assert results["training"]["steps"] == 4 and results["settings"]["GRADIENT_ACCUMULATION_STEPS"] == 1
        rates = [entry.get("learning_rate") for entry in results["training"]["log_history"]]
        assert [x for x in rates if x is not None] == pytest.approx([0, *(3e-3 * share for share in of_thirds[run])])


def test_the_ablation_says_which_variants_there_are_before_anything_is_trained(run_tool, capsys):
    with pytest.raises(SystemExit):
        run_tool(ablation, TINY, "none.jsonl", "--only", "4e-3")
    assert "learning rate 1e-3; learning rate 3e-3; " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_tool(ablation, TINY, "none.jsonl", "--rows", 6)
    assert "--rows 6: not a multiple of 4" in capsys.readouterr().err
