"""Listings of machine code: parsed from NVIDIA's and AMD's disassembly, and the paths through them."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MAX_PATHS = 10_000


@dataclass(frozen=True)
class Instruction:
    op: str
    operands: str = ""
    predicated: bool = False
    target: str | None = None  # label of a branch
    falls_through: bool = True
    exits: bool = False

    @property
    def is_load(self) -> bool:
        return re.match(r"LDG?\b|(global|buffer|flat)_load_", self.op) is not None

    @property
    def is_store(self) -> bool:
        return re.match(r"STG?\b|(global|buffer|flat)_store_", self.op) is not None

    @property
    def bytes(self) -> int:
        """What one thread moves with this load or store: LDG.E.128, STG.E.U16, buffer_load_dwordx4."""
        amd = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}
        nvidia = {".256": 32, ".128": 16, ".64": 8, "16": 2, "8": 1, "": 4}
        return next(size for name, size in (amd if "_" in self.op else nvidia).items() if name in self.op)


class Listing(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]  # index of the instruction behind each


def parse_sass(text: str) -> Listing:
    """Parse `nvdisasm -c` of one kernel."""
    listing = Listing([], {})
    for line in text.splitlines():
        if label := re.match(r"([.$]\S+):", line):
            listing.labels[label[1]] = len(listing.instructions)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            predicate, op, operands = code.groups()
            predicated = predicate is not None and predicate.strip() != "@PT"
            # BRA P1, `(.L_x_0) has a predicate of its own; BRA.DIV ~URZ, `(.L_x_0) is taken where threads diverge.
            branch = re.fullmatch(r"(!?U?P\d+, |~?UR\w+, )?`\((\S+)\)", operands) if op.startswith("BRA") else None
            if op.startswith(("BRA", "BRX", "JMP", "JMX")) and branch is None:
                raise ValueError(f"cannot tell where this goes: {line.strip()}")
            unconditional = not predicated and not (branch and branch[1])
            target = branch[2] if branch else None
            leaves = op == "EXIT" or branch is not None
            listing.instructions.append(
                Instruction(op, operands, predicated, target, not (leaves and unconditional), op == "EXIT")
            )
    return listing


def parse_amdgcn(text: str) -> Listing:
    """Parse LLVM's assembly of one kernel for AMD GPUs."""
    listing = Listing([], {})
    for line in text.partition(".Lfunc_end0:")[0].splitlines():
        if label := re.match(r"(\.L\w+):", line):
            listing.labels[label[1]] = len(listing.instructions)
        elif code := re.match(r"\s+([a-z]\w+)\s*([^;]*)", line):
            op, operands = code[1], code[2].strip()
            # exec holds the lanes that are active: in a full block there are some.
            branches = op.startswith(("s_branch", "s_cbranch")) and op != "s_cbranch_execz"
            falls_through = op not in ("s_branch", "s_cbranch_execnz", "s_endpgm")
            target = operands if branches else None
            listing.instructions.append(Instruction(op, operands, False, target, falls_through, op == "s_endpgm"))
    return listing


def paths(listing: Listing) -> Iterator[list[Instruction]]:
    """Every way from the entry to an exit.

    Raises:
        ValueError: there is a loop, or more than MAX_PATHS ways.
    """
    count = 0
    pending: list[tuple[int, list[int]]] = [(0, [])]
    while pending:
        index, path = pending.pop()
        going = True
        while going:
            if path and index <= path[-1] and index in path:
                raise ValueError(f"loop at {listing.instructions[index]}")
            path.append(index)
            instruction = listing.instructions[index]
            if instruction.exits:
                count += 1
                yield [listing.instructions[i] for i in path]
            if instruction.target is not None:
                pending.append((listing.labels[instruction.target], path.copy()))
            going = instruction.falls_through
            index += 1
        if count > MAX_PATHS:
            raise ValueError(f"more than {MAX_PATHS} paths")


def full_block_path(listing: Listing, stored_bytes: int, by_one: Sequence[int] = ()) -> list[Instruction]:
    """The instructions that a thread of a full block executes.

    Args:
        stored_bytes: what it stores of the tensors.
        by_one: bytes of what one thread of several stores on top, like scales: with a predicate, or (AMD) at an
            address that masks the others.

    Raises:
        ValueError: no path stores that without other predicates.
    """

    def accesses(path: list[Instruction]) -> list[Instruction]:
        return [i for i in path if i.is_load or i.is_store]

    def fits(path: list[Instruction]) -> bool:
        predicated = [i for i in accesses(path) if i.predicated]
        stored = sum(i.bytes for i in path if i.is_store)
        return (
            stored == stored_bytes + sum(by_one)
            and len(predicated) <= len(by_one)
            and all(i.is_store and i.bytes in by_one for i in predicated)
        )

    candidates = [path for path in paths(listing) if fits(path)]
    if not candidates:
        raise ValueError(f"no path stores {stored_bytes} bytes a thread without predicates")
    return min(candidates, key=lambda path: (len(accesses(path)), -len(path)))


def shortest_path(listing: Listing, loaded_bytes: int) -> list[Instruction]:
    """The shortest way from the entry to an exit that loads so much, all of it without predicates.

    Raises:
        ValueError: there is none.
    """
    start = (0, 0)  # index, bytes loaded before it
    came_from: dict[tuple[int, int], tuple[int, int] | None] = {start: None}
    pending = deque([start])
    while pending:
        index, loaded = state = pending.popleft()
        instruction = listing.instructions[index]
        if instruction.exits and loaded == loaded_bytes:
            path: list[Instruction] = []
            at: tuple[int, int] | None = state
            while at is not None:
                path.append(listing.instructions[at[0]])
                at = came_from[at]
            return path[::-1]
        if instruction.is_load:
            loaded += instruction.bytes
            if instruction.predicated or loaded > loaded_bytes:
                continue
        following = [index + 1] if instruction.falls_through else []
        following += [] if instruction.target is None else [listing.labels[instruction.target]]
        for next_index in following:
            if next_index < len(listing.instructions) and (next_index, loaded) not in came_from:
                came_from[next_index, loaded] = state
                pending.append((next_index, loaded))
    raise ValueError(f"no path loads {loaded_bytes} bytes a thread without predicates")


def split_accesses(path: list[Instruction]) -> tuple[list[Instruction], list[Instruction]]:
    """Accesses of a path to tensors, whose address depends on the index of the thread, and uniform loads."""
    if any(i.op == "s_endpgm" for i in path):
        return [i for i in path if i.is_load or i.is_store], []
    tensor: list[Instruction] = []
    uniform: list[Instruction] = []
    dependent: set[int] = set()  # numbers of the registers made from SR_TID
    for instruction in path:
        op = instruction.op
        written, _, read = instruction.operands.partition(",")
        depends = "SR_TID" in read or any(int(n) in dependent for n in re.findall(r"\bR(\d+)", read))
        if instruction.is_store:  # only tensors are written
            tensor.append(instruction)
            continue
        if instruction.is_load:
            (tensor if depends else uniform).append(instruction)
        if register := re.match(r"R(\d+)", written):
            count = 4 if ".128" in op else 2 if re.search(r"\.64|\.WIDE|^CS2R|^D[A-Z]", op) else 1
            registers = range(int(register[1]), int(register[1]) + count)
            # What a load brings is data, not the address of a thread.
            change = dependent.update if depends and not instruction.is_load else dependent.difference_update
            change(registers)
    return tensor, uniform
