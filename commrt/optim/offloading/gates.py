"""A step that ends during the next forward: each layer waits for its own weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

from torch import nn
from torch._dynamo import OptimizedModule
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from commrt.collectives.wrappers import inner_of
from commrt.errors import ConfigError

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Steps(Protocol):
    """What gates hold back."""

    overlaps: bool

    def wait(self, parameters: Collection[nn.Parameter] | None = None) -> None:
        """Return when these weights, or all, are those after the step."""

    def reorder(self, parameters: Sequence[nn.Parameter]) -> None:
        """Step parameters in this order."""


class _Hook:
    """What a module calls; a copy of the module, whose weights nothing steps, calls nothing."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)


def _nothing(*_: Any) -> None:
    """Does nothing."""


class Gates:
    """Hooks before the forwards of a model's layers, and around the model's.

    A layer is a member of a list of modules, a module beside such lists, or what FSDP2 gathers at
    once. The first forward finds out which layers are called, and in which order; the weights of
    others are waited for before the model's. After a forward nothing is left of the step.

    Args:
        model: Whose weights are stepped.
        steps: What to wait for.

    Raises:
        ConfigError: The model is compiled in place.
    """

    def __init__(self, model: nn.Module, steps: Steps) -> None:
        self._root, self._steps = root_of(model), steps
        self._called: list[nn.Module] = []
        self._layers = dict(_layers(self._root))
        self._early: list[nn.Parameter] | None = None
        hooks = [
            self._root.register_forward_pre_hook(_Hook(self._before_all), prepend=True),
            self._root.register_forward_hook(_Hook(self._after_all)),
            self._root.register_load_state_dict_pre_hook(_Hook(self._wait_for_all)),
            self._root.register_state_dict_pre_hook(_Hook(self._wait_for_all)),
        ]
        # FSDP's own, which gathers weights, has been there before.
        before = self._root._state_dict_pre_hooks
        for earlier in [id_ for id_ in before if id_ != hooks[-1].id]:
            before[earlier] = before.pop(earlier)
        for layer, parameters in self._layers.items():
            if layer is not self._root:
                hook = _Hook(self._before(parameters))
                hooks.append(layer.register_forward_pre_hook(hook, prepend=True))
        self._hooks = hooks

    def remove(self) -> None:
        """Take the hooks away."""
        self._steps.overlaps = False
        for hook in self._hooks:
            hook.remove()

    def _before(self, parameters: Sequence[nn.Parameter]) -> Callable[..., None]:
        def wait(layer: nn.Module, _: Any) -> None:
            if self._early is not None:
                self._steps.wait(parameters)
            elif layer not in self._called:
                self._called.append(layer)

        return wait

    def _wait_for_all(self, *_: Any) -> None:
        self._steps.wait()

    def _before_all(self, *_: Any) -> None:
        self._steps.wait(self._early)

    def _after_all(self, *_: Any) -> None:
        self._steps.wait()
        if self._early is not None:
            return
        called = [self._root, *self._called]
        self._early = [
            parameter
            for layer, parameters in self._layers.items()
            if layer is self._root or layer not in self._called
            for parameter in parameters
        ]
        in_order = [p for layer in called for p in self._layers.get(layer, ())]
        self._steps.reorder([*self._early, *in_order])
        self._steps.overlaps = True


def root_of(model: nn.Module) -> nn.Module:
    """The innermost module whose hooks are called as they are, with every forward."""
    while not isinstance(model, OptimizedModule) and (inner := inner_of(model)) is not None:
        model = inner
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ConfigError("model.compile() compiles hooks away: must be torch.compile(model)")
    return model


def _layers(root: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules whose weights nothing reads before they are called, with these weights."""
    modules = list(root.modules())
    if any(map(_reads_ahead, modules)):
        yield root, list(root.parameters())
    elif any(isinstance(module, FSDPModule) for module in modules):
        yield from _units(root)
    else:
        yield from _members(root, is_member=False)


def _reads_ahead(module: nn.Module) -> bool:
    """Whether weights are gathered before the hooks of their layer, or hooks are compiled."""
    is_prefetching = False
    if isinstance(module, FSDPModule):
        is_prefetching = bool(module._get_fsdp_state()._states_to_forward_prefetch)
    is_compiled = getattr(module, "_compiled_call_impl", None) is not None
    is_whole = isinstance(module, (FullyShardedDataParallel, OptimizedModule))
    return is_prefetching or is_compiled or is_whole


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """What FSDP2 gathers at once."""
    own = list(module.parameters(recurse=False))
    pending = list(module.children())
    while pending:
        child = pending.pop(0)
        if isinstance(child, FSDPModule):
            yield from _units(child)
        else:
            own += child.parameters(recurse=False)
            pending += child.children()
    yield module, own


def _members(
    module: nn.Module, *, is_member: bool
) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    is_list = isinstance(module, _LISTS)
    has_lists = any(isinstance(inner, _LISTS) for inner in module.modules())
    if not is_list and (is_member or not has_lists):
        yield module, list(module.parameters())
        return
    yield module, list(module.parameters(recurse=False))
    for child in module.children():
        yield from _members(child, is_member=is_list)
