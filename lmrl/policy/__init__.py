"""The policy: a language model with its tokenizer, adapters, heads and reference."""
