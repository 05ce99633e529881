"""PEFT: LoRA adapters in fp32 on a frozen bf16 model; only what is trained has state.

python examples/peft_lora.py
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from adamw_triton import AdamW


def main():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=128, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    base = GPT2LMHeadModel(config).to(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)  # frozen parameters may be listed
    tokens = torch.randint(0, 64, (16, 4)).repeat(1, 8)
    losses = []
    for _ in range(20):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    n = sum(p.numel() for p in trained)
    each = optimizer.state_bytes().total / n
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; {each:.2f} bytes of state for each of {n} parameters")
    assert losses[-1] < losses[0] and len(optimizer.state) == len(trained)


if __name__ == "__main__":
    main()
