"""Units, weekdays, months and clock times."""

from scripts.builtin_model.dialogue import Dialogue, answer, contains, exact, number
from scripts.builtin_model.skills.digits import product_steps
from scripts.builtin_model.world import World

UNITS = [
    ("centimetres", "metre", 100), ("metres", "kilometre", 1000), ("millimetres", "centimetre", 10), ("millimetres",
    "metre", 1000),
    ("grams", "kilogram", 1000), ("kilograms", "tonne", 1000), ("millilitres", "litre", 1000), ("minutes", "hour", 60),
    ("seconds", "minute", 60), ("hours", "day", 24), ("days", "week", 7), ("months", "year", 12), ("cents", "dollar",
    100),
    ("years", "century", 100), ("years", "decade", 10), ("eggs", "dozen", 12), ("inches", "foot", 12), ("feet", "yard",
    3),
    ("metres", "mile", 1609), ("bytes", "kilobyte", 1000), ("bits", "byte", 8), ("weeks", "year", 52), ("days", "year",
    365),
]  # fmt: skip
PLURALS = {"foot": "feet", "century": "centuries", "dozen": "dozen"}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
]  # fmt: skip
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
SEASON_FACTS = {
    "How many days are in a leap year?": "A leap year has 366 days.",
    "How many hours are in a week?": "A week has 168 hours.",
    "How many seconds are in an hour?": "An hour has 3600 seconds.",
    "How many months are in a year?": "A year has 12 months.",
    "What is the first month of the year?": "The first month is January.",
    "What is the last month of the year?": "The last month is December.",
    "How many days are in a week?": "A week has 7 days.",
    "What are the days of the week?": f"The days are {', '.join(DAYS[:-1])} and {DAYS[-1]}.",
    "What are the months of the year?": f"The months are {', '.join(MONTHS[:-1])} and {MONTHS[-1]}.",
    "At how many degrees Celsius does water boil?": "Water boils at 100 degrees Celsius.",
    "At how many degrees Celsius does water freeze?": "Water freezes at 0 degrees Celsius.",
}


def plural(unit: str) -> str:
    return PLURALS.get(unit, unit + "s")


def units(world: World) -> Dialogue:
    small, big, factor = world.pick(UNITS)
    count = world.integer(1, 12) if factor in (10, 100, 1000) or factor < 13 else world.integer(1, 9)
    if factor > 100 and factor != 1000:
        count = 1
    result, name = count * factor, big if count == 1 else plural(big)
    question = world.say(
        [
            f"How many {small} are in {{n}} {name}?", f"How many {small} are {{n}} {name}?",
            f"Convert {{n}} {name} to {small}.",
            f"{{n}} {name} in {small}?", f"What is {{n}} {name} in {small}?",
        ],
        n=count,
    )  # fmt: skip
    if count == 1 and world.chance(0.5):
        question = world.say([f"How many {small} does a {big} have?", f"How many {small} are in a {big}?"])
    steps = f"1 {big} is {factor} {small}."
    if count > 1 and factor in (10, 100, 1000):
        steps += f" {count} with {len(str(factor)) - 1} zero{'s' if factor > 10 else ''}: {result}."
    elif count > 1:
        small_product = factor if factor > count else count
        steps += f" {factor} x {count}: " + product_steps(small_product, min(factor, count)) + f"\nThat is {result}."
    content = f"{count} {name} {'is' if count == 1 else 'are'} {result} {small}."
    return answer(question, steps, content if world.thinks else f"{steps}\n{content}", contains(f"{result} {small}"))


def weekdays(world: World) -> Dialogue:
    day = world.integer(0, 6)
    kind = world.pick(("next", "previous", "after", "before"))
    if kind in ("next", "previous"):
        word = "after" if kind == "next" else "before"
        other = DAYS[(day + (1 if kind == "next" else -1)) % 7]
        question = world.say(
            ["What day comes {w} {d}?", "Which day is {w} {d}?", "What is the day {w} {d}?"], w=word, d=DAYS[day]
        )
        return answer(
            question, f"The day {word} {DAYS[day]} is {other}.", f"{other} comes {word} {DAYS[day]}.", contains(other)
        )
    count, sign = world.integer(2, 10), 1 if kind == "after" else -1
    steps = [f"{n} {DAYS[(day + sign * n) % 7]}" for n in range(1, count + 1)]
    other = DAYS[(day + sign * count) % 7]
    templates = [
        "Today is {d}. What day is it in {n} days?",
        "Which day is {n} days after {d}?",
        "What day comes {n} days after {d}?",
    ]
    if sign < 0:
        templates = ["Today is {d}. What day was it {n} days ago?", "Which day is {n} days before {d}?"]
    work = f"I count from {DAYS[day]}: {', '.join(steps)}."
    content = f"It is {other}."
    question = world.say(templates, d=DAYS[day], n=count)
    return answer(question, work, content if world.thinks else f"{work} {content}", contains(f"It is {other}"))


def months(world: World) -> Dialogue:
    month = world.integer(0, 11)
    name = MONTHS[month]
    kind = world.pick(("days", "next", "previous", "number", "name", "facts", "leap"))
    if kind == "leap":
        year = world.integer(1890, 2110)
        is_leap = (year % 4 == 0 and year % 100 != 0) or year % 400 == 0
        last = year % 100
        if last == 0:
            work = f"{year} ends in 00. {year // 100} / 4 is {'whole' if is_leap else 'not whole'}."
        else:
            work = f"{year} ends in {last:02}. {last:02} / 4 is {'whole' if is_leap else 'not whole'}."
        content = f"{'Yes' if is_leap else 'No'}, {year} is {'' if is_leap else 'not '}a leap year."
        question = world.say(["Is {y} a leap year?", "Was {y} a leap year?", "Is the year {y} a leap year?"], y=year)
        return answer(question, work, content if world.thinks else f"{work} {content}", contains(content))
    if kind == "facts":
        question, content = world.pick(list(SEASON_FACTS.items()))
        return answer(world.say([question]), "I know this.", content, exact(content))
    if kind == "days":
        question = world.say(
            ["How many days does {m} have?", "How many days are in {m}?", "What is the number of days in {m}?"], m=name
        )
        content = f"{name} has {MONTH_DAYS[month]} days" + (", and 29 in a leap year." if month == 1 else ".")
        return answer(
            question, f"I know the lengths of the months: {name}.", content, contains(f"has {MONTH_DAYS[month]} days")
        )
    if kind == "number":
        question = world.say(["Which month of the year is {m}?", "What number is the month {m}?"], m=name)
        return answer(question, f"I count the months to {name}.", f"{name} is month {month + 1}.", number(month + 1))
    if kind == "name":
        question = world.say(
            ["What is month {n}?", "Which month has the number {n}?", "What is the name of month {n}?"], n=month + 1
        )
        return answer(question, "I count the months.", f"Month {month + 1} is {name}.", contains(name))
    word = "after" if kind == "next" else "before"
    other = MONTHS[(month + (1 if kind == "next" else -1)) % 12]
    question = world.say(["Which month comes {w} {m}?", "What month is {w} {m}?"], w=word, m=name)
    return answer(question, f"The month {word} {name} is {other}.", f"{other} comes {word} {name}.", contains(other))


def clock(world: World) -> Dialogue:
    hour, minute = world.integer(0, 23), world.pick((0, 15, 30, 45))
    hours = world.integer(1, 9)
    later = hour + hours
    work = f"{hour} + {hours} = {later}."
    if later >= 24:
        work += f" That is past midnight: {later} - 24 = {later - 24}."
    content = f"It will be {later % 24:02}:{minute:02}."
    templates = ["It is {t}. What time will it be in {n} hours?", "What time is it {n} hours after {t}?"]
    question = world.say(templates, t=f"{hour:02}:{minute:02}", n=f"{hours}")
    if hours == 1:
        question = question.replace("1 hours", "1 hour")
    return answer(question, work, content if world.thinks else f"{work} {content}", contains(content))
