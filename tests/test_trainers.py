"""Other people's trainers take a model of the zoo as any other: TRL's, with packing and with an adapter of peft.

transformers' own Trainer, and peft alone, are in the contract test of every architecture.
"""

import pytest
from datasets import Dataset
from peft import LoraConfig, PeftModel
from trl import SFTConfig, SFTTrainer

import zoo


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["mamba-tiny", "transformer-tiny"])
def test_supervised_fine_tuning(name, packing, tokenizer, tmp_path):
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = zoo.create_model(name, vocab_size=len(tokenizer), **special)
    rows = [{"prompt": f"say {i}", "completion": f" {i} {i}"} for i in range(16)]
    arguments = SFTConfig(
        tmp_path,
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_length=64,
        packing=packing,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    targets = list(zoo.registry.find_preset(name).lora_targets)
    trainer = SFTTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=targets, r=8) if packing else None,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0]
    assert isinstance(trainer.model, PeftModel) == packing
