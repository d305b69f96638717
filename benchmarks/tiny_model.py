"""A random Qwen2-MoE of two layers and four experts, a few thousand parameters, with a tokenizer of one token a byte."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

__all__ = ["write_tiny_model"]

_SPECIAL = ("<|pad|>", "<|end|>", "<|bos|>")


def write_tiny_model(folder: Path) -> Path:
    """Write the model and its tokenizer as a Hugging Face folder; the same weights every time."""
    tokens = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIAL))
    pad, end, bos = _SPECIAL
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, eos_token=end, bos_token=bos).save_pretrained(folder)
    model = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=len(tokens),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            intermediate_size=40,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=28,
            max_position_embeddings=128,
            bos_token_id=2,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    # Routers start near zero, so that all experts are alike; here they must differ.
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return folder
