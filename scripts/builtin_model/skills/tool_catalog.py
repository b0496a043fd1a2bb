"""Functions that a model may call: everyday ones by hand, and made-up ones of any name and schema."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scripts.builtin_model.world import World, nouns, verbs

Value = str | int | float | bool


@dataclass
class Parameter:
    name: str
    type: str
    description: str
    make: Callable[[World], Value]
    choices: tuple[str, ...] = ()
    required: bool = True


@dataclass
class Tool:
    """`phrases` hold the required parameters by position `{0}`, `{1}`; optional ones have phrases of their own."""

    name: str
    job: tuple[str, str]  # action and thing; tools of the same job do not stand together: each could answer the request
    description: str
    parameters: list[Parameter]
    phrases: list[str]
    optional: dict[str, str]
    results: list[tuple[str, Callable[[World], Any]]]
    reply: str = ""  # how to say the result, with {0} and the result's names
    is_made_up: bool = False

    def schema(self, world: World) -> dict[str, Any]:
        """The tool as clients send it, with or without the parts that they may leave out."""
        with_descriptions = world.chance(0.7)
        properties = {}
        for p in self.parameters:
            properties[p.name] = {"type": p.type}
            if p.choices:
                properties[p.name]["enum"] = list(p.choices)  # type: ignore[assignment]
            if with_descriptions:
                properties[p.name]["description"] = p.description
        function: dict[str, Any] = {"name": self.name}
        if world.chance(0.92):
            function["description"] = self.description
        required = [p.name for p in self.parameters if p.required]
        function["parameters"] = {"type": "object", "properties": properties, "required": required}
        if world.chance(0.08):
            function["parameters"]["additionalProperties"] = False
        return {"type": "function", "function": function}


def _int(low: int, high: int) -> Callable[[World], int]:
    return lambda world: world.integer(low, high)


def _one(*items: str) -> Callable[[World], str]:
    return lambda world: world.pick(items)


# first name of an everyday tool -> its job
JOBS = {
    "get_weather": ("get", "weather"), "get_time": ("get", "time"), "search_web": ("search", "web"),
    "set_timer": ("set", "timer"), "get_stock_price": ("get", "stock"), "convert_currency": ("convert", "money"),
    "translate": ("translate", "text"), "send_email": ("send", "email"), "create_event": ("create", "event"),
    "play_music": ("play", "music"), "set_light": ("set", "light"), "book_flight": ("book", "flight"),
    "track_package": ("track", "package"), "calculate": ("calculate", "expression"), "get_news": ("get", "news"),
    "add_todo": ("add", "task"), "find_restaurant": ("find", "restaurant"), "get_user": ("get", "user"),
    "set_temperature": ("set", "heating"),
}  # fmt: skip
CURRENCIES = ("USD", "EUR", "GBP", "JPY", "CHF", "NOK", "SEK", "INR", "CNY", "CAD", "AUD")
LANGUAGES = ("French", "German", "Spanish", "Italian", "Norwegian", "Japanese", "Chinese", "Hindi", "Arabic", "Russian")
SKY = _one("sunny", "cloudy", "rainy", "windy", "foggy", "clear", "stormy", "snowy")


def text(world: World) -> str:
    """A title of one to three words."""
    return " ".join(world.pick(nouns()) if world.chance(0.7) else world.new_word() for _ in range(world.integer(1, 3)))


def _p(name: str, type_: str, description: str, make: Callable[[World], Value], **more: Any) -> Parameter:
    return Parameter(name, type_, description, make, **more)


CITY_NOTES = (
    "Name of the city",
    "City name",
    "The city, e.g. San Francisco, CA",
    "The city and state, e.g. San Francisco, CA",
    "City and country",
)


def weather(world: World) -> Tool:
    unit = _p(
        "unit",
        "string",
        "Unit of temperature",
        _one("celsius", "fahrenheit"),
        choices=("celsius", "fahrenheit"),
        required=False,
    )
    city = _p(world.pick(("city", "city", "location", "place")), "string", world.pick(CITY_NOTES), World.city)
    return Tool(
        world.pick(("get_weather", "get_weather", "get_current_weather", "getWeather", "weather", "current_weather",
        "fetch_weather")),
        JOBS["get_weather"],
        world.pick(("Get the weather of a city", "Get the current weather",
        "Get the current weather in a given location", "Weather of a city",
                    "Get current temperature for a given location.")),
        [city, unit] if world.chance(0.4) else [city],
        [
            "What is the weather in {0}?", "What's the weather like in {0}?", "How is the weather in {0}?",
            "Weather in {0}?",
            "What is the weather in {0} today?", "Tell me the weather in {0}.", "Is it warm in {0}?",
            "How warm is it in {0} now?",
            "What is the current weather in {0}?", "What's the temperature in {0}?", "Will I need a coat in {0} today?",
        ],
        {"unit": "in {v}"},
        [("temperature", _int(-20, 40)), ("condition", SKY)],
        "In {0} it is {temperature} degrees and {condition}.",
    )  # fmt: skip


def _catalog(world: World) -> Tool:
    string, integer = "string", "integer"
    entries: list[tuple] = [
        (("get_time", "get_current_time", "current_time"), "Get the local time of a city", [_p("city", string,
        "Name of the city", World.city)],
         ["What time is it in {0}?", "What is the time in {0}?", "Tell me the time in {0}."], [("time", World.time)],
         "In {0} it is {time}."),
        (("search_web", "web_search", "search"), "Search the web", [_p("query", string, "What to search for", text)],
         ["Search the web for {0}.", "Look up {0} on the web.", "Find {0} online.", "Search for {0}."],
         [("title", text), ("hits", _int(1, 900))], "I found {hits} hits for {0}, the first is {title}."),
        (("set_timer", "start_timer"), "Set a timer", [_p("minutes", integer, "Length in minutes", _int(1, 90))],
         ["Set a timer for {0} minutes.", "Start a timer of {0} minutes.", "Wake me in {0} minutes."], [("status",
         _one("ok", "started"))], "The timer runs for {0} minutes."),
        (("get_stock_price", "stock_price"), "Get the price of a stock", [_p("symbol", string, "Symbol of the stock",
        lambda w: "".join(w.pick("ABCDEGHKLMNOPRSTVX") for _ in range(w.integer(3, 4))))],
         ["What is the stock price of {0}?", "How is {0} trading?", "Get the price of {0} stock."], [("price", _int(1,
         990))], "The price of {0} is {price}."),
        (("convert_currency", "currency_convert"), "Convert money", [_p("amount", "number", "Amount of money", _int(1,
        999)), _p("source", string, "Currency to convert from", _one(*CURRENCIES)), _p("target", string,
        "Currency to convert to", _one(*CURRENCIES))],
         ["Convert {0} {1} to {2}.", "How much is {0} {1} in {2}?", "Change {0} {1} into {2}."], [("amount", _int(1,
         9999))], "{0} {1} are {amount} {2}."),
        (("translate", "translate_text"), "Translate a text", [_p("text", string, "Text to translate", text),
        _p("language", string, "Language to translate to", _one(*LANGUAGES))],
         ["Translate \"{0}\" to {1}.", "How do you say \"{0}\" in {1}?", "What is \"{0}\" in {1}?"], [("translation",
         World.new_word)], "In {1} it is {translation}."),
        (("send_email", "send_mail"), "Send an email", [_p("to", string, "Address of the receiver", World.email),
        _p("subject", string, "Subject of the email", text)],
         ["Send an email to {0} about {1}.", "Write to {0} with the subject {1}.", "Email {0} about {1}."], [("status",
         _one("sent", "ok", "queued"))], "The email to {0} is {status}."),
        (("create_event", "add_event", "schedule_meeting"), "Create an event in the calendar", [_p("title", string,
        "Title of the event", text), _p("date", string, "Date of the event", World.date)],
         ["Create an event {0} on {1}.", "Put {0} into my calendar on {1}.", "Schedule {0} for {1}."], [("id", _int(1,
         9999))], "The event {0} on {1} has the number {id}."),
        (("play_music", "play_song"), "Play music", [_p("artist", string, "Name of the artist", World.full_name)],
         ["Play something by {0}.", "Play music by {0}.", "I want to hear {0}."], [("song", text)],
         "Now playing {song} by {0}."),
        (("set_light", "control_light"), "Set the light of a room", [_p("room", string, "Name of the room",
        _one("kitchen", "bedroom", "hall", "garage", "office", "bathroom", "cellar", "garden")), _p("state", string,
        "State of the light", _one("on", "off"), choices=("on", "off"))],
         ["Turn the light in the {0} {1}.", "Switch the {0} light {1}.", "Light in the {0} {1}, please."], [("status",
         _one("ok", "done"))], "The light in the {0} is {1}."),
        (("book_flight", "find_flight", "search_flights"), "Find a flight", [_p("origin", string, "City of departure",
        World.city), _p("destination", string, "City of arrival", World.city), _p("date", string, "Date of the flight",
        World.date)],
         ["Find a flight from {0} to {1} on {2}.", "I want to fly from {0} to {1} on {2}.",
         "Book a flight from {0} to {1} on {2}."], [("flight",
         lambda w: w.pick("ABKLS") + w.pick("AKFHX") + w.digits(3)), ("price", _int(40, 990))],
         "Flight {flight} from {0} to {1} costs {price}."),
        (("track_package", "package_status"), "Find where a package is", [_p("number", string, "Number of the package",
        lambda w: w.pick("ABCDEF") + w.digits(w.integer(4, 7)))],
         ["Where is my package {0}?", "Track package {0}.", "What is the status of the package {0}?"], [("place",
         World.city), ("status", _one("on the way", "delivered", "waiting"))], "Package {0} is {status} in {place}."),
        (("calculate", "calculator", "evaluate"), "Evaluate an expression", [_p("expression", string,
        "Expression to evaluate", lambda w: f"{w.integer(2, 9999)} {w.pick('+-*/')} {w.integer(2, 9999)}")],
         ["Calculate {0} with the calculator.", "Use the calculator for {0}.", "Please compute {0} with the tool."],
         [("result", _int(1, 99999))], "{0} = {result}"),
        (("get_news", "fetch_news", "news"), "Get the latest news", [_p("topic", string, "Topic of the news", text)],
         ["What is the news about {0}?", "Give me the latest news on {0}.", "News about {0}?"], [("headline", text)],
         "The latest on {0}: {headline}."),
        (("add_todo", "create_task", "add_task"), "Add a task to the list", [_p("task", string, "What is to be done",
        lambda w: f"{w.pick(verbs())} the {w.pick(nouns())}")],
         ["Add \"{0}\" to my tasks.", "Put \"{0}\" on my list.", "Remind me to {0}."], [("id", _int(1, 999))],
         "Task {id} is on the list: {0}."),
        (("find_restaurant", "search_restaurants"), "Find a restaurant", [_p("city", string, "City to look in",
        World.city), _p("cuisine", string, "Kind of food", _one("Italian", "Thai", "Indian", "Greek", "Mexican",
        "French", "vegan", "Chinese"))],
         ["Find a restaurant in {0} with {1} food.", "Where in {0} can I eat {1} food?",
         "I am in {0} and want {1} food."], [("name", World.full_name), ("rating", _int(1, 5))],
         "Try {name} in {0}, it has {rating} stars."),
        (("get_user", "find_user", "lookup_user"), "Find a user by number", [_p("user_id", integer,
        "Number of the user", _int(1, 99999))],
         ["Who is user {0}?", "Look up the user {0}.", "Get the user with the number {0}."], [("name",
         World.full_name), ("email", World.email)], "User {0} is {name}, {email}."),
        (("set_temperature", "set_thermostat"), "Set the heating", [_p("degrees", integer, "Temperature in degrees",
        _int(12, 29))],
         ["Set the heating to {0} degrees.", "Make it {0} degrees in here.", "Heat to {0} degrees."], [("status",
         _one("ok", "done", "set"))], "The heating is set to {0} degrees."),
    ]  # fmt: skip
    names, description, parameters, phrases, results, reply = world.pick(entries)
    return Tool(world.pick(names), JOBS[names[0]], description, parameters, phrases, {}, results, reply)


ACTIONS = [
    "get", "find", "create", "delete", "update", "list", "check", "send", "open", "close", "start", "stop", "read",
    "save", "count", "move", "rank", "load", "print", "book",
]  # fmt: skip
# Not the thing of a made-up tool: in `load_save` nobody knows which word is the action, and `check_flight` could be
# meant where a flight is asked for.
NO_THINGS = {*ACTIONS, *(word for _, thing in JOBS.values() for word in (thing, f"{thing}s")), "price", "temperature"}
KINDS: list[tuple[str, str, Callable[[World], Value]]] = [
    ("city", "string", World.city), ("name", "string", World.full_name), ("date", "string", World.date), ("time",
    "string", World.time),
    ("email", "string", World.email), ("count", "integer", _int(1, 99)), ("limit", "integer", _int(1, 500)), ("title",
    "string", text),
    ("id", "integer", _int(1, 99999)), ("year", "integer", _int(1950, 2040)), ("price", "number",
    lambda w: w.integer(1, 9999) / 100),
    ("urgent", "boolean", lambda w: w.chance(0.5)), ("public", "boolean", lambda w: w.chance(0.5)), ("code", "string",
    lambda w: w.pick("ABCDXYZ") + w.digits(3)),
    ("owner", "string", World.first_name), ("color", "string", _one("red", "green", "blue", "black", "white",
    "yellow")),
]  # fmt: skip


def made_up(world: World, near: Tool | None = None) -> Tool:
    """A tool whose name and parameters are common words, of this split only; `near`: shares a word of its name."""
    while True:
        action, thing = world.pick(ACTIONS) if world.chance(0.5) else world.pick(verbs()), world.pick(nouns())
        if near:
            action, thing = (near.job[0], thing) if world.chance(0.5) else (action, near.job[1])
        if thing in NO_THINGS:
            continue
        name = world.pick(
            (f"{action}_{thing}", f"{action}_{thing}", f"{action}{thing.capitalize()}", f"{thing}_{action}")
        )
        if world.fits(name):
            break
    kinds = dict.fromkeys(world.integer(0, len(KINDS) - 1) for _ in range(world.integer(1, 3)))
    parameters = []
    for i in kinds:
        key, type_, make = KINDS[i]
        if world.chance(0.35):
            key = f"{world.pick(nouns())}_{key}" if world.chance(0.5) else world.pick(nouns())
        choices: tuple[str, ...] = ()
        if type_ == "string" and world.chance(0.15):
            choices = tuple(dict.fromkeys(world.pick(nouns()) for _ in range(world.integer(2, 4))))
            make = (lambda c: lambda w: w.pick(c))(choices)
        if key not in [p.name for p in parameters]:
            parameters.append(Parameter(key, type_, f"The {key.replace('_', ' ')}", make, choices))
    if len(parameters) > 1 and world.chance(0.3):
        parameters[-1].required = False
    said = [f"{p.name.replace('_', ' ')} {{{i}}}" for i, p in enumerate(parameters) if p.required]
    if world.chance(0.5):
        world.rng.shuffle(said)
    joined = said[0] if len(said) == 1 else ", ".join(said[:-1]) + " and " + said[-1]
    phrases = [
        f"Please {action} the {thing} with {joined}.", f"{action.capitalize()} {thing}: {joined}.",
        f"{action.capitalize()} the {thing} for {joined}.",
        f"I want to {action} a {thing} with {joined}.", f"Can you {action} the {thing} with {joined}?",
    ]  # fmt: skip
    optional = {p.name: f"with {p.name.replace('_', ' ')} {{v}}" for p in parameters if not p.required}
    results = [(world.pick(nouns()), world.pick(KINDS)[2]) for _ in range(world.integer(1, 3))]
    description = world.pick(
        (f"{action.capitalize()} a {thing}", f"{action.capitalize()} the {thing}", f"Function to {action} a {thing}")
    )
    return Tool(name, (action, thing), description, parameters, phrases, optional, results, is_made_up=True)


def any_tool(world: World) -> Tool:
    kind = world.rng.random()
    if kind < 0.14:
        return weather(world)
    return _catalog(world) if kind < 0.5 else made_up(world)
