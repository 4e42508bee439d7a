"""Speed: but for rounding, what is fast computes what is plain."""

import functools

import pytest
import torch
from conftest import TINY, load_tiny
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import finetune_medical_gpt2 as script
from finetune_medical_gpt2 import InputError, evaluate_perplexity


def load_bf16():
    return script.load_model(TINY, precision="bf16")


def test_bfloat16_scores_are_those_of_float32(tiny, rows):
    model, tokenizer = tiny
    texts = [text.split("<</SYS>>")[1][:400] for text in rows[1][:2]]
    exact = evaluate_perplexity(model, tokenizer, texts, max_length=256)
    rounded = evaluate_perplexity(load_bf16(), tokenizer, texts, max_length=256)
    for kind in ("full_text", "answer", "reference_protocol", "bits_per_byte"):
        assert rounded[kind] == pytest.approx(exact[kind], rel=0.01)


def test_only_the_matrices_are_rounded_and_the_embeddings_stay_as_they_are(tiny):
    rounded, exact = load_bf16().state_dict(), tiny[0].state_dict()
    for name, value in exact.items():
        is_matrix = name.endswith("weight") and ".c_" in name or name == "lm_head.weight"
        assert rounded[name].dtype == (torch.bfloat16 if is_matrix else torch.float32), name
        if not is_matrix:
            assert torch.equal(rounded[name], value)


def test_the_rounded_head_is_centred_and_gives_the_same_probabilities(tiny):
    exact, rounded = tiny[0].lm_head.weight, load_bf16().lm_head.weight.float()
    assert exact.mean(0).abs().max() > 0.1
    assert rounded.mean(0).abs().max() < 1e-3
    torch.manual_seed(0)
    hidden = torch.randn(5, 256)
    log_probs = (hidden @ rounded.T).log_softmax(-1)
    assert torch.allclose(log_probs, (hidden @ exact.T).log_softmax(-1), atol=0.05)


def train(trainer_class, precision, layers, rows, output_dir, steps=4):
    """(losses, gradient norms) of some steps with `trainer_class`, which change the whole adapter and nothing else."""
    model = script.load_model(TINY, precision=precision, dropout=0.0)  # no chance in it
    tokenizer = load_tiny()[1]
    encoded = script.encode(tokenizer, rows[0][:16], 32, end=True)
    config = SFTConfig(
        output_dir=str(output_dir),
        max_steps=steps,
        learning_rate=5e-3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        bf16=precision == "bf16",
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        max_length=64,
        disable_tqdm=True,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules=layers, fan_in_fan_out=True)
    data = script.training_data(encoded, on_prompt=True)
    trainer = trainer_class(model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
    return [[entry[name] for entry in trainer.state.log_history if name in entry] for name in ("loss", "grad_norm")]


@pytest.fixture(scope="module")
def stock_training(rows, tmp_path_factory):
    """LORA_TARGET_MODULES -> what `train` returns of TRL's own trainer in fp32."""

    @functools.cache
    def trained(layers):
        return train(SFTTrainer, "fp32", layers, rows, tmp_path_factory.mktemp("stock"))

    return trained


# In bf16 only the first step can be compared: what rounding changed there, the following ones blow up.
@pytest.mark.parametrize(
    "layers, precision, steps, tolerance",
    [(None, "fp32", 4, 1e-4), (None, "bf16", 1, 1e-2), ("all-linear", "fp32", 4, 1e-4)],
)
def test_the_fast_loss_is_the_stock_trainers_and_only_the_adapter_moves(
    rows, stock_training, tmp_path, layers, precision, steps, tolerance
):
    taken = max(steps, 2)  # in the first, half of the adapter has no gradient
    ours = train(script.LoRATrainer, precision, layers, rows, tmp_path, taken)
    for values, expected in zip(ours, stock_training(layers), strict=True):
        assert len(values) == taken
        assert values[:steps] == pytest.approx(expected[:steps], rel=tolerance)


@pytest.mark.parametrize(
    "processes, message",
    [(1, "1 process.es. for 2 GPU.s.: use torchrun --nproc_per_node=2"), (3, "3 process")],
)
def test_one_process_or_too_many_for_several_gpus_are_an_error(monkeypatch, processes, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with pytest.raises(InputError, match=message):
        script.choose_hardware()
