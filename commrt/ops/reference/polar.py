"""Polar codes, a node of the tree at a time; :mod:`commrt.ops.polar` says what they are."""

import torch
from torch import Tensor

MOST_LLR = 2.0**20
# Of soft_margin().
RANGE = 8.5
ROOT = (0.152393, -0.0387703, 0.0064587, -0.000296612)
LANES = 32


def polar_transform_(bits: Tensor) -> None:
    """See :func:`commrt.ops.polar_transform_`."""
    bits.copy_(transformed(bits))


def polar_decode(
    llr: Tensor, known: Tensor, values: Tensor, bits: Tensor, scratch: Tensor, paths: int
) -> None:
    """See :func:`commrt.ops.polar_decode`; scratch is for those that need it."""
    clean_BN = llr.nan_to_num(0.0).clamp(-MOST_LLR, MOST_LLR)
    known_BN = (known != 0).expand(llr.shape)
    for row in range(llr.shape[0]):
        decoder = _Decoder(known_BN[row], values[row] & 1, paths)
        bit_PN, _ = decoder.node(clean_BN[row][None], 0)
        bits[row] = bit_PN[decoder.cost_P.argmin()]


def coset_llr(position: Tensor, known: Tensor, plane: int, table: Tensor, llr: Tensor) -> None:
    """See :func:`commrt.ops.coset_llr`."""
    places = (position - known.float()) * 2.0**-plane
    within = places - 2 * (places * 0.5).floor()
    is_finite = within == within
    index = (within * (table.numel() // 2)).clamp(max=table.numel() - 1)
    found = table[index.where(is_finite, 0.0).long()]
    llr.copy_(found.where(is_finite, 0.0))


def coset_decode(position: Tensor, residues: Tensor, modulus: int, codes: Tensor) -> None:
    """See :func:`commrt.ops.coset_decode`."""
    residue = residues.float()
    inverse = torch.tensor(1.0) / modulus
    cosets = ((position - residue) * inverse.item()).round()
    nearest = (residue + modulus * cosets).clamp(-(2.0**15), 2.0**15 - 1)
    codes.copy_(nearest.nan_to_num(0.0))


def transformed(bits: Tensor) -> Tensor:
    """The last dimension times G: the sums of halves, of halves of these, and so on."""
    half = bits.shape[-1] // 2
    if half == 0:
        return bits & 1
    left, right = transformed(bits[..., :half]), transformed(bits[..., half:])
    return torch.cat((left ^ right, right), dim=-1)


class _Decoder:
    """One block. Paths are a dimension; ``cost_P`` is -log P of what each has decided, in nats."""

    def __init__(self, known_N: Tensor, value_N: Tensor, most_paths: int) -> None:
        self.known_N, self.value_N, self.most_paths = known_N, value_N, most_paths
        self.cost_P = torch.zeros(1)

    def node(self, llr_PK: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Bits (Q, K) of the node of K bits that begins at ``first``; and which path each is of."""
        size = llr_PK.shape[1]
        known_K = self.known_N[first : first + size]
        if known_K.all():
            return self._take(llr_PK, first)
        if not known_K.any():
            return self._decide(llr_PK)
        half = size // 2
        a_PH, b_PH = llr_PK[:, :half], llr_PK[:, half:]
        left_QH, of_left_Q = self.node(boxplus(a_PH, b_PH), first)
        a_QH, b_QH = a_PH[of_left_Q], b_PH[of_left_Q]
        both_QH = torch.where(left_QH == 1, b_QH - a_QH, b_QH + a_QH)
        right_RH, of_right_R = self.node(both_QH, first + half)
        bit_RK = torch.cat((left_QH[of_right_R] ^ right_RH, right_RH), dim=1)
        return bit_RK, of_left_Q[of_right_R]

    def _take(self, llr_PK: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """All u are known."""
        paths, size = llr_PK.shape
        bit_PK = transformed(self.value_N[first : first + size]).expand(paths, size)
        self.cost_P = self.cost_P + sums(bit_cost(llr_PK, bit_PK))
        return bit_PK, torch.arange(paths)

    def _decide(self, llr_PK: Tensor) -> tuple[Tensor, Tensor]:
        """None is known: as the LLRs say, but for the two weakest, which may be turned over."""
        hard_PK = (llr_PK < 0).to(torch.uint8)
        if self.most_paths == 1:
            return hard_PK, torch.arange(1)
        size_PK = llr_PK.abs()
        base_P = self.cost_P + sums(soft_margin(size_PK))
        weakest_PW = size_PK.sort(dim=1, stable=True).indices[:, :2]
        weak_PW = size_PK.gather(1, weakest_PW)
        choices = [base_P, base_P + weak_PW[:, 0]]
        if weak_PW.shape[1] == 2:
            choices += [base_P + weak_PW[:, 1], choices[1] + weak_PW[:, 1]]
        cost_PC = torch.stack(choices, dim=1)
        order = cost_PC.flatten().sort(stable=True).indices[: self.most_paths]
        self.cost_P = cost_PC.flatten()[order]
        self.cost_P = self.cost_P - self.cost_P[0]
        of_Q, choice_Q = order // len(choices), order % len(choices)
        bit_QK = hard_PK[of_Q]
        for weak in range(weak_PW.shape[1]):
            turned_Q1 = (choice_Q[:, None] >> weak & 1).to(torch.uint8)
            at_Q1 = weakest_PW[of_Q, weak, None]
            bit_QK.scatter_(1, at_Q1, bit_QK.gather(1, at_Q1) ^ turned_Q1)
        return bit_QK, of_Q


def boxplus(a: Tensor, b: Tensor) -> Tensor:
    """The LLR of the sum of two bits."""
    size_a, size_b = a.abs(), b.abs()
    least, most = torch.minimum(size_a, size_b), torch.maximum(size_a, size_b)
    size = (least + (soft_margin(most + least) - soft_margin(most - least))).clamp(min=0.0)
    return torch.where(a.signbit() != b.signbit(), -size, size)


def soft_margin(distance: Tensor) -> Tensor:
    """log(1 + exp(-t)) for t >= 0, to 5e-4; 0 from 8.5 on.

    The fourth power of a polynomial, fitted by minimax under a slope of at most 1/2.
    """
    s = (RANGE - distance).clamp(min=0.0)
    root = s * (ROOT[0] + s * (ROOT[1] + s * (ROOT[2] + s * ROOT[3])))
    square = root * root
    return square * square


def bit_cost(llr: Tensor, bit: Tensor) -> Tensor:
    """-log P(bit), in nats."""
    against = torch.where(bit == 1, llr, -llr)
    return against.clamp(min=0.0) + soft_margin(llr.abs())


def sums(value_PK: Tensor) -> Tensor:
    """Over K: every 32nd, one after the other, then these sums pairwise: i with i + 16, + 8, ..."""
    lane_PL = value_PK[:, :LANES]
    for first in range(LANES, value_PK.shape[1], LANES):
        lane_PL = lane_PL + value_PK[:, first : first + LANES]
    while (half := lane_PL.shape[1] // 2) > 0:
        lane_PL = lane_PL[:, :half] + lane_PL[:, half:]
    return lane_PL[:, 0]
