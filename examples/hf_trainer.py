"""Hugging Face Trainer: the optimizer by class and arguments, clipping in the step, resume from a checkpoint.

python examples/hf_trainer.py
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from adamw_triton import AdamW


class Repeated(torch.utils.data.Dataset):
    """Sequences that repeat four tokens."""

    def __len__(self):
        return 256

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, 64, (4,), generator=generator).repeat(8)
        return {"input_ids": tokens, "labels": tokens}


def trainer(folder, steps):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=128, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=16, weight_decay=0.1, save_steps=20,
        logging_steps=10, report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        max_grad_norm=0.0,  # the step clips: not here, too
    )  # fmt: skip
    # Trainer makes the param groups, with its weight decay; all else is from here, lr among it.
    ours = {"lr": 3e-3, "max_grad_norm": 1.0, "exp_avg_dtype": "int8", "exp_avg_sq_dtype": "uint8"}
    return Trainer(model, arguments, train_dataset=Repeated(), optimizer_cls_and_kwargs=(AdamW, ours))


def main():
    with tempfile.TemporaryDirectory() as folder:
        first = trainer(folder, steps=40)
        loss = first.train().training_loss
        again = trainer(folder, steps=40)
        again.train(resume_from_checkpoint=f"{folder}/checkpoint-20")
        optimizer = again.optimizer.optimizer if hasattr(again.optimizer, "optimizer") else again.optimizer
        assert isinstance(optimizer, AdamW)
        pairs = zip(first.model.parameters(), again.model.parameters(), strict=True)
        same = all(torch.equal(p, q) for p, q in pairs)
    print(f"mean loss {loss:.3f}, gradient norm {optimizer.grad_norm.item():.3f}, resumed to the same weights: {same}")
    assert same


if __name__ == "__main__":
    main()
