"""What moves the answer perplexity, and what it costs elsewhere: one or two changes at a time, same split and rows.

    python tests/ablation.py MODEL DATASET [--steps 60] [--rows 16] [--max-length 512] [--only WORD ...]

MODEL and DATASET are what MODEL_NAME and DATASET_NAME take. Every variant is a run of the script, on the same rows in
the same order. Prints a Markdown table that grows line by line; killed, the same command goes on where it was, and
what is done is only printed.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from peft.tuners.tuners_utils import BaseTunerLayer
from trl import SFTConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import finetune_medical_gpt2 as script  # noqa: E402


def with_cosine_schedule(**config):
    return SFTConfig(**config | {"lr_scheduler_type": "cosine"})


ALL = {"LORA_TARGET_MODULES": "all-linear"}
VARIANTS = {
    "the reference's settings (learning rate 1e-4, r 8, PEFT's default modules)": {},
    "learning rate 3e-4": {"LEARNING_RATE": 3e-4},
    "learning rate 1e-3": {"LEARNING_RATE": 1e-3},
    "learning rate 3e-3": {"LEARNING_RATE": 3e-3},
    "all linear layers at 1e-4": ALL,
    "all linear layers at 1e-3": ALL | {"LEARNING_RATE": 1e-3},
    "all linear layers at 3e-3": ALL | {"LEARNING_RATE": 3e-3},
    "answers' loss alone, all linear layers, 1e-3": ALL | {"LEARNING_RATE": 1e-3, "TRAIN_ON_PROMPT": False},
    "loss on the answers only": {"TRAIN_ON_PROMPT": False},
    "r 32, same alpha / r": {"LORA_R": 32, "LORA_ALPHA": 128},
    "r 32, alpha 32, learning rate 1e-3": {"LORA_R": 32, "LEARNING_RATE": 1e-3},
    "cosine schedule at 3e-3": {"LEARNING_RATE": 3e-3, "SFTConfig": with_cosine_schedule},
}
HEAD = (
    "",
    "answer perplexity",
    "95 % interval",
    "whole rows",
    "training articles",
    "everyday text",
    "facts right",
    "trainable parameters",
    "training time",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step, a multiple of 4")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row, in training and in scoring")
    parser.add_argument("--test-size", type=float, default=0.05, help="share of the rows that is held out and scored")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="variants whose name holds one of these"
    )
    parser.add_argument("--output-dir", default="ablation")
    args = parser.parse_args()
    if args.rows < 1 or args.rows % script.BATCH_SIZE:
        parser.error(f"--rows {args.rows}: not a multiple of {script.BATCH_SIZE}")
    chosen = [name for name in VARIANTS if any(word in name for word in args.only)]
    if not chosen:
        parser.error(f"--only {' '.join(args.only)}: in none of the names {'; '.join(VARIANTS)}")
    common = {"MODEL_NAME": args.model, "MODEL_REVISION": None, "DATASET_NAME": args.dataset, "MAX_STEPS": args.steps}
    common |= {"MAX_LENGTH": args.max_length, "EVAL_STEPS": args.steps, "TEST_SIZE": args.test_size}
    common |= {"GRADIENT_ACCUMULATION_STEPS": args.rows // script.BATCH_SIZE}
    common |= {"MAX_NEW_TOKENS": 1, "OUTPUT_DIR": args.output_dir}
    defaults = {name: getattr(script, name) for name in (*script.SETTINGS, "SFTConfig")}

    score_rows, known = script.score_rows, {}

    def score_base_once(model, tokenizer, texts, **kwargs):
        """`score_rows`; the untouched model scores the same in every run, so it does so in the first alone."""
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        if not layers[0].disable_adapters:
            return score_rows(model, tokenizer, texts, **kwargs)
        key = (*texts, "shown" in kwargs)
        if key not in known:
            known[key] = score_rows(model, tokenizer, texts, **kwargs)
        return known[key]

    script.score_rows = score_base_once
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
    for name in chosen:
        changes = VARIANTS[name]
        if "SFTConfig" in changes:  # not a setting: the run's folder isn't named after it, nor does its report tell
            changes = changes | {"OUTPUT_DIR": f"{args.output_dir}/cosine"}
        vars(script).update(defaults | common | changes)
        with contextlib.redirect_stdout(sys.stderr):
            results = json.loads((script.main() / "results.json").read_text())
        if name == chosen[0]:
            print(table_line("untouched model", results, "before", "– | –"))
        training = results["training"]
        cost = f"{training['trainable_parameters']:,} | {training['seconds']:,.0f} s"
        print(table_line(name, results, "after", cost), flush=True)


def table_line(name, results, when, cost):
    perplexity, facts = results["perplexity"], results["facts"]
    scores = perplexity[when]
    answers = f"{scores['answer']:.2f} | {scores['answer_ci95'][0]:.2f} to {scores['answer_ci95'][1]:.2f}"
    others = f"{scores['full_text']:.2f} | {perplexity['trained'][when]:.2f} | {perplexity['everyday'][when]:.2f}"
    right = f"{facts[when]:.1%}"
    if when == "after":
        points = [100 * share for share in (facts["change"], *facts["change_ci95"])]
        right += " ({:+.1f} points: {:+.1f} to {:+.1f})".format(*points)
    return f"| {name} | {answers} | {others} | {right} | {cost} |"


if __name__ == "__main__":
    main()
