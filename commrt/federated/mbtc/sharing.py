"""Joint decoding by peers: each has some of the blocks, and decides these of all updates.

Blocks do not depend on each other, only the clients of a block do. So the blocks of all groups, one
after the other, are divided evenly. What a peer needs of an update comes from the client's home,
and what it could decide, or lacks, goes back there.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from commrt.federated.layout import Group, Layout
from commrt.federated.mbtc.joint import JointGroup, Piece, piece_of
from commrt.federated.mbtc.parameters import Plane
from commrt.federated.mbtc.plan import NO_PLAN, Plan
from commrt.federated.mbtc.planes import Blocks
from commrt.federated.mbtc.requests import Wanted
from commrt.federated.peers import Peers
from commrt.federated.wire import Reader

if TYPE_CHECKING:
    from commrt.federated.mbtc.received import Received

# Columns of what is counted: blocks that failed when they were first tried, bits of planes that
# clients were asked for, and blocks that they were asked for as they are.
FAILED, BITS, WHOLE = range(3)
_ORDER = -1  # beside the numbers of groups


def agreed(
    peers: Peers, plan: Plan | None, planes: Sequence[tuple[tuple[Plane, ...], ...]]
) -> Plan:
    """The plan that the first peer has, at all of them; they know the planes."""
    if not any(map(any, planes)):
        return NO_PLAN
    frames = None
    if plan is not None:
        frames = {group: each.tobytes() for group, each in plan.covariances.items()}
        frames[_ORDER] = np.array(plan.order, dtype=np.int64).tobytes()
    frames = peers.broadcast(frames)
    order = np.frombuffer(frames.pop(_ORDER), dtype=np.int64).tolist()
    shape = len(order), len(order)
    covariances = {g: np.frombuffer(each).reshape(shape) for g, each in frames.items()}
    return Plan(order, planes, covariances)


def divided(counts: Mapping[int, int], size: int) -> list[dict[int, range]]:
    """The blocks of each group, of which there are so many, that each of ``size`` peers has."""
    total, parts = sum(counts.values()), list[dict[int, range]]()
    for rank in range(size):
        begin, end = total * rank // size, total * (rank + 1) // size
        part = dict[int, range]()
        for group, count in counts.items():
            part[group] = range(max(0, min(begin, count)), max(0, min(end, count)))
            begin, end = begin - count, end - count
        parts.append({group: which for group, which in part.items() if which})
    return parts


class JointDecoding:
    """A round's joint decoding.

    Peers: all call :meth:`decode`, :meth:`all_frames` and :meth:`close` together, and the rest each
    one for the clients that it is home to.

    Args:
        layout: Of the updates.
        block: Elements in a block.
        peers: Which.
        plan: What is decoded, the same for all.

    Attributes:
        plan: That.
        counts: int64 (groups, 3), see ``FAILED``; this peer's until :meth:`close`.

    Cost: of K updates with N weights in blocks, each of P peers has 4 K N / P bytes of residuals,
    and of the updates that it is not home to 6 bytes a weight of its blocks. To it come, once, 4
    bytes of each of these weights and their cosets, and 2 go back of each that was not coded alone:
    in all ``(P - 1) / P`` of 6 K N bytes. On their way, either end has up to two copies of them.
    """

    def __init__(self, layout: Layout, block: int, peers: Peers, plan: Plan) -> None:
        self._layout, self._block, self._peers, self.plan = layout, block, peers, plan
        counts = {group: layout.groups[group].numel // block for group in plan.covariances}
        self._parts = divided(counts, peers.size)
        self._own = {
            group: JointGroup(
                self._elements(group, which), block, plan.covariances[group], plan.order
            )
            for group, which in self._parts[peers.rank].items()
        }
        self.counts = torch.zeros(len(layout.groups), 3, dtype=torch.int64)
        self._begun = set[int]()
        self._homes: dict[int, int] = {}
        self._pieces: list[list[bytes | memoryview]] = [[] for _ in self._parts]
        self._answers: list[list[bytes]] = [[] for _ in self._parts]
        self._lacking: dict[int, list[Wanted]] = {}

    @property
    def is_running(self) -> bool:
        """Whether any group of this round is decoded jointly."""
        return bool(self.plan.covariances)

    def decode(self, received: "Mapping[int, Received]") -> None:
        """Decide what can be of the updates that came, by place in the cohort."""
        if not self.is_running:
            return
        for place in [place for place in received if place not in self._begun]:
            self._hand_out(place, received[place])
        self._exchange()
        self._lacking = {}
        found: list[list[bytes]] = [[] for _ in self._parts]
        for group, joint in self._own.items():
            for place, decided in joint.decode().items():
                blocks, first = _cosets(joint.pieces[place]), self._first(group)
                lacking = [
                    Wanted(group, first + each, *blocks.lacking(each))
                    for each in (~blocks.is_whole).nonzero()[:, 0].tolist()
                ]
                home = self._homes.get(place, self._peers.rank)
                if home == self._peers.rank:
                    self._lacking.setdefault(place, []).extend(lacking)
                else:
                    which = [first + each for each in decided]
                    codes = blocks.codes[decided]
                    found[home].append(_packed(place, group, which, codes, lacking))
        for part in self._peers.all_to_all([b"".join(each) for each in found]):
            self._take_found(Reader(part), received)

    def wanted(self, place: int) -> list[Wanted]:
        """What to ask a client for."""
        return sorted(self._lacking.get(place, ()))

    def all_frames(self, own: dict[int, bytes]) -> dict[int, bytes]:
        """What all peers have for clients."""
        if not self.is_running:
            return own
        parts = (struct.pack("<qq", client, len(each)) + each for client, each in own.items())
        frames = dict[int, bytes]()
        for reader in map(Reader, self._peers.all_gather(b"".join(parts))):
            while reader.left:
                client, size = map(int, reader.unpack("qq"))
                frames[client] = reader.take(size)
        return frames

    def take(self, place: int, wanted: Wanted, answer: bytes | Tensor, blocks: Blocks) -> None:
        """Take what a client answered: u of a plane, or the codes of one of its ``blocks``."""
        sent = b""
        if isinstance(answer, bytes):
            sent = answer
            self.counts[wanted.group, BITS] += 8 * len(sent)
        else:
            blocks.replace(wanted.block, answer)
            self.counts[wanted.group, WHOLE] += 1
        [owner] = [
            rank
            for rank, parts in enumerate(self._parts)
            if wanted.block in parts.get(wanted.group, ())
        ]
        if owner == self._peers.rank:
            self._take_answer(place, wanted, sent)
        else:
            self._answers[owner].append(struct.pack("<6q", place, *wanted) + sent)

    def close(self, received: "Mapping[int, Received]") -> dict[int, list[slice]]:
        """Add up what all peers counted, since no block will be decided any more.

        Returns:
            The parts of the flat vector that are not decoded of all peers' updates, by place.
        """
        for group, joint in self._own.items():
            self.counts[group, FAILED] = joint.failed
        self._peers.sum_(self.counts)
        own = [
            (place, part.start, part.stop)
            for place, update in received.items()
            for part in update.missing(self._layout)
        ]
        missing = dict[int, list[slice]]()
        for gathered in self._peers.all_gather(np.array(own, dtype=np.int64).tobytes()):
            for place, *ends in np.frombuffer(gathered, dtype=np.int64).reshape(-1, 3).tolist():
                missing.setdefault(place, []).append(slice(*ends))
        return missing

    # -- between peers ----------------------------------------------------------------------------

    def _hand_out(self, place: int, update: "Received") -> None:
        """Bring what an update is decoded with to who decodes it."""
        self._begun.add(place)
        for rank, parts in enumerate(self._parts):
            for group, which in parts.items():
                piece = piece_of(update, group, self._elements(group, which), which)
                if rank == self._peers.rank:
                    self._own[group].pieces[place] = piece
                    continue
                head = struct.pack("<qqddQ", place, group, piece.step, piece.noise, piece.seed)
                section = b"" if piece.blocks is None else piece.blocks.section()
                self._pieces[rank] += (head, piece.flat.numpy().data, section)

    def _exchange(self) -> None:
        """Send what others are to decode and what was answered, and take what they send."""
        outgoing = []
        for pieces, answers in zip(self._pieces, self._answers, strict=True):
            outgoing.append(b"".join((struct.pack("<q", len(pieces) // 3), *pieces, *answers)))
            pieces.clear()
            answers.clear()
        for rank, part in enumerate(self._peers.all_to_all(outgoing)):
            reader = Reader(part)
            for _ in range(int(reader.unpack("q")[0])):
                self._take_piece(reader, rank)
            while reader.left:
                place, *wanted = map(int, reader.unpack("6q"))
                asked = Wanted(*wanted)
                self._take_answer(place, asked, reader.take(asked.num_bits // 8))

    def _take_piece(self, reader: Reader, home: int) -> None:
        place, group = map(int, reader.unpack("qq"))
        step, noise, seed = reader.unpack("ddQ")
        size = self._block * len(self._parts[self._peers.rank][group])
        flat = torch.frombuffer(bytearray(reader.take(4 * size)), dtype=torch.float32)
        planes, blocks = self.plan.planes[place][group], None
        if planes:
            blocks = Blocks(reader, size, planes, self._block)
        self._homes[place] = home
        self._own[group].pieces[place] = Piece(step, noise, int(seed), flat, blocks)

    def _take_answer(self, place: int, wanted: Wanted, sent: bytes) -> None:
        """More of a plane; or a block of which the client's home has the codes."""
        blocks = _cosets(self._own[wanted.group].pieces[place])
        which = wanted.block - self._first(wanted.group)
        if sent:
            blocks.add(which, wanted.plane, sent)
        else:
            blocks.is_whole[which] = True

    def _take_found(self, reader: Reader, received: "Mapping[int, Received]") -> None:
        """What another decided of updates that are at home here, and what it lacks."""
        while reader.left:
            place, group, num_decided, num_lacking = map(int, reader.unpack("4q"))
            blocks = received[place].blocks[group]
            decided = map(int, reader.unpack(f"{num_decided}q"))
            for each in decided:
                codes = bytearray(reader.take(2 * self._block))
                blocks.replace(each, torch.frombuffer(codes, dtype=torch.int16))
            lacking = np.frombuffer(reader.take(8 * 5 * num_lacking), dtype=np.int64)
            for row in lacking.reshape(-1, 5).tolist():
                self._lacking.setdefault(place, []).append(Wanted(*row))

    # -- parts ------------------------------------------------------------------------------------

    def _first(self, group: int) -> int:
        """The first of this peer's blocks of a group."""
        return self._parts[self._peers.rank][group].start

    def _elements(self, group: int, which: range) -> Group:
        begin = self._layout.groups[group].begin
        return Group(begin + which.start * self._block, begin + which.stop * self._block)


def _cosets(piece: Piece) -> Blocks:
    assert piece.blocks is not None
    return piece.blocks


def _packed(
    place: int, group: int, decided: Sequence[int], codes: Tensor, lacking: Sequence[Wanted]
) -> bytes:
    """Of blocks of an update, the codes of those that were decided, and what the others lack."""
    head = struct.pack(f"<{4 + len(decided)}q", place, group, len(decided), len(lacking), *decided)
    return head + codes.numpy().tobytes() + np.array(lacking, dtype=np.int64).tobytes()
