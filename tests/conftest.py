"""Fixtures: the tiny GPT-2 and the medical terms of the offline default, and one short run of the script on them."""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
os.environ["HF_HUB_OFFLINE"] = "1"  # the tests need no network and must not try
# One thread, here and in every process that a test starts: several processes that spin for the same two cores take
# many times as long, and the models are too small to gain from more.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import pytest  # noqa: E402
import torch  # noqa: E402

import finetune_medical_gpt2 as script  # noqa: E402

SHORT_RUN = {
    "MODEL_NAME": str(TESTS / "tiny_gpt2"),
    "DATASET_NAME": str(TESTS / "medical_terms.jsonl"),
    "MAX_STEPS": 24,
    "EVAL_STEPS": 10,
    "LOGGING_STEPS": 5,
    "LEARNING_RATE": 1e-2,
    "BATCH_SIZE": 4,
    "GRADIENT_ACCUMULATION_STEPS": 1,
    "MAX_LENGTH": 256,
    "MAX_NEW_TOKENS": 24,
    "TITLE_ROWS": 8,
    "GENERAL_ARTICLES": 3,
}


def set_constants(patch, output_dir, **changes):
    """Set the script's constants for a short run, `changes` on top; `patch` is a pytest MonkeyPatch."""
    for name, value in {**SHORT_RUN, "OUTPUT_DIR": str(output_dir), **changes}.items():
        assert hasattr(script, name), name
        patch.setattr(script, name, value)


def load_tiny():
    model = script.load_model(TESTS / "tiny_gpt2").eval()
    tokenizer = script.AutoTokenizer.from_pretrained(TESTS / "tiny_gpt2")
    return model, tokenizer


@pytest.fixture(scope="session")
def tiny():
    """The tiny model, as it ships, and its tokenizer; tests don't change them."""
    return load_tiny()


@pytest.fixture(scope="session")
def rows():
    """The texts of the medical terms, cleaned and split: (train, test)."""
    source = str(TESTS / "medical_terms.jsonl")
    train, test, _ = script.load_splits(source, test_size=0.1, seed=42)
    return train["text"][:], test["text"][:]


@pytest.fixture(scope="session")
def fp32(request):
    """Run the script in fp32 whatever this machine's CPU can do, so that figures can be compared exactly."""
    patch = pytest.MonkeyPatch()
    patch.setattr(script, "choose_hardware", lambda: ("cpu", "fp32", "test CPU"))
    request.addfinalizer(patch.undo)


@pytest.fixture(scope="session")
def short_run(tmp_path_factory, request):
    """The folder of one finished run of main(), on whatever hardware this is."""
    patch = pytest.MonkeyPatch()
    set_constants(patch, tmp_path_factory.mktemp("outputs"), SAVE_MERGED=True)
    threads = torch.get_num_threads()
    folder = script.main()
    torch.set_num_threads(threads)
    patch.undo()
    return folder
