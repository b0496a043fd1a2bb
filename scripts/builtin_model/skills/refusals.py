"""Questions that the model cannot answer, and its honest words about that."""

from scripts.builtin_model.dialogue import Dialogue, answer, contains
from scripts.builtin_model.world import World, countries, nouns, verbs

UNKNOWN = "Sorry, I do not know that. I am a very small model and know only simple things."
UNABLE = "Sorry, I cannot do that. I am a very small model and can do only simple things."
LIVE = "Sorry, I cannot know that: I have no clock, no internet and no news."
PRIVATE = "Sorry, I do not know anything about you or other people beyond what you tell me."
FUTURE = "Sorry, I cannot know the future."

QUESTIONS: list[tuple[str, tuple[str, ...]]] = [
    (UNKNOWN, (
        "Who invented the {n}?", "Who discovered the {n}?", "Who wrote the book {N}?", "Who painted {N}?",
        "Who sang {N}?", "Why is the {n} {a}?",
        "How does a {n} work?", "How do I {v} a {n}?", "What is the history of the {n}?", "When was the {n} invented?",
        "Who is {p}?", "Who was {p}?",
        "When was {p} born?", "What did {p} write?", "Who won the game between {c} and {d}?",
        "What is the best {n} in {c}?", "Who is the king of {c}?",
        "Who is the president of {c}?", "How many people live in {c}?", "How high is the highest mountain in {c}?",
        "What is the population of {c}?",
        "What happened in {y}?", "What happened in {c} in {y}?", "Explain the theory of {n}.",
        "What is the formula of {n}?", "Why do people {v}?",
        "What is the difference between a {n} and a {m}?", "How far is {c} from {d}?", "How old is {p}?",
        "What is the meaning of life?", "Why is the sky blue?",
        "How tall is {p}?", "What is quantum physics?", "What is the speed of light?", "How do planes fly?",
        "Who was the first man on the moon?",
        "What is the square root of {x}?", "Can you explain {n} and {m}?", "Which {n} is better than a {m}?",
        "What causes {n}?", "Is a {n} heavier than a {m}?",
        "What do you think about {n}?", "Which {n} do you like?", "Where can I buy a {n}?", "What should I eat today?",
        "Who wrote Hamlet?", "Tell me about {p}.",
        "Tell me about the {n} of {c}.", "What is the tallest building in {c}?", "What does {w} mean?", "Define {w}.",
        "What is a {w}?", "What is the capital of {W}?",
        "Which currency is used in {W}?", "Where is {W}?", "What are the health effects of {n}?",
        "What is machine learning?", "How does the internet work?",
    )),
    (UNABLE, (
        "Write a poem about the {n}.", "Write a story about a {n}.", "Write an essay about {n}.", "Tell me a story.",
        "Tell me a joke.", "Tell me a joke about a {n}.",
        "Write a Python function to {v} a {n}.", "Write code that can {v}.", "Translate \"{n}\" to French.",
        "Translate this to German: the {n} is {a}.",
        "Draw a {n}.", "Summarize the book {N}.", "Write a letter to {p}.", "Sing a song about {n}.",
        "Write an email to {p} about the {n}.",
        "Make a plan for my {n}.", "Give me a recipe for {n}.", "Fix this code: print({n}", "Prove that {n} is {a}.",
        "Write a haiku about {n}.", "Play chess with me.",
        "Write a speech about {n} and {m}.", "Create a website about {n}.", "Explain {n} like I am five.",
        "Write a short introduction to {n}.",
        "Give me a short introduction to {n}.", "Write SQL to {v} all {n}s.", "Solve x^2 + {x} = {y}.",
        "How do you say {n} in Spanish?", "Say {n} in Japanese.",
        "Give me ideas for a {n}.", "Help me with my {n}.", "Write ten sentences about {c}.",
        "Give me advice about {n}.",
    )),
    (LIVE, (
        "What time is it?", "What is the time?", "What day is it today?", "What is today's date?",
        "What is the weather today?", "What is the weather in {c}?",
        "Will it rain today?", "What is in the news?", "What are the latest news about {c}?",
        "What is the price of {n} today?", "What is the stock price of {N}?",
        "How is the weather?", "Which year is it?", "Search the web for {n}.", "Open the website {n}.com.",
        "Who won the election in {c}?", "What's the temperature outside?",
        "What happened today?", "What is the exchange rate of the dollar?", "What's the weather like in {c}?",
    )),
    (PRIVATE, (
        "Where do I live?", "How old am I?", "What is my phone number?", "What is my favourite {n}?", "Who am I?",
        "What did I eat yesterday?", "Where is my {n}?",
        "What is the phone number of {p}?", "What is the password of {p}?", "When is my birthday?", "What is my name?",
        "Where does {p} live?", "What do I do for work?",
        "What is the email of {p}?", "Do you know my name?", "Do you know {p}?", "Who is my best friend?",
    )),
    (FUTURE, (
        "Who will win the next election in {c}?", "Will {c} win against {d}?", "What will happen tomorrow?",
        "Will I be rich?", "Will it rain in {y}?",
        "What will happen in 2050?", "Will the price of {n} rise?", "When will I find a {n}?", "Tell me my future.",
        "What are the next lottery numbers?",
    )),
]  # fmt: skip
REASONS = {
    UNKNOWN: "I have not learned this, so I say that I do not know it.",
    UNABLE: "This is too hard for me, so I say that I cannot do it.",
    LIVE: "This needs a clock or the internet, which I do not have.",
    PRIVATE: "The user has not told me this, so I cannot know it.",
    FUTURE: "Nobody knows the future.",
}
ADJECTIVES = [
    "red", "old", "big", "small", "green", "cold", "hot", "new", "bright", "dark", "loud", "quiet", "strong", "weak",
    "round",
]  # fmt: skip


def refusal(world: World) -> Dialogue:
    content, templates = world.pick((*QUESTIONS, *QUESTIONS[:2]))
    c, d = world.some(countries(), 2)
    question = world.say(
        [world.pick(templates)],
        n=world.pick(nouns()), m=world.pick(nouns()), N=f"{world.pick(nouns()).title()} {world.pick(nouns()).title()}",
        v=world.pick(verbs()),
        a=world.pick(ADJECTIVES), p=world.full_name(), c=c["name"], d=d["name"], y=world.integer(1000, 2100),
        x=world.integer(2, 999),
        w=world.new_word(), W=world.new_word().capitalize(),
    )  # fmt: skip
    return answer(question, REASONS[content], content, contains(content))
