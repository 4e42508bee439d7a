"""What moves the answer perplexity: one change at a time to the reference recipe, same split, same steps, same tokens.

    python tests/ablation.py MODEL DATASET [--steps 60] [--rows 200] [--output-dir ablation]

MODEL and DATASET are what MODEL_NAME and DATASET_NAME take. Every variant is a run of the script; all adapters are then
scored on the same held-out rows, cut at 512 tokens, whatever they were trained at. Prints a Markdown table.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import finetune_medical_gpt2 as script  # noqa: E402

VARIANTS = {
    "reference recipe (learning rate 1e-4, r 8, PEFT's default modules)": {},
    "learning rate 3e-4": {"LEARNING_RATE": 3e-4},
    "learning rate 1e-3": {"LEARNING_RATE": 1e-3},
    "learning rate 3e-3": {"LEARNING_RATE": 3e-3},
    "LoRA on all linear layers": {"LORA_TARGET_MODULES": "all-linear"},
    "loss on the answers only": {"TRAIN_ON_PROMPT": False},
    "r 32, same alpha / r": {"LORA_R": 32, "LORA_ALPHA": 128},
    "1,024 tokens, half the rows a step": {"MAX_LENGTH": 1024, "BATCH_SIZE": 2},
    "learning rate 1e-3, all linear layers": {"LEARNING_RATE": 1e-3, "LORA_TARGET_MODULES": "all-linear"},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of every variant")
    parser.add_argument("--rows", type=int, default=200, help="held-out rows to score")
    parser.add_argument("--output-dir", default="ablation")
    args = parser.parse_args()
    precision = script.choose_hardware()[1]
    scoring = {"max_length": 512, "dtype": torch.bfloat16 if precision == "bf16" else torch.float32}
    common = {"MODEL_NAME": args.model, "MODEL_REVISION": None, "DATASET_NAME": args.dataset, "MAX_STEPS": args.steps}
    common |= {"EVAL_STEPS": args.steps, "OUTPUT_DIR": args.output_dir, "MAX_NEW_TOKENS": 1, "TEST_SIZE": 0.05}
    defaults = {name: getattr(script, name) for name in script.SETTINGS}
    splits = script.load_splits(args.dataset, test_size=common["TEST_SIZE"], seed=script.SEED)
    texts = splits[1]["text"][: args.rows]
    tokenizer = script.AutoTokenizer.from_pretrained(args.model)
    base = script.score_rows(script.load_model(args.model), tokenizer, texts, **scoring)
    lines = [("untouched model", base, None)]
    for name, changes in VARIANTS.items():
        vars(script).update(defaults | common | changes)
        run = script.main()
        training = json.loads((run / "results.json").read_text())["training"]
        model = script.PeftModel.from_pretrained(script.load_model(args.model), str(run / "adapter"))
        lines.append((name, script.score_rows(model, tokenizer, texts, **scoring), training))
    print("| | answer perplexity | 95 % interval | full text | trainable parameters | tokens | training time |")
    print("|---" * 7 + "|")
    for name, rows, training in lines:
        scores = script.summarize_scores(rows)
        low, high = scores["answer_ci95"]
        cost = "– | – | –"
        if training:
            seconds = f"{training['seconds']:,.0f} s"
            cost = f"{training['trainable_parameters']:,} | {training['tokens']:,} | {seconds}"
        print(f"| {name} | {scores['answer']:.2f} | {low:.2f} to {high:.2f} | {scores['full_text']:.2f} | {cost} |")


if __name__ == "__main__":
    main()
