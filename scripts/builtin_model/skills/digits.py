"""Arithmetic digit by digit, right to left, as the model writes it: every line needs only what stands above it."""

PLACES = ("ones", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands")


def compare_steps(a: int, b: int) -> str:
    """Why a is larger than, smaller than or equal to b."""
    left, right = str(a), str(b)
    if len(left) != len(right):
        relation = "larger" if a > b else "smaller"
        return f"{a} has {len(left)} and {b} has {len(right)} digits, so {a} is {relation}."
    parts = []
    for x, y in zip(left, right, strict=True):
        parts.append(f"{x}{'=' if x == y else '>' if x > y else '<'}{y}")
        if x != y:
            return f"From the left: {' '.join(parts)}, so {a} is {'larger' if x > y else 'smaller'}."
    return f"From the left: {' '.join(parts)}, so they are equal."


def add_steps(a: int, b: int) -> str:
    """Column by column with the carry as third number, e.g. `tens: 4+6+1=11`; ends with the sum."""
    size = max(len(str(a)), len(str(b)))
    left, right = str(a).zfill(size)[::-1], str(b).zfill(size)[::-1]
    lines = [f"Add from the right: {left} and {right}."]
    carry, written = 0, ""
    for place, x, y in zip(PLACES, left, right, strict=False):
        total = int(x) + int(y) + carry
        lines.append(f"{place}: {x}+{y}+{carry}={total:02}")
        carry, written = total // 10, written + str(total % 10)
    written += "1" if carry else ""
    return "\n".join([*lines, f"Digits {written}, reversed {written[::-1]}."])


def subtract_steps(a: int, b: int) -> str:
    """Column by column with the borrow as third number, e.g. `tens: 1-6-1=4 borrow 1`; a is at least b."""
    size = len(str(a))
    left, right = str(a)[::-1], str(b).zfill(size)[::-1]
    lines = [f"Subtract from the right: {left} and {right}."]
    borrow, written = 0, ""
    for place, x, y in zip(PLACES, left, right, strict=False):
        rest = int(x) - int(y) - borrow
        line = f"{place}: {x}-{y}-{borrow}={rest % 10} borrow {int(rest < 0)}"
        lines.append(line)
        borrow, written = int(rest < 0), written + str(rest % 10)
    return "\n".join([*lines, f"Digits {written}, reversed {written[::-1]}, that is {a - b}."])


def difference_steps(a: int, b: int) -> str:
    """a - b for any order: compares first, and puts a minus where b is larger."""
    if a == b:
        return f"{compare_steps(a, b)} The difference is 0."
    if a > b:
        return f"{compare_steps(a, b)}\n{subtract_steps(a, b)}"
    return f"{compare_steps(a, b)} So the result is minus ({b}-{a}).\n{subtract_steps(b, a)}\nWith minus: {a - b}."


def product_steps(a: int, b: int) -> str:
    """a (two digits at most) times b (one digit): tens and ones apart."""
    if a < 10 or a % 10 == 0 or b > 9:
        return f"From the table: {a}x{b}={a * b}."
    tens, ones = a // 10 * 10, a % 10
    return f"{a} is {tens}+{ones}. {tens}x{b}={tens * b} and {ones}x{b}={ones * b}.\n" + add_steps(tens * b, ones * b)
