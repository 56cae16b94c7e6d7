"""The reference job: a byte-level GPT on text, data-parallel, with compressed gradients."""
