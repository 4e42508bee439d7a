"""What the test files share: constants, helper functions to import, and the fixtures.

`tiny` is the demo's model, `rows` are some of its data, `short_run` is the folder of one finished run on them with a
smaller model. All three are made once and read by many tests, so a test that changes something works on a copy.
"""

import gc
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
os.environ["PYTHONPATH"] = str(TESTS.parent)  # for the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"  # the tests need no network and must not try
# One thread in every process (but torchrun's, which the script sets), and none that spins while it waits: several that
# do so on the same two cores take many times as long.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import pytest  # noqa: E402
import torch  # noqa: E402

import finetune_medical_gpt2 as script  # noqa: E402

# A run collects garbage twice. It need not look through all that the imports have made, which takes half a second.
gc.freeze()
TINY = TESTS / "tiny_gpt2"


def no_plot(*args, **kwargs):
    """Drawing takes a third of a short run, and has tests of its own."""


def make_micro():
    """A folder with an untrained GPT-2 of half a million parameters and the tiny model's tokenizer."""
    folder = Path(tempfile.mkdtemp(), "micro_gpt2")
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = script.AutoConfig.from_pretrained(TINY, n_layer=1, n_embd=64, n_head=2, dtype="float32")
    torch.manual_seed(0)
    script.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def first_lines(name, count):
    """A file with the first lines of one in tests/."""
    lines = (TESTS / name).read_text(encoding="utf-8").splitlines(keepends=True)
    path = Path(tempfile.mkdtemp(), name)
    path.write_text("".join(lines[:count]), encoding="utf-8")
    return path


script.transformers.utils.logging.disable_progress_bar()
MICRO = make_micro()
script.transformers.utils.logging.enable_progress_bar()  # the script itself must hide it
SHORT_RUN = {
    "MODEL_NAME": str(MICRO),
    "MODEL_REVISION": None,
    "DATASET_NAME": str(first_lines("medical_terms.jsonl", 160)),
    "MAX_STEPS": 24,
    "EVAL_STEPS": 10,
    "LOGGING_STEPS": 5,
    "LEARNING_RATE": 4e-3,
    "BATCH_SIZE": 2,
    "GRADIENT_ACCUMULATION_STEPS": 1,
    "MAX_LENGTH": 256,
    "MAX_NEW_TOKENS": 24,
    "SAMPLE_ROWS": 4,
    "FACTS": first_lines("medical_facts.jsonl", 8),
    "EVERYDAY": first_lines("everyday.jsonl", 2),
}
# On top of SHORT_RUN, where it is enough that a run goes through; ONE_STEP draws no plots.
ONE_STEP_DRAWN = {
    "MAX_STEPS": 1,
    "MAX_LENGTH": 64,
    "QUESTIONS": {"Gout": "What is gout?"},
    "MAX_NEW_TOKENS": 2,
    "SAMPLE_ROWS": 1,
}
NOT_DRAWN = {"plot_training_loss": no_plot, "plot_perplexity": no_plot}
ONE_STEP = {**ONE_STEP_DRAWN, **NOT_DRAWN}


def set_constants(patch, output_dir, **changes):
    """Set the script's constants for a short run, `changes` on top; `patch` is a pytest MonkeyPatch."""
    for name, value in {**SHORT_RUN, "OUTPUT_DIR": str(output_dir), **changes}.items():
        assert hasattr(script, name), name
        patch.setattr(script, name, value)


def row(title, answer="It is a thing."):
    """A row of the data, in the form of the reference's data set."""
    return script.format_prompt(f"What is {title} and explain in detail?") + f" {answer} </s>"


def read(run):
    """The content of a run's results.json."""
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def flat(scores):
    """Perplexities as one list of numbers, which is what pytest.approx can compare."""
    numbers = []
    for value in scores.values():
        numbers += value if isinstance(value, list) else [value]
    return numbers


def without_times(results):
    """What two runs of the same command must share: everything but times and folders."""
    results = json.loads(json.dumps(results))
    del results["stage_seconds"]
    for group, name in (("training", "seconds"), ("training", "tokens_per_second"), ("settings", "OUTPUT_DIR")):
        del results[group][name]
    return results


def load_tiny(folder=TINY):
    """A model and a tokenizer as `tiny` has them, for a test that changes them."""
    model = script.load_model(folder).eval()
    tokenizer = script.AutoTokenizer.from_pretrained(folder)
    return model, tokenizer


def unigram_model(log_probs, offset=0.0):
    """A GPT-2 with the same known log-probabilities at every position; `offset` shifts all logits."""
    model, tokenizer = load_tiny(MICRO)
    with torch.no_grad():
        # the last layer norm gives (1, 0, 0, ...), whatever it is given
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()[0] = 1.0
        model.get_input_embeddings().weight.zero_()[:, 0] = log_probs + offset
    return model, tokenizer


def plain_nll(model, ids):
    """NLL of every token but the first, from the model's own logits: one row, no padding, no tricks."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


@pytest.fixture(scope="session")
def tiny():
    """The tiny model, as it ships, and its tokenizer; tests don't change them."""
    return load_tiny()


@pytest.fixture(scope="session")
def rows():
    """The texts of the medical terms that the short run takes, cleaned and split: (train, test)."""
    train, test, _ = script.load_splits(SHORT_RUN["DATASET_NAME"], test_size=0.1, seed=42)
    return train["text"][:], test["text"][:]


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    """The folder of one finished run of main(), on whatever hardware this is."""
    with pytest.MonkeyPatch.context() as patch:
        set_constants(patch, tmp_path_factory.mktemp("outputs"))
        return script.main()


@pytest.fixture
def few_rows(tmp_path):
    """A small data file whose name has what plots and some terminals can't take.

    24 rows of 203 to 241 tokens, 14 to 25 of them the prompt, which has no system prompt here.
    """
    text = (TESTS / "medical_terms.jsonl").read_text()
    lines = re.sub(r"<s> \[INST\] <<SYS>>.*<</SYS>>", "[INST]", text).splitlines(keepends=True)
    path = tmp_path / "cost$_$данные.jsonl"
    path.write_text("".join(lines[:24]))
    return path


@pytest.fixture
def expect_error(tmp_path, monkeypatch, capsys):
    """A function: main() with these constants must end with 2 and one line that holds `message`, and leave no run."""

    def expect(message, **changes):
        set_constants(monkeypatch, tmp_path / "out", **changes)
        capsys.readouterr()  # what the test itself has shown
        with pytest.raises(SystemExit) as stop:
            script.main()
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
        assert not list(tmp_path.glob("out/*/*"))

    return expect


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """A function: a tool's main() with a command line, in this process -> what it printed."""
    threads = torch.get_num_threads()

    def run(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool.__file__, *map(str, arguments)])
        tool.main()
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)  # make_tiny_gpt2.py sets them
