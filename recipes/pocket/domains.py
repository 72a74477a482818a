"""The tools pocket learns: names, parameters, requests, results and answers, by domain.

A tool is data. A request is a template over its parameters; what stands in the request is copied
into the call exactly as written, so every call can be derived from the text alone. Tools of one
`group` could answer each other's requests and are never used as each other's "no tool fits".

Kinds of parameter (see `tasks.value_of`): names of Draw methods (city, name, date, ...),
"one:a|b" (enum), "bool:x|y" (said x for true, y for false), "list:KIND", "object" and "objects"
(with `fields`), "of:POOL" (a closed class of words.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from recipes.pocket.words import Draw

Args = dict[str, Any]


@dataclass(frozen=True)
class Param:
    name: str
    kind: str
    text: str
    opt: str | None = None
    """How an optional parameter is mentioned, with {} for its value; None if required."""
    fields: tuple["Param", ...] = ()
    say: str = ""
    """How an object is written, over the names of its fields."""


@dataclass(frozen=True)
class Tool:
    name: str
    group: str
    texts: tuple[str, ...]
    params: tuple[Param, ...]
    requests: tuple[str, ...]
    result: Callable[[Draw, Args], dict[str, Any]]
    answer: str
    many: str = ""
    """A request for several values of the only parameter at once, with {} for their list."""


P = Param
TOOLS: list[Tool] = []
HELDOUT_TOOLS: list[Tool] = []


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


def _tool(
    name: str,
    texts: str,
    params: tuple[Param, ...],
    requests: str,
    result: Callable[[Draw, Args], dict[str, Any]],
    answer: str,
    *,
    group: str = "",
    many: str = "",
    into: list[Tool] = TOOLS,
) -> None:
    into.append(
        Tool(name, group or name, _split(texts), params, _split(requests), result, answer, many)
    )


def _done(word: str = "done") -> Callable[[Draw, Args], dict[str, Any]]:
    return lambda d, a: {"status": word}


def _events(d: Draw, a: Args) -> dict[str, Any]:
    events = [f"{d.event()} at {d.time()}" for _ in range(d.between(_fewest(d), 3))]
    return {"count": len(events), "events": events}


def _files(d: Draw, a: Args) -> dict[str, Any]:
    count = d.between(_fewest(d), 4)
    return {"count": count, "files": [d.file() for _ in range(count)]}


def _fewest(d: Draw) -> int:
    """Days and folders may be empty; held out none is, as in the sets that were measured first."""
    return 0 if d.split == "train" else 1


# --- calendar and clock -------------------------------------------------------------------------
_tool(
    "add_event",
    "Add an event to the calendar|Create a calendar event|Put a new event in the calendar",
    (
        P("title", "event", "Title of the event"),
        P("date", "date", "Date of the event"),
        P("time", "time", "Start time"),
    ),
    "Add {title} to my calendar on {date} at {time}.|Schedule {title} for {date} at {time}.|"
    "Put {title} in the calendar for {date} at {time}.|"
    "Create an event called {title} on {date} at {time}.|"
    "I have {title} on {date} at {time}, put it in my calendar.",
    _done("added"),
    "Added {title} on {date} at {time}.",
    group="calendar_add",
)
_tool(
    "list_events",
    "List the events of a day|Show the calendar of one day|Get calendar events by date",
    (P("date", "date", "Date to look at"),),
    "What is on my calendar on {date}?|List my events for {date}.|Show my calendar for {date}.|"
    "Which events do I have on {date}?|Do I have anything planned on {date}?",
    _events,
    "Events on {date} ({count}): {events}.",
    many="What is on my calendar on {}?",
)
_tool(
    "delete_event",
    "Delete an event from the calendar|Remove a calendar event|Cancel an event",
    (P("title", "event", "Title of the event"), P("date", "date", "Date of the event")),
    "Delete {title} on {date}.|Remove {title} from my calendar on {date}.|"
    "Cancel my {title} on {date}.",
    _done("deleted"),
    "Deleted {title} on {date}.",
)
_tool(
    "set_birthday",
    "Store the birthday of a person|Save someone's birthday",
    (P("person", "name", "Name of the person"), P("date", "date", "Date of the birthday")),
    "The birthday of {person} is {date}, save it.|Save {date} as the birthday of {person}.|"
    "Remember that {person} has a birthday on {date}.",
    _done("saved"),
    "Saved {date} as the birthday of {person}.",
)
_tool(
    "get_time",
    "Get the current time|Tell what time it is now|Read the clock",
    (),
    "What time is it?|Tell me the time.|What is the time now?|Check the clock.",
    lambda d, a: {"time": d.time()},
    "It is {time}.",
)
_tool(
    "get_date",
    "Get the date of today|Tell which day it is today|Get the current date",
    (),
    "What is the date today?|What day is it?|Tell me the date.|Which date do we have today?",
    lambda d, a: {"date": d.date()},
    "Today is {date}.",
)
# --- weather ------------------------------------------------------------------------------------
_tool(
    "get_weather",
    "Get the current weather in a city|Current weather of a place|Look up the weather now",
    (
        P("city", "city", "Name of the city"),
        P("unit", "one:celsius|fahrenheit", "Temperature unit", "in {}"),
    ),
    "What is the weather in {city}{opts}?|How is the weather in {city}{opts}?|"
    "Tell me the weather in {city}{opts}.|Weather in {city}{opts}?|Is it warm in {city}{opts}?",
    lambda d, a: {
        "condition": d.pick(("sunny", "cloudy", "rain", "snow", "windy", "fog")),
        "temperature": d.between(-9, 38),
    },
    "It is {condition} in {city}, {temperature} degrees.",
    group="weather",
    many="What is the weather in {}?",
)
_tool(
    "get_forecast",
    "Get the weather forecast for the next days|Forecast for several days",
    (P("city", "city", "Name of the city"), P("days", "small", "Number of days")),
    "Give me the forecast for {city} for {days} days.|"
    "What will the weather be in {city} for the next {days} days?|"
    "Show the {days} day forecast for {city}.",
    lambda d, a: {"forecast": d.pick(("sunny", "cloudy", "rain", "snow", "windy", "fog"))},
    "The forecast for {city}: {forecast}.",
    group="weather",
)
_tool(
    "get_sunrise",
    "Get the time of sunrise|Tell when the sun rises",
    (P("city", "city", "Name of the city"), P("date", "date", "Date", "on {}")),
    "When does the sun rise in {city}{opts}?|When is sunrise in {city}{opts}?|"
    "Tell me the sunrise time in {city}{opts}.",
    lambda d, a: {"sunrise": d.time()},
    "The sun rises at {sunrise} in {city}.",
    many="When does the sun rise in {}?",
)
_tool(
    "get_air_quality",
    "Get the air quality of a city|Measure how clean the air is",
    (P("city", "city", "Name of the city"),),
    "How clean is the air in {city}?|What is the air quality in {city}?|"
    "Check the air quality in {city}.",
    lambda d, a: {"index": d.between(5, 180)},
    "The air quality index in {city} is {index}.",
    many="What is the air quality in {}?",
)
# --- units, money, maths ------------------------------------------------------------------------
_tool(
    "convert_units",
    "Convert a value between units|Unit conversion|Convert a measurement to another unit",
    (
        P("value", "number", "Value to convert"),
        P("from_unit", "unit", "Unit to convert from"),
        P("to_unit", "other_unit", "Unit to convert to"),
    ),
    "Convert {value} {from_unit} to {to_unit}.|How many {to_unit} are {value} {from_unit}?|"
    "What is {value} {from_unit} in {to_unit}?|Turn {value} {from_unit} into {to_unit}.",
    lambda d, a: {"result": d.number()},
    "{value} {from_unit} is {result} {to_unit}.",
)
_tool(
    "convert_currency",
    "Convert money to another currency|Currency conversion|Exchange an amount of money",
    (
        P("amount", "number", "Amount of money"),
        P("from_currency", "of:CURRENCIES", "Currency to convert from"),
        P("to_currency", "of:CURRENCIES", "Currency to convert to"),
    ),
    "Convert {amount} {from_currency} to {to_currency}.|"
    "How much is {amount} {from_currency} in {to_currency}?|"
    "Exchange {amount} {from_currency} into {to_currency}.",
    lambda d, a: {"converted": d.number()},
    "{amount} {from_currency} is {converted} {to_currency}.",
)
_tool(
    "add_numbers",
    "Add a list of numbers|Sum of several numbers",
    (P("numbers", "list:int", "Numbers to add"),),
    "Add up {numbers}.|What is the sum of {numbers}?|Sum the numbers {numbers}.",
    lambda d, a: {"sum": sum(a["numbers"])},
    "The sum is {sum}.",
)
_tool(
    "get_percentage",
    "Compute a percentage of a number|Percent of a value",
    (P("percent", "int", "Percent"), P("value", "number", "Base value")),
    "What is {percent} percent of {value}?|Compute {percent} percent of {value}.|"
    "Take {percent} percent of {value}.",
    lambda d, a: {"result": d.number()},
    "{percent} percent of {value} is {result}.",
)
_tool(
    "random_number",
    "Pick a random number|Draw a random number between two limits",
    (P("minimum", "small", "Lowest number"), P("maximum", "int", "Highest number")),
    "Pick a random number between {minimum} and {maximum}.|"
    "Give me a random number from {minimum} to {maximum}.",
    lambda d, a: {"number": d.between(1, 99)},
    "Your random number is {number}.",
)
_tool(
    "transfer_money",
    "Send money to a person|Transfer money from my account",
    (
        P("amount", "number", "Amount of money"),
        P("currency", "of:CURRENCIES", "Currency"),
        P("recipient", "name", "Who gets the money"),
    ),
    "Transfer {amount} {currency} to {recipient}.|Pay {recipient} {amount} {currency}.|"
    "Send {amount} {currency} to {recipient}.",
    _done("sent"),
    "Sent {amount} {currency} to {recipient}.",
)
_tool(
    "get_balance",
    "Get the balance of an account|Show how much money is in an account",
    (P("account", "one:savings|checking|business|joint", "Which account"),),
    "How much money is in my {account} account?|Show the balance of my {account} account.|"
    "What is the balance of the {account} account?",
    lambda d, a: {"balance": d.number()},
    "The balance of the {account} account is {balance}.",
)
# --- files --------------------------------------------------------------------------------------
_tool(
    "list_files",
    "List the files in a folder|Show what is in a folder|Get the file names of a folder",
    (P("path", "folder", "Path of the folder"),),
    "List the files in {path}.|What files are in {path}?|Show me the folder {path}.|"
    "Which files does the folder {path} have?|How many files are in {path}?|Look into {path}.",
    _files,
    "Files in {path} ({count}): {files}.",
    many="Which files are in {}?",
)
_tool(
    "read_file",
    "Read a text file|Get the content of a file|Open a file and read it",
    (P("path", "file", "Path of the file"),),
    "Read {path}.|What does {path} say?|Show the content of {path}.|What is in the file {path}?|"
    "Open {path} and read it to me.",
    lambda d, a: {"text": d.phrase()},
    "The file {path} says: {text}.",
    many="Read the files {}.",
)
_tool(
    "write_file",
    "Write text to a file|Save text in a file",
    (P("path", "file", "Path of the file"), P("text", "phrase", "Text to write")),
    "Write '{text}' to {path}.|Save the text '{text}' in {path}.|"
    "Create the file {path} with the text '{text}'.",
    _done("written"),
    "Wrote the text to {path}.",
)
_tool(
    "delete_file",
    "Delete a file|Remove a file from disk",
    (P("path", "file", "Path of the file"),),
    "Delete the file {path}.|Remove {path} from the disk.|Erase {path}.|Get rid of {path}.",
    _done("deleted"),
    "Deleted {path}.",
    many="Delete the files {}.",
)
_tool(
    "rename_file",
    "Rename a file|Give a file a new name",
    (P("new_name", "file", "New name of the file"), P("old_name", "file", "Old name of the file")),
    "Rename {old_name} to {new_name}.|Change the name of {old_name} to {new_name}.|"
    "Call the file {old_name} {new_name} from now on.",
    _done("renamed"),
    "Renamed {old_name} to {new_name}.",
)
_tool(
    "search_files",
    "Search files for a word|Find files that contain a word",
    (P("query", "word", "Word to search for"), P("path", "folder", "Folder to search", "in {}")),
    "Find files that contain the word {query}{opts}.|Search my files for {query}{opts}.|"
    "Which files mention {query}{opts}?",
    lambda d, a: {"files": [d.file() for _ in range(d.between(1, 2))]},
    "Found {query} in {files}.",
)
# --- messages and people ------------------------------------------------------------------------
_tool(
    "send_message",
    "Send a text message to a person|Text somebody|Send a short message",
    (P("recipient", "name", "Who gets the message"), P("text", "phrase", "Text of the message")),
    "Text {recipient}: {text}.|Send a message to {recipient} saying {text}.|"
    "Tell {recipient} '{text}'.|Message {recipient} that {text}.",
    _done("sent"),
    "Sent your message to {recipient}.",
    group="message",
)
_tool(
    "send_email",
    "Send an email|Write an email to people",
    (
        P("to", "list:name", "Names of the people"),
        P("subject", "thing", "Subject of the email"),
        P("urgent", "bool:an urgent|a normal", "Whether the email is urgent"),
    ),
    "Send {urgent} email to {to} with the subject {subject}.|"
    "Write {urgent} email about {subject} to {to}.",
    _done("sent"),
    "Sent the email about {subject}.",
    group="message",
)
_tool(
    "call_contact",
    "Call a person on the phone|Start a phone call",
    (
        P("name", "name", "Who to call"),
        P("video", "bool:with video|without video", "Whether to use video", "{}"),
    ),
    "Call {name}{opts}.|Phone {name}{opts}.|Start a call to {name}{opts}.|Ring {name}{opts}.",
    _done("calling"),
    "Calling {name}.",
)
_tool(
    "read_messages",
    "Read messages from a person|Show messages of a sender",
    (P("sender", "name", "Who sent the messages"), P("limit", "small", "Number of messages")),
    "Show the last {limit} messages from {sender}.|Read me {limit} messages from {sender}.|"
    "What did {sender} write in the last {limit} messages?",
    lambda d, a: {"latest": d.phrase()},
    "The latest from {sender}: {latest}.",
)
_tool(
    "add_contact",
    "Add a person to the contacts|Save a new contact",
    (
        P("name", "name", "Name of the person"),
        P("phone", "phone", "Phone number"),
        P(
            "address",
            "object",
            "Address of the person",
            "living at {}",
            (P("city", "city", "City"), P("street", "street", "Street and number")),
            "{street} in {city}",
        ),
    ),
    "Add {name} to my contacts with phone {phone}{opts}.|"
    "Save the contact {name}, phone {phone}{opts}.",
    _done("added"),
    "Added {name} to your contacts.",
)
_tool(
    "find_contact",
    "Find the phone number of a person|Look up a contact",
    (P("name", "name", "Name of the person"),),
    "What is the phone number of {name}?|Find the number of {name}.|Look up {name} in my contacts.",
    lambda d, a: {"phone": f"555-{d.between(1000, 9999)}"},
    "The phone number of {name} is {phone}.",
    many="Look up the phone numbers of {}.",
)
# --- home and music -----------------------------------------------------------------------------
_tool(
    "set_light",
    "Turn a light on or off|Switch the light of a room",
    (
        P("on", "bool:on|off", "Whether the light is on"),
        P("room", "of:ROOMS", "Name of the room"),
    ),
    "Turn {on} the light in the {room}.|Switch the {room} light {on}.|Lights {on} in the {room}.",
    _done("done"),
    "The light in the {room} is {on}.",
)
_tool(
    "set_temperature",
    "Set the heating of a room|Set the target temperature of a room",
    (
        P("degrees", "number", "Temperature in degrees"),
        P("room", "of:ROOMS", "Name of the room"),
    ),
    "Set the {room} to {degrees} degrees.|Heat the {room} to {degrees} degrees.|"
    "Make it {degrees} degrees in the {room}.",
    _done("set"),
    "The {room} is set to {degrees} degrees.",
)
_tool(
    "play_music",
    "Play music|Play songs of one genre",
    (
        P("genre", "of:GENRES", "Genre of the music"),
        P("room", "of:ROOMS", "Room to play in", "in the {}"),
        P("shuffle", "bool:with shuffle|without shuffle", "Whether to shuffle", "{}"),
    ),
    "Play some {genre}{opts}.|Put on {genre} music{opts}.|I want to hear {genre}{opts}.|"
    "Start {genre} music{opts}.",
    _done("playing"),
    "Playing {genre}.",
)
_tool(
    "set_volume",
    "Set the volume of the speaker|Change how loud the sound is",
    (P("level", "int", "Volume level"),),
    "Set the volume to {level}.|Change the volume to {level}.|Make the volume {level}.",
    _done("set"),
    "The volume is {level}.",
)
_tool(
    "set_lock",
    "Lock or unlock a door|Control a door lock",
    (
        P("door", "one:front|back|garage|cellar|garden", "Which door"),
        P("locked", "bool:Lock|Unlock", "Whether the door is locked"),
    ),
    "{locked} the {door} door.|{locked} my {door} door.",
    _done("done"),
    "Done with the {door} door.",
)
_tool(
    "start_vacuum",
    "Start the robot vacuum|Vacuum some rooms",
    (P("rooms", "list:of:ROOMS", "Rooms to clean"),),
    "Vacuum the {rooms}.|Start the vacuum in the {rooms}.|Let the robot clean the {rooms}.",
    _done("started"),
    "The vacuum has started.",
)
# --- travel -------------------------------------------------------------------------------------
_tool(
    "book_flight",
    "Book a flight between two cities|Buy a plane ticket",
    (
        P("origin", "city", "City of departure"),
        P("destination", "city", "City of arrival"),
        P("date", "date", "Date of the flight"),
        P("cabin", "one:economy|business|first", "Cabin class", "in {} class"),
    ),
    "Book a flight from {origin} to {destination} on {date}{opts}.|"
    "Fly me from {origin} to {destination} on {date}{opts}.|"
    "I need a plane ticket to {destination} from {origin} on {date}{opts}.",
    lambda d, a: {"booking": d.code()},
    "Your flight from {origin} to {destination} is booked: {booking}.",
)
_tool(
    "find_train",
    "Find a train between two cities|Look up train times",
    (
        P("origin", "city", "City of departure"),
        P("destination", "city", "City of arrival"),
    ),
    "When does the next train from {origin} to {destination} leave?|"
    "Find a train from {origin} to {destination}.|"
    "I want to go by train from {origin} to {destination}, when does it leave?",
    lambda d, a: {"departure": d.time()},
    "The train to {destination} leaves at {departure}.",
)
_tool(
    "book_hotel",
    "Book a hotel room|Reserve a hotel in a city",
    (
        P("city", "city", "City of the hotel"),
        P("nights", "small", "Number of nights"),
        P("breakfast", "bool:with breakfast|without breakfast", "Whether to add breakfast", "{}"),
    ),
    "Book a hotel in {city} for {nights} nights{opts}.|"
    "Reserve a hotel room for {nights} nights in {city}{opts}.|"
    "I need a hotel in {city} for {nights} nights{opts}.",
    lambda d, a: {"hotel": d.thing()},
    "Booked the hotel {hotel} in {city}.",
)
_tool(
    "get_route",
    "Get the route between two places|Directions from one place to another",
    (
        P("start", "city", "Where the route starts"),
        P("end", "city", "Where the route ends"),
        P("mode", "one:car|bike|foot|bus", "How to travel", "by {}"),
    ),
    "How do I get from {start} to {end}{opts}?|Show the route from {start} to {end}{opts}.|"
    "Give me directions from {start} to {end}{opts}.",
    lambda d, a: {"minutes": d.between(10, 600)},
    "The route from {start} to {end} takes {minutes} minutes.",
)
_tool(
    "rent_car",
    "Rent a car|Hire a car in a city",
    (P("city", "city", "City of the rental"), P("days", "small", "Number of days")),
    "Rent a car in {city} for {days} days.|I need a rental car in {city} for {days} days.|"
    "Hire a car for {days} days in {city}.",
    lambda d, a: {"car": d.thing()},
    "Your car in {city} is the {car}.",
)
_tool(
    "call_taxi",
    "Order a taxi|Send a taxi to an address",
    (
        P(
            "pickup",
            "object",
            "Where to pick up",
            None,
            (P("city", "city", "City"), P("street", "street", "Street and number")),
            "{street} in {city}",
        ),
        P("time", "time", "Time of pickup"),
    ),
    "Order a taxi to {pickup} at {time}.|Get me a taxi at {time} to {pickup}.|"
    "I need a cab at {pickup} at {time}.",
    lambda d, a: {"taxi": d.between(10, 999)},
    "Taxi {taxi} comes at {time}.",
)
# --- food and shopping --------------------------------------------------------------------------
_tool(
    "order_food",
    "Order food from a restaurant|Order dishes for delivery",
    (
        P(
            "items",
            "objects",
            "Dishes to order",
            None,
            (P("dish", "of:DISHES", "Name of the dish"), P("quantity", "small", "How many")),
            "{quantity} {dish}",
        ),
    ),
    "Order {items}.|I would like to order {items}.|Get me {items} for dinner.",
    lambda d, a: {"minutes": d.between(10, 90)},
    "Your food arrives in {minutes} minutes.",
)
_tool(
    "book_table",
    "Book a table at a restaurant|Reserve a table",
    (
        P("restaurant", "place", "Name of the restaurant"),
        P("people", "small", "Number of people"),
        P("time", "time", "Time of arrival"),
    ),
    "Book a table for {people} at {restaurant} at {time}.|"
    "Reserve a table at {restaurant} for {people} people at {time}.",
    _done("booked"),
    "Your table at {restaurant} is booked for {time}.",
)
_tool(
    "find_recipe",
    "Find a recipe for ingredients|Suggest what to cook",
    (P("ingredients", "list:of:PRODUCTS", "Ingredients to use"),),
    "What can I cook with {ingredients}?|Find a recipe with {ingredients}.|"
    "Suggest a dish made from {ingredients}.",
    lambda d, a: {"recipe": d.pick(("soup", "salad", "curry", "risotto", "burrito"))},
    "You can cook {recipe}.",
)
_tool(
    "add_to_cart",
    "Put a product in the shopping cart|Add an item to the cart",
    (P("product", "of:PRODUCTS", "Name of the product"), P("quantity", "small", "How many")),
    "Add {quantity} {product} to my cart.|Put {quantity} {product} in the shopping cart.|"
    "I want to buy {quantity} {product}.",
    _done("added"),
    "Added {quantity} {product} to your cart.",
)
_tool(
    "track_order",
    "Track an order|Find out where an order is",
    (P("order_id", "code", "Number of the order"),),
    "Where is my order {order_id}?|Track order {order_id}.|Check the status of order {order_id}.",
    lambda d, a: {"place": d.city()},
    "Your order {order_id} is in {place}.",
    many="Where are my orders {}?",
)
# --- notes and tasks ----------------------------------------------------------------------------
_tool(
    "add_note",
    "Save a note|Write down a note",
    (P("text", "phrase", "Text of the note"),),
    "Note: {text}.|Make a note: {text}.|Write down '{text}' as a note.|"
    "Save a note that says {text}.",
    _done("saved"),
    "Saved your note.",
    group="notes",
)
_tool(
    "add_task",
    "Add a task to the to-do list|Create a task",
    (
        P("task", "phrase", "What to do"),
        P("priority", "one:low|medium|high", "Priority of the task", "with {} priority"),
    ),
    "Add '{task}' to my to-do list{opts}.|Put '{task}' on my task list{opts}.|"
    "Create the task '{task}'{opts}.",
    lambda d, a: {"task_id": d.between(1, 99)},
    "Added task {task_id} to your list.",
    group="todo",
)
_tool(
    "complete_task",
    "Mark a task as done|Complete a task",
    (P("task_id", "int", "Number of the task"),),
    "Mark task {task_id} as done.|Task {task_id} is finished.|Complete task {task_id}.|"
    "Check off task {task_id}.",
    _done("completed"),
    "Task {task_id} is done.",
    many="Mark the tasks {} as done.",
)
_tool(
    "set_reminder",
    "Set a reminder for a time|Remind the user of something",
    (P("text", "phrase", "What to remember"), P("time", "time", "When to remind")),
    "Remind me at {time}: {text}.|Set a reminder at {time} saying {text}.|"
    "At {time} remind me: {text}.",
    _done("set"),
    "I will remind you at {time}.",
    group="remind",
)
_tool(
    "set_timer",
    "Start a timer|Count down some minutes",
    (
        P("minutes", "int", "Number of minutes"),
        P("label", "word", "Name of the timer", "called {}"),
    ),
    "Set a timer for {minutes} minutes{opts}.|Start a {minutes} minute timer{opts}.|"
    "Count down {minutes} minutes{opts}.",
    _done("started"),
    "The timer runs for {minutes} minutes.",
    group="remind",
)
_tool(
    "translate_text",
    "Translate text to a language|Translation into another language",
    (
        P("text", "phrase", "Text to translate"),
        P("language", "of:LANGUAGES", "Target language"),
    ),
    "Translate '{text}' to {language}.|How do you say '{text}' in {language}?|"
    "Say '{text}' in {language}.",
    lambda d, a: {"translation": f"{d.invented()} {d.invented()}"},
    "In {language} that is: {translation}.",
)
_tool(
    "define_word",
    "Look up the meaning of a word|Dictionary",
    (P("word", "word", "Word to look up"),),
    "What does the word {word} mean?|Define {word}.|Look up the meaning of {word}.|"
    "Give me the definition of {word}.",
    lambda d, a: {"meaning": d.thing()},
    "{word} means {meaning}.",
    many="Define the words {}.",
)
_tool(
    "web_search",
    "Search the web|Search the internet for information",
    (
        P("query", "thing", "Search words"),
        P("limit", "small", "Number of results", "with {} results"),
    ),
    "Search the web for {query}{opts}.|Look online for {query}{opts}.|Google {query}{opts}.",
    lambda d, a: {"title": d.thing()},
    "The first result is {title}.",
)

# --- held out: never seen in training, built from parameters of known kinds -----------------------
_tool(
    "water_plants",
    "Water the plants in a room",
    (P("room", "of:ROOMS", "Name of the room"), P("minutes", "int", "Number of minutes")),
    "Water the plants in the {room} for {minutes} minutes.",
    _done(),
    "The plants in the {room} get water.",
    into=HELDOUT_TOOLS,
)
_tool(
    "feed_pet",
    "Feed a pet at a time",
    (P("pet", "name", "Name of the pet"), P("time", "time", "Time to feed")),
    "Feed my pet {pet} at {time}.",
    _done(),
    "{pet} gets food at {time}.",
    into=HELDOUT_TOOLS,
)
_tool(
    "rent_bike",
    "Rent a bike in a city",
    (P("city", "city", "Name of the city"), P("days", "small", "Number of days")),
    "Rent a bike in {city} for {days} days.",
    _done(),
    "Your bike in {city} is ready.",
    into=HELDOUT_TOOLS,
)
_tool(
    "print_file",
    "Print a file on paper",
    (P("path", "file", "Path of the file"), P("copies", "small", "Number of copies")),
    "Print {copies} copies of {path}.",
    _done(),
    "Printed {path}.",
    into=HELDOUT_TOOLS,
)
_tool(
    "buy_tickets",
    "Buy cinema tickets for a film",
    (
        P("film", "thing", "Name of the film"),
        P("seats", "small", "Number of seats"),
        P("time", "time", "Start time"),
    ),
    "Buy {seats} cinema tickets for the film {film} at {time}.",
    _done(),
    "Bought {seats} tickets for {film}.",
    into=HELDOUT_TOOLS,
)
_tool(
    "get_tide",
    "Get the time of high tide",
    (P("city", "city", "Name of the city"), P("date", "date", "Date", "on {}")),
    "When is high tide in {city}{opts}?",
    lambda d, a: {"tide": d.time()},
    "High tide in {city} is at {tide}.",
    into=HELDOUT_TOOLS,
)
_tool(
    "paint_wall",
    "Paint a wall of a room",
    (
        P("color", "one:red|blue|green|white|yellow", "Color of the wall"),
        P("room", "of:ROOMS", "Name of the room"),
    ),
    "Paint the wall of the {room} {color}.",
    _done(),
    "The wall of the {room} is {color}.",
    into=HELDOUT_TOOLS,
)
_tool(
    "invite_guests",
    "Invite guests to a party",
    (P("guests", "list:name", "Names of the guests"), P("date", "date", "Date of the party")),
    "Invite {guests} to the party on {date}.",
    _done("invited"),
    "Your guests are invited for {date}.",
    into=HELDOUT_TOOLS,
)
