"""Words and values the pocket conversations are made of, and the train / held-out split.

Open classes (names, cities, files, numbers, free text, invented words) are split by a hash of the
written value: one value in eight is held out and never drawn for training. Closed classes (units,
week days, rooms, dishes) are shared by both splits: a model cannot be asked to invent them.
"""

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, TypeVar
from zlib import crc32

Split = Literal["train", "heldout"]
T = TypeVar("T")


def _words(text: str) -> tuple[str, ...]:
    """Words at spaces, or phrases at bars."""
    return tuple(text.split("|" if "|" in text else None))


NAMES = _words(
    "Ada Adam Aisha Alan Alba Alex Alice Amir Amy Ana Andre Anna Anton Arun Asha Astrid Ben "
    "Bella Boris Bruno Carla Carlos Carmen Chen Chloe Clara Cora Dana Daniel David Dara Diego "
    "Dora Elena Eli Elif Ella Emil Emma Enzo Erik Esra Eva Farah Felix Femi Fiona Frank Freya "
    "Gita Grace Greta Hana Hassan Hector Hugo Ida Igor Ines Ingrid Ivan Iris Jack James Jana "
    "Jin Joan Jonas Jose Julia Jun Kai Karim Kate Kenji Kira Lars Laura Layla Lea Lena Leo Liam "
    "Lina Lucas Lucy Luis Maja Mara Marco Maria Mark Marta Maya Mei Mia Milan Mina Nadia Naomi "
    "Nina Noah Nora Oba Olga Omar Oscar Otto Pablo Paul Pedro Petra Pia Priya Quinn Rafa Rana "
    "Ravi Rita Rosa Rui Sam Sana Sara Sasha Selma Simon Sofia Sven Tara Theo Tina Tomas Uma "
    "Vera Victor Wei Yara Yuki Yusuf Zara Zoe"
)
CITIES = _words(
    "Accra Amman Athens Austin Baku Bergen Berlin Bern Bilbao Bogota Bonn Boston Brno Cairo "
    "Cali Chicago Cork Dakar Dallas Delhi Denver Doha Dublin Fez Geneva Genoa Ghent Graz Hanoi "
    "Havana Helsinki Izmir Jakarta Kyiv Kyoto Lagos Leeds Lille Lima Lisbon London Lyon Madrid "
    "Malaga Malmo Manila Miami Milan Minsk Mumbai Munich Nairobi Nantes Naples Nice Oslo Ottawa "
    "Oxford Paris Perth Porto Prague Quito Riga Rome Rotterdam Sanaa Seattle Seoul Seville "
    "Sofia Split Sydney Taipei Tallinn Tampa Tirana Tokyo Toronto Tunis Turin Utrecht Vienna "
    "Vilnius Warsaw York Zagreb Zurich"
)
NOUNS = _words(
    "apple arrow autumn badge baker basket beach bell bird boat bone book bottle box branch "
    "bread brick bridge brush bucket budget butter button cabin cable cake camera camp candle "
    "canvas carpet castle chair chart cheese circle clay clock cloud coat coffee coin comet "
    "corner cotton crane crown cup dance desk diary dinner doctor door draft drum eagle engine "
    "exam fabric farm feather fence field flag flame flower forest fountain fox frame fruit "
    "game garden gate gift glass glove goat grape guitar hammer harbor hat hill honey horse "
    "island jacket jar journey kettle key kite ladder lake lamp leaf lemon letter library lion "
    "lunch magnet map market meadow metal mill mirror moon morning mountain needle nest novel "
    "ocean olive orange oven owl paint panda paper parcel park path pearl pencil pepper photo "
    "piano picnic pillow planet plate poem pond potato quilt rabbit radio rain recipe report "
    "ribbon river road rocket roof rope rose sail salt sand scarf school seed shell ship shoe "
    "signal silver sketch snow soap song spoon spring stage star station stone storm story "
    "street summer table temple ticket tiger tower train tree tunnel valley violin wagon wall "
    "watch water whale wheel window winter wood wool yard"
)
ADJECTIVES = _words(
    "amber big black blue bold brave bright broken brown calm clean clever cold cool dark deep "
    "dry early easy empty fair fast final fine first fresh full gentle gold golden gray great "
    "green happy heavy hidden high hot kind large last late light little long loud lucky narrow "
    "new next old open pale pink plain poor proud purple quick quiet rapid red rich round royal "
    "second sharp short silent simple small smooth soft strong sweet tall thin tiny warm white "
    "wide wild wise wooden yellow young"
)
VERBS = _words(
    "bring build buy call carry check clean close collect cook count draw feed fetch finish fix "
    "fold grow hide hold lift mend move open order pack paint pick plan print read repair "
    "return sell send show sign sort study sweep take test visit wash watch water weigh wrap "
    "write"
)
EVENTS = _words(
    "dentist|team meeting|gym|yoga class|piano lesson|lunch|dinner|birthday party|"
    "budget review|job interview|car service|haircut|book club|staff call|project kickoff|"
    "board meeting|swim class|choir practice|eye test|parents evening|chess night|garden work"
)
PRODUCTS = _words(
    "milk eggs bread butter rice apples bananas coffee tea sugar flour pasta cheese onions "
    "carrots tomatoes salt pepper soap batteries paper candles honey beans lemons yogurt olives "
    "nuts oats garlic spinach mushrooms"
)
DISHES = _words(
    "pizza salad soup burger ramen curry taco sushi lasagna falafel sandwich dumplings noodles "
    "risotto pancake omelette burrito kebab"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words(
    "January February March April May June July August September October November December"
)
ROOMS = _words("kitchen bedroom office hall bathroom garage attic cellar nursery studio")
CURRENCIES = _words("USD EUR GBP JPY CHF SEK INR BRL dollars euros pounds yen francs rupees pesos")
UNITS = (
    *(("km", "miles", "meters", "feet", "yards", "inches", "cm", "mm"),),
    *(("kg", "pounds", "grams", "ounces", "stone", "tons"),),
    *(("liters", "gallons", "cups", "pints", "ml"),),
    *(("celsius", "fahrenheit", "kelvin"),),
    *(("hours", "minutes", "seconds", "days", "weeks"),),
)
LANGUAGES = _words("French Spanish German Italian Polish Turkish Hindi Japanese Greek Dutch")
GENRES = _words("jazz rock pop folk blues opera techno reggae disco soul")
EXTENSIONS = ("txt", "md", "csv", "pdf", "py", "json", "log")
ONSETS = _words("b br c ch d dr f fl g gl gr h j k kl l m n p pl qu r s sk st t th tr v w z")
VOWELS = _words("a e i o u ai ea oo")
CODAS = ("", "", "b", "ck", "d", "f", "g", "l", "m", "n", "nd", "p", "r", "rn", "s", "st", "t", "x")


def side(value: str) -> Split:
    """The split a written value belongs to; one in eight is held out."""
    return "heldout" if crc32(value.encode()) % 8 == 0 else "train"


@cache
def _members(pool: tuple[str, ...], split: Split) -> tuple[str, ...]:
    kept = tuple(v for v in pool if side(v) == split)
    if not kept:
        raise ValueError(f"no {split} member among {pool[:3]}...; make the pool larger")
    return kept


class Draw:
    """Seeded source of values of one split."""

    def __init__(self, split: Split, seed: str) -> None:
        self.split: Split = split
        self.rng = random.Random(seed)

    # closed classes and choices: the same for both splits

    def pick(self, options: Sequence[T]) -> T:
        return options[self.rng.randrange(len(options))]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        return self.rng.sample(options, count)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def weighted(self, table: dict[T, float]) -> T:
        return self.rng.choices(list(table), list(table.values()))[0]

    def between(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    # open classes: only values of this split

    def own(self, pool: tuple[str, ...]) -> str:
        return self.pick(_members(pool, self.split))

    def until(self, make: Callable[[], str]) -> str:
        """Calls make() until the written value falls on this split's side."""
        while True:
            value = make()
            if side(value) == self.split:
                return value

    def invented(self) -> str:
        """A pronounceable word that means nothing."""

        def make() -> str:
            parts = [
                self.pick(ONSETS) + self.pick(VOWELS) + self.pick(CODAS)
                for _ in range(self.pick((1, 2, 2)))
            ]
            return "".join(parts)

        return self.until(lambda: next(w for w in iter(make, "") if len(w) > 3))

    def name(self) -> str:
        if self.chance(0.5):
            return self.own(NAMES)
        return self.until(lambda: self.invented().capitalize())

    def city(self) -> str:
        if self.chance(0.5):
            return self.own(CITIES)
        return self.until(lambda: self.invented().capitalize())

    def integer(self, low: int, high: int) -> int:
        return int(self.until(lambda: str(self.between(low, high))))

    def number(self) -> int | float:
        """A positive number with at most three digits before and two after the point."""
        if self.chance(0.6):
            return self.integer(2, 999)
        return float(self.until(lambda: repr(self.between(1, 999) / self.pick((10, 10, 100)))))

    def code(self) -> str:
        """Letters and digits, such as an order number."""
        letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
        return self.until(
            lambda: (
                "".join(self.pick(letters) for _ in range(self.between(1, 2)))
                + self.pick(("", "-"))
                + str(self.between(100, 99999))
            )
        )

    def date(self) -> str:
        kind = self.between(0, 9)
        if kind < 3:
            return self.pick((*DAYS, *DAYS, "tomorrow", "today"))
        if kind < 7:
            return self.until(lambda: f"{self.pick(MONTHS)} {self.between(1, 28)}")
        return self.until(
            lambda: f"20{self.between(24, 29)}-{self.between(1, 12):02}-{self.between(1, 28):02}"
        )

    def time(self) -> str:
        if self.chance(0.7):
            return self.until(
                lambda: (
                    f"{self.between(0, 23):02}:{self.pick((0, 5, 10, 15, 20, 30, 40, 45, 50)):02}"
                )
            )
        return f"{self.between(1, 12)} {self.pick(('am', 'pm'))}"

    def word(self) -> str:
        return self.invented() if self.chance(0.4) else self.own(NOUNS)

    def folder(self) -> str:
        first = self.pick(("docs", "photos", "music", "work", "home", self.word(), self.word()))
        return f"{first}/{self.word()}" if self.chance(0.25) else first

    def file(self) -> str:
        def make() -> str:
            stem = self.word()
            if self.chance(0.4):
                stem += self.pick(("_", "-")) + self.word()
            if self.chance(0.25):
                stem += str(self.between(1, 99))
            return f"{stem}.{self.pick(EXTENSIONS)}"

        value = self.until(make)
        return f"{self.folder()}/{value}" if self.chance(0.2) else value

    def event(self) -> str:
        def make() -> str:
            kind = self.between(0, 9)
            if kind < 3:
                return self.pick(EVENTS)
            if kind < 6:
                return f"{self.pick(('lunch', 'call', 'coffee', 'meeting'))} with {self.name()}"
            return f"{self.word()} {self.pick(('review', 'meeting', 'lesson', 'party', 'trip'))}"

        return self.until(make)

    def phrase(self) -> str:
        """A short free text without a full stop."""

        def make() -> str:
            kind = self.between(0, 4)
            if kind == 0:
                return f"{self.pick(VERBS)} the {self.pick(ADJECTIVES)} {self.word()}"
            if kind == 1:
                return f"the {self.word()} is {self.pick(ADJECTIVES)}"
            if kind == 2:
                return f"{self.pick(VERBS)} {self.between(2, 60)} {self.word()}s"
            if kind == 3:
                return f"see you at the {self.word()}"
            return f"{self.pick(VERBS)} the {self.word()} for {self.name()}"

        return self.until(make)

    def thing(self) -> str:
        """A described object such as 'red kite'."""
        return self.until(lambda: f"{self.pick(ADJECTIVES)} {self.word()}")
