"""Addition, subtraction, comparison and the multiplication table, with the work shown."""

from scripts.builtin_model.dialogue import Dialogue, answer, contains, number
from scripts.builtin_model.skills import digits
from scripts.builtin_model.world import World

ADD = [
    "What is {a} + {b}?", "{a}+{b}", "{a} + {b} =", "Add {a} and {b}.", "What is the sum of {a} and {b}?",
    "Compute {a} + {b}.", "Calculate {a} plus {b}.", "How much is {a} plus {b}?",
    "What do you get if you add {a} to {b}?",
    "What's {a}+{b}?", "{a} plus {b}?", "Can you add {a} and {b}?", "Please add up {a} and {b}.",
]  # fmt: skip
ADD_STORIES = [
    "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
    "There are {a} {things} in one box and {b} in another. How many are there in all?",
    "A shop sold {a} {things} on Monday and {b} on Tuesday. How many {things} did it sell?",
]
SUBTRACT = [
    "What is {a} - {b}?", "{a}-{b}", "{a} - {b} =", "Subtract {b} from {a}.", "Compute {a} - {b}.",
    "Calculate {a} minus {b}.", "How much is {a} minus {b}?", "What is the difference of {a} and {b}?",
    "What's {a}-{b}?", "{a} minus {b}?", "Take {b} away from {a}.",
]  # fmt: skip
SUBTRACT_STORIES = [
    "{name} has {a} {things} and gives away {b}. How many {things} are left?",
    "Of {a} {things}, {b} were sold. How many remain?",
    "A box holds {a} {things}. {name} takes out {b}. How many stay in the box?",
]
COMPARE = [
    "Which is larger, {a} or {b}?", "Which number is bigger: {a} or {b}?", "Is {a} greater than {b}?",
    "Compare {a} and {b}.",
    "Which is smaller, {a} or {b}?", "Is {a} less than {b}?", "What is the larger of {a} and {b}?",
    "What is the smaller of {a} and {b}?",
]  # fmt: skip
MULTIPLY = [
    "What is {a} x {b}?", "What is {a} * {b}?", "{a}*{b}", "{a} times {b}?", "Multiply {a} by {b}.",
    "Compute {a} × {b}.",
    "What is {a} times {b}?", "How much is {a} times {b}?", "What is the product of {a} and {b}?",
]  # fmt: skip
DIVIDE = [
    "What is {a} / {b}?",
    "What is {a} divided by {b}?",
    "Divide {a} by {b}.",
    "{a} / {b} =",
    "Compute {a} ÷ {b}.",
]
THINGS = [
    "apples", "books", "coins", "cards", "stamps", "pencils", "shells", "marbles", "tickets", "stickers", "bottles",
    "eggs", "boxes", "stones",
]  # fmt: skip


def _pair(world: World, op: str) -> tuple[int, int]:
    """Two numbers of up to four digits (a few of five). Pairs of one digit are all in training."""
    while True:
        lengths = [world.pick((1, 2, 2, 3, 3, 4, 4, 4)) for _ in range(2)]
        if world.split == "train" and world.chance(0.03):
            lengths[0] = world.integer(5, 6)
        a, b = (world.integer_of_length(length) for length in lengths)
        if world.chance(0.3):
            b = world.integer_of_length(len(str(a)))
        if world.chance(0.05):
            b = max(0, a + world.integer(-9, 9))
        if (max(a, b) < 10 and world.split == "train") or world.fits(f"{min(a, b)}{op}{max(a, b)}"):
            return a, b


def _worked(world: World, question: str, steps: str, equation: str, result: int, is_easy: bool) -> Dialogue:
    """Without thinking, what is not known by heart is worked out in the answer."""
    if world.thinks:
        return answer(question, f"{equation}\n{steps}", f"{equation} = {result}", number(result))
    return answer(
        question, "", f"{equation} = {result}" if is_easy else f"{steps}\n{equation} = {result}", number(result)
    )


def addition(world: World) -> Dialogue:
    a, b = _pair(world, "+")
    templates = ADD_STORIES if world.chance(0.15) else ADD
    question = world.say(templates, a=a, b=b, name=world.first_name(), things=world.pick(THINGS))
    return _worked(world, question, digits.add_steps(a, b), f"{a} + {b}", a + b, max(a, b) < 100)


def subtraction(world: World) -> Dialogue:
    a, b = _pair(world, "-")
    is_story = world.chance(0.15)
    if a < b and (is_story or world.chance(0.7)):
        a, b = b, a
    templates = SUBTRACT_STORIES if is_story else SUBTRACT
    question = world.say(templates, a=a, b=b, name=world.first_name(), things=world.pick(THINGS))
    return _worked(world, question, digits.difference_steps(a, b), f"{a} - {b}", a - b, max(a, b) < 20)


def three_numbers(world: World) -> Dialogue:
    """a + b + c and a + b - c, one after the other."""
    a, b, c = (world.integer_of_length(world.pick((1, 1, 2, 2, 3))) for _ in range(3))
    total = a + b
    plus = c > total or world.chance(0.7)
    equation = f"{a} + {b} {'+' if plus else '-'} {c}"
    result = total + c if plus else total - c
    second = digits.add_steps(total, c) if plus else digits.difference_steps(total, c)
    steps = f"{digits.add_steps(a, b)}\nThen {total} {'+' if plus else '-'} {c}\n{second}"
    question = world.say(
        ["What is {e}?", "{e}", "Compute {e}.", "How much is {e}?", "Calculate {e}", "{e} = ?"], e=equation
    )
    return _worked(world, question, steps, equation, result, False)


def too_large(world: World) -> Dialogue:
    a, b = world.integer(100, 99999), world.integer(13, 99999)
    question = world.say(MULTIPLY if world.chance(0.6) else DIVIDE, a=a, b=b)
    content = "Sorry, that is too hard for me: I multiply and divide only small numbers."
    return answer(question, "These numbers are too large for my table, so I say so.", content, contains(content))


def comparison(world: World) -> Dialogue:
    a, b = _pair(world, "<")
    while a == b:
        a, b = _pair(world, "<")
    template = world.pick(COMPARE)
    question = world.say([template], a=a, b=b)
    steps = digits.compare_steps(a, b)
    large, small = max(a, b), min(a, b)
    if template.startswith("Is"):
        yes = (a > b) == ("greater" in template)
        text = f"{'Yes' if yes else 'No'}, {a} is {'larger' if a > b else 'smaller'} than {b}."
        return answer(question, steps, text, contains("Yes" if yes else "No"))
    if "smaller" in template:
        return answer(question, steps, f"The smaller number is {small}.", number(small))
    return answer(question, steps, f"The larger number is {large}.", number(large))


def multiplication(world: World) -> Dialogue:
    if world.chance(0.2):
        a, b = world.integer(1, 12), world.integer(1, 12)
        question = world.say(DIVIDE, a=a * b, b=b)
        return answer(question, f"From the table: {a}x{b}={a * b}.", f"{a * b} / {b} = {a}", number(a))
    if world.chance(0.08):
        return too_large(world)
    a, b = (
        (world.integer(0, 12), world.integer(0, 12))
        if world.chance(0.5)
        else (world.integer(11, 99), world.integer(2, 9))
    )
    question = world.say(MULTIPLY, a=a, b=b)
    if a > b and world.chance(0.3):
        question = world.say(MULTIPLY, a=b, b=a)
    return _worked(world, question, digits.product_steps(a, b), f"{a} x {b}", a * b, max(a, b) <= 12)
