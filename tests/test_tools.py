"""The programs beside the script: that their commands, as the README prints them, run."""

import functools
import re
import sys

import benchmark
import pytest
import torch
from transformers import GPT2Config


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
