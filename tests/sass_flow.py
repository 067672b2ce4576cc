"""What becomes of a wgmma's registers, in the SASS: what an assembler that lost track of them would show.

ptxas before CUDA 13.3 may take the registers of a left operand for free behind the product that reads them, though the
loop's next turn reads them again. Fragments come by one kind of instruction, LDSM or F2FP; where two kinds reach one
product, the second has overwritten the first. And nothing may touch the registers of a product that is still under way.
"""

import re

Line = tuple[int, str, str, bool]  # address, opcode, operands, whether a predicate decides

# What writes no register that its first operand names.
_NO_RESULT = ("ST", "BRA", "SYNCS", "RED", "BAR", "EXIT", "BSSY", "BSYNC", "WARP", "UTMA", "NOP", "DEPBAR", "MEMBAR")
_NO_RESULT += ("FENCE", "CCTL", "ERRBAR", "CALL", "RET")


def mixed_operands(body: list[Line]) -> list[str]:
    """Of one kernel, each wgmma whose left operand comes from instructions of more than one kind."""
    left = {at: set(range(a, a + 4)) for at, line in enumerate(body) if (a := _left(line)) is not None}
    watched = set().union(*left.values())
    results = [_results(line) & watched for line in body]
    after = _followers(body)
    # Of each instruction and register: by what kinds of instruction it may have been written.
    reach: list[dict[int, frozenset[str]] | None] = [None] * len(body)
    reach[0], todo, none = {}, [0], frozenset()
    while todo:
        at = todo.pop()
        _, opcode, _, maybe = body[at]
        now = dict(reach[at])
        for register in results[at]:
            kind = frozenset({opcode.split(".")[0]})
            now[register] = kind | now.get(register, none) if maybe else kind
        for then in after[at]:
            known = reach[then]
            merged = now if known is None else {r: known.get(r, none) | now.get(r, none) for r in known | now}
            if merged != known:
                reach[then] = merged
                todo.append(then)
    found = []
    for at, registers in left.items():
        kinds = frozenset().union(*((reach[at] or {}).get(r, none) for r in registers))
        if len(kinds) > 1:
            found.append(f"the wgmma at {body[at][0]:#x} reads what {' and '.join(sorted(kinds))} wrote")
    return found


Group = tuple[frozenset[int], frozenset[int]]  # the registers of left operands, and of sums
MOST = 8  # that a wait can tell apart
_NONE: Group = (frozenset(), frozenset())


def touched_in_flight(body: list[Line]) -> list[str]:
    """Of one kernel, each instruction that touches sums of a wgmma in flight, or writes its left operand.

    A group of them ends with the one that is marked gsb0; WARPGROUP.DEPBAR waits until so many groups are unfinished.
    """
    after, found = _followers(body), {}
    seen: set[tuple[int, tuple[Group, ...], Group]] = set()
    todo: list[tuple[int, tuple[Group, ...], Group]] = [(0, (), _NONE)]
    while todo:
        state = todo.pop()
        if state in seen:
            continue
        seen.add(state)
        at, groups, last = state
        address, opcode, operands, _ = body[at]
        lefts, sums = (frozenset().union(*(group[kind] for group in (*groups, last))) for kind in (0, 1))
        own = frozenset(_results(body[at]))
        if opcode.startswith("HGMMA"):
            first = _left(body[at])
            left = frozenset() if first is None else frozenset(range(first, first + 4))
            # Sums that go on in the same registers are taken up in order.
            touched = left & sums | own & lefts
            touched |= frozenset().union(*(of & own for _, of in (*groups, last) if of != own))
            last = last[0] | left, last[1] | own
            if "gsb0" in operands:  # of equal ones in a row one says as much as all of them, on a way that never waits
                groups, last = groups if groups[-1:] == (last,) else (*groups, last), _NONE
                if len(groups) > MOST:  # the two oldest become one, which no wait tells apart
                    (a, b), *rest = zip(groups[0], groups[1], strict=True), *groups[2:]
                    groups = ((a[0] | a[1], b[0] | b[1]), *rest)
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            left_over = int(re.search(r"0x([0-9a-f]+)", operands)[1], 16)
            groups, touched = groups[len(groups) - left_over :] if left_over else (), frozenset()
        else:
            touched = own & (lefts | sums) | _reads(body[at]) & sums
        if touched:
            found[address] = f"{opcode} at {address:#x} touches R{min(touched)} of a wgmma in flight"
        todo += [(then, groups, last) for then in after[at]]
    return [found[address] for address in sorted(found)]


def _followers(body: list[Line]) -> list[list[int]]:
    """Of each instruction those that may come next."""
    place = {address: at for at, (address, *_) in enumerate(body)}
    after = []
    for at, (_, opcode, operands, maybe) in enumerate(body):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
        maybe = maybe or opcode.startswith("BRA.DIV")  # taken where lanes have parted
        jumps = [place[int(target[1], 16)]] if target and int(target[1], 16) in place else []
        ends = opcode.startswith(("EXIT", "RET")) or (jumps and not re.search(r"\bU?P\d", operands))
        after.append(jumps + ([at + 1] if at + 1 < len(body) and (maybe or not ends) else []))
    return after


def _left(line: Line) -> int | None:
    """The first of the four registers of a wgmma's left operand, where it is in registers."""
    _, opcode, operands, _ = line
    match = re.match(r"\s*R\d+, R(\d+),", operands) if opcode.startswith("HGMMA") else None
    return int(match[1]) if match else None


def _results(line: Line) -> set[int]:
    """The registers that an instruction writes."""
    _, opcode, operands, _ = line
    if opcode.startswith(_NO_RESULT):
        return set()
    match = re.match(r"\s*(?:U?P[T\d]\w*, )?R(\d+)\b", operands)
    return set(range(int(match[1]), int(match[1]) + _width(opcode))) if match else set()


def _reads(line: Line) -> frozenset[int]:
    """The registers that an instruction reads."""
    _, opcode, operands, _ = line
    named = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
    if _results(line):
        named = named[1:]
    elif named and opcode.startswith(("ST", "RED")):
        wide = 4 if ".128" in opcode else 2 if ".64" in opcode else 1
        named += range(named[-1], named[-1] + wide)
    return frozenset(named)


def _width(opcode: str) -> int:
    """How many registers a result has."""
    if opcode.startswith("HGMMA"):
        return int(re.search(r"64x(\d+)x", opcode)[1]) // 2
    if opcode.startswith("LDSM"):
        return int(opcode[-1]) if opcode[-1].isdigit() else 1
    if opcode.startswith("LD"):
        return 4 if ".128" in opcode else 2 if ".64" in opcode else 1
    pair = ".WIDE" in opcode or ".64" in opcode or (opcode.startswith("CS2R") and ".32" not in opcode)
    return 2 if pair else 1
