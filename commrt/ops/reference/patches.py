"""Patches, a group at a time; :mod:`commrt.ops.patches` has the layout."""

import torch
from torch import Tensor

from commrt.ops.patches import (
    ENTRY_BYTES,
    GROUP,
    TOTAL_BYTES,
    damaged,
    header_bytes,
    num_groups,
)

SAME, PATCH, RAW = range(3)
ESCAPE = 15
MASK_BYTES = GROUP // 8


def patch_encode(new: Tensor, old: Tensor, payload: Tensor) -> None:
    """See :func:`commrt.ops.patch_encode`."""
    numel, at = new.numel(), header_bytes(new.numel())
    entries = []
    for group in range(num_groups(numel)):
        window = slice(group * GROUP, (group + 1) * GROUP)
        kind, body = _encode_group(new[window], old[window])
        entries.append(at + kind if kind != SAME else 0)
        payload[at : at + body.numel()] = body
        at += body.numel()
    payload[:TOTAL_BYTES] = _bytes(torch.tensor([at]))
    payload[TOTAL_BYTES : header_bytes(numel)] = _bytes(_words(entries))


def patch_apply_(weights: Tensor, payload: Tensor) -> None:
    """See :func:`commrt.ops.patch_apply_`."""
    numel = weights.numel()
    total = int.from_bytes(payload[:TOTAL_BYTES].tolist(), "little")
    if not header_bytes(numel) <= total <= payload.numel():
        raise damaged(numel)
    whole = payload[:total].cpu()
    entries = whole[TOTAL_BYTES : header_bytes(numel)].clone().view(torch.int32)
    for group, entry in enumerate((entries.long() & 0xFFFFFFFF).tolist()):
        weight_K = weights[group * GROUP : (group + 1) * GROUP]
        offset, kind = entry & ~3, entry & 3
        if kind == SAME:
            continue
        is_inside = header_bytes(numel) <= offset <= total
        new_K = _decode_group(weight_K.cpu(), kind, whole[offset:]) if is_inside else None
        if new_K is None:
            raise damaged(numel)
        _as_int(weight_K).copy_(new_K)


def _encode_group(new_K: Tensor, old_K: Tensor) -> tuple[int, Tensor]:
    """The kind and the body of a group."""
    changed_K = _as_int(new_K) != _as_int(old_K)
    if not changed_K.any():
        return SAME, torch.zeros(0, dtype=torch.uint8)
    code_C = _codes(new_K[changed_K], old_K[changed_K])
    escaped = new_K[changed_K][code_C == ESCAPE]
    mask = _packed(changed_K.long(), 1, MASK_BYTES)
    body = torch.cat((mask, _padded(_packed(code_C, 4)), _padded(_bytes(escaped))))
    raw = _padded(_bytes(new_K))
    return (PATCH, body) if body.numel() < raw.numel() else (RAW, raw)


def _decode_group(old_K: Tensor, kind: int, rest: Tensor) -> Tensor | None:
    """A group's new bits from its body, which ``rest`` begins with; None if that is damaged."""
    bits_K = _as_int(old_K).clone()
    if kind == RAW:
        raw = rest[: bits_K.numel() * bits_K.element_size()]
        is_whole = raw.numel() == bits_K.numel() * bits_K.element_size()
        return raw.clone().view(bits_K.dtype) if is_whole else None
    if kind != PATCH or rest.numel() < MASK_BYTES:
        return None
    mask = _unpacked(rest[:MASK_BYTES], 1).bool()
    changed_K, num_changed = mask[: bits_K.numel()], int(mask.sum())
    code_bytes = _padded_size(-(-num_changed // 2))
    if mask[bits_K.numel() :].any() or rest.numel() < MASK_BYTES + code_bytes:
        return None
    code_all = _unpacked(rest[MASK_BYTES : MASK_BYTES + code_bytes], 4)
    code_C = code_all[:num_changed]
    escaped_bytes = int((code_all == ESCAPE).sum()) * bits_K.element_size()
    escaped = rest[MASK_BYTES + code_bytes :][:escaped_bytes]
    if escaped.numel() < escaped_bytes:
        return None
    zigzag_C = code_C + 1
    step_C = torch.where(zigzag_C % 2 == 1, -(zigzag_C + 1) // 2, zigzag_C // 2)
    new_C = _ordered(_wrapped(_ordered(bits_K[changed_K].long(), bits_K) + step_C, bits_K), bits_K)
    new_C[code_C == ESCAPE] = escaped.clone().view(bits_K.dtype)[: (code_C == ESCAPE).sum()].long()
    bits_K[changed_K] = new_C.to(bits_K.dtype)
    return bits_K


def _codes(new: Tensor, old: Tensor) -> Tensor:
    """Of elements that have changed."""
    new_bits, old_bits = _as_int(new), _as_int(old)
    step = _ordered(new_bits.long(), new_bits) - _ordered(old_bits.long(), old_bits)
    step = _wrapped(step, new_bits)
    zigzag = torch.where(step < 0, -2 * step - 1, 2 * step)
    return (zigzag - 1).clamp(max=ESCAPE)


def _ordered(bits: Tensor, like: Tensor) -> Tensor:
    """The magnitude's bits turned over where the sign is set; its own inverse."""
    return torch.where(bits < 0, bits ^ torch.iinfo(like.dtype).max, bits)


def _wrapped(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).long()


def _as_int(flat: Tensor) -> Tensor:
    return flat.view({2: torch.int16, 4: torch.int32}[flat.element_size()])


def _packed(value: Tensor, bits: int, num_bytes: int = 0) -> Tensor:
    """Values of so many bits as bytes, the lowest first; padded with zeros to ``num_bytes``."""
    each = 8 // bits
    num_bytes = num_bytes or -(-value.numel() // each)
    value = torch.nn.functional.pad(value, (0, num_bytes * each - value.numel()))
    places = 2 ** (bits * torch.arange(each))
    return (value.view(-1, each) * places).sum(dim=1).to(torch.uint8)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    shifts = bits * torch.arange(8 // bits)
    return (packed.long()[:, None] >> shifts & (1 << bits) - 1).reshape(-1)


def _padded(raw: Tensor) -> Tensor:
    return torch.nn.functional.pad(raw, (0, _padded_size(raw.numel()) - raw.numel()))


def _padded_size(num_bytes: int) -> int:
    return -(-num_bytes // ENTRY_BYTES) * ENTRY_BYTES


def _bytes(flat: Tensor) -> Tensor:
    return flat.contiguous().view(torch.uint8)


def _words(entries: list[int]) -> Tensor:
    """As 32 bits, the highest of which is no sign."""
    return torch.tensor(entries, dtype=torch.int64).to(torch.int32)
