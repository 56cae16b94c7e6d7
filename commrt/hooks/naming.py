"""Parameter names, the same however a model is wrapped."""

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Of torch.compile, FSDP1 and activation checkpointing."""


def plain_name(name: str) -> str:
    """Without what wrappers add, so that a state fits the model wrapped or not."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
        name = name.removesuffix(wrapper.removesuffix("."))
    return name.removesuffix(".")
