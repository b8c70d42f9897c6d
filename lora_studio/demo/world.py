"""The questions of the small world of demo-text: kinds, phrasings, plain answers, and which questions are held out."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from lora_studio.demo import facts

HELD_OUT_ONE_IN = 6

# What may stand before a question. It does not count for the split.
LEADS = ("Hello. ", "Hey. ", "One question. ", "I have a question. ", "Please help me. ", "Listen. ", "Good day. ")

# Said so that a visitor's first words are met; too few to be scored, so always trained on.
SMALL_TALK = {
    "Hello.": "Hello. Ask me something.",
    "Hi.": "Hello. Ask me something.",
    "Good morning.": "Hello. Ask me something.",
    "How are you?": "I am well.",
    "Who are you?": "I am a very small model.",
    "What are you?": "I am a very small model.",
    "What can you do?": "I know some animals, people, countries and small numbers.",
    "What do you know?": "I know some animals, people, countries and small numbers.",
    "Thank you.": "You are welcome.",
    "Thanks.": "You are welcome.",
    "Goodbye.": "Goodbye.",
}

Draw = Callable[[Random], tuple[dict, str]]  # chance -> what fills the phrasing, and the answer


@dataclass(frozen=True)
class Kind:
    """One kind of question. `new` says what a held-out question holds that training never showed.

    A kind that is not promised is trained on, but too hard for this size: exam and data sets leave it out.
    """

    phrasings: tuple[str, ...]
    draw: Draw
    weight: float = 1.0
    new: str = "wording"
    promised: bool = True


@dataclass(frozen=True)
class Question:
    """One question as asked, its kind and its one right plain answer."""

    kind: str
    text: str
    answer: str


def with_article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


# ---- how a question of each kind is drawn


def look_up(table: dict[str, str], answer: str) -> Draw:
    """A kind that asks for a row of a table: `{it}` is the row, `{fact}` what is known of it."""
    rows = sorted(table.items())

    def draw(chance: Random) -> tuple[dict, str]:
        it, fact = chance.choice(rows)
        return {"it": it}, answer.format(it=it, fact=fact)

    return draw


def column(table: dict[str, list[str]], index: int) -> dict[str, str]:
    return {name: row[index] for name, row in table.items()}


def neighbor(answer: str, step: int) -> Draw:
    """What stands `step` places further in a list everyone knows."""

    def draw(chance: Random) -> tuple[dict, str]:
        order = chance.choice(facts.ORDERS)
        index = chance.randrange(1, len(order) - 1)
        return {"it": order[index]}, answer.format(it=order[index], fact=order[index + step])

    return draw


def check_color(chance: Random) -> tuple[dict, str]:
    animal = chance.choice(sorted(facts.ANIMALS))
    truth = facts.ANIMALS[animal][0]
    said = truth if chance.random() < 0.5 else chance.choice([c for c in facts.COLORS if c != truth])
    return {"it": animal, "said": said}, f"{'Yes' if said == truth else 'No'}, the {animal} is {truth}."


def plus(chance: Random) -> tuple[dict, str]:
    x, y = chance.randrange(21), chance.randrange(21)
    return {"x": x, "y": y}, f"{x} plus {y} is {x + y}."


def minus(chance: Random) -> tuple[dict, str]:
    x = chance.randrange(21)
    y = chance.randrange(x + 1)
    return {"x": x, "y": y}, f"{x} minus {y} is {x - y}."


def times(chance: Random) -> tuple[dict, str]:
    x, y = chance.randrange(11), chance.randrange(11)
    return {"x": x, "y": y}, f"{x} times {y} is {x * y}."


def compare(pick: Callable, name: str) -> Draw:
    """Which of two different numbers under 100 is the bigger, or the smaller."""

    def draw(chance: Random) -> tuple[dict, str]:
        x, y = chance.sample(range(100), 2)
        return {"x": x, "y": y}, f"The {name} number is {pick(x, y)}."

    return draw


def word_list(chance: Random, shortest: int, longest: int) -> list[str]:
    return chance.sample(facts.LIST_WORDS, chance.randint(shortest, longest))


def in_list(answer: Callable[[list[str]], str]) -> Draw:
    """A kind that asks about a list of words it gives."""

    def draw(chance: Random) -> tuple[dict, str]:
        words = word_list(chance, 2, 4)
        return {"words": ", ".join(words)}, answer(words)

    return draw


def count(chance: Random) -> tuple[dict, str]:
    word, *others = chance.sample(facts.LIST_WORDS, 3)
    times_said = chance.randint(1, 4)
    words = [word] * times_said + [chance.choice(others) for _ in range(chance.randint(0, 3))]
    chance.shuffle(words)
    said = ("once", "twice", "three times", "four times")[times_said - 1]
    return {"it": word, "words": ", ".join(words)}, f"You say {word} {said}."


def belongings(chance: Random) -> tuple[dict, str, str]:
    """A story of who has what: its fields, the answer to "what", the answer to "who"."""
    size = chance.choice((2, 2, 3))
    names, things = chance.sample(sorted(facts.PEOPLE), size), chance.sample(facts.THINGS, size)
    having = [f"{with_article(chance.choice(facts.COLORS))} {thing}" for thing in things]
    story = " ".join(f"{name} has {have}." for name, have in zip(names, having, strict=True))
    one = chance.randrange(size)
    fields = {"story": story, "name": names[one], "thing": things[one]}
    return fields, f"{names[one]} has {having[one]}.", f"{names[one]} has the {things[one]}."


def has(chance: Random) -> tuple[dict, str]:
    fields, what, _ = belongings(chance)
    return fields, what


def who_has(chance: Random) -> tuple[dict, str]:
    fields, _, who = belongings(chance)
    return fields, who


def where(chance: Random) -> tuple[dict, str]:
    size = chance.choice((2, 2, 3))
    names, places = chance.sample(sorted(facts.PEOPLE), size), chance.sample(facts.PLACES, size)
    story = " ".join(f"{name} is in the {place}." for name, place in zip(names, places, strict=True))
    one = chance.randrange(size)
    return {"story": story, "name": names[one]}, f"{names[one]} is in the {places[one]}."


# ---- the table of kinds

KINDS: dict[str, Kind] = {
    "color": Kind(
        ("What color is the {it}?", "Which color does the {it} have?", "Tell me the color of the {it}.",
         "Do you know what color the {it} is?", "The {it} has which color?", "Name the color of the {it}."),
        look_up(column(facts.ANIMALS, 0), "The {it} is {fact}."),
    ),
    "home": Kind(
        ("Where does the {it} live?", "What is the home of the {it}?", "Tell me where the {it} lives.",
         "Do you know where the {it} lives?", "Where can I find the {it}?"),
        look_up(column(facts.ANIMALS, 1), "The {it} lives in the {fact}."),
    ),
    "food": Kind(
        ("What does the {it} eat?", "Which food does the {it} like?", "Tell me what the {it} eats.",
         "Do you know what the {it} eats?", "What is the food of the {it}?"),
        look_up(column(facts.ANIMALS, 2), "The {it} eats {fact}."),
    ),
    "sound": Kind(
        ("What sound does the {it} make?", "Tell me the sound of the {it}.", "How does the {it} sound?",
         "Do you know the sound of the {it}?", "What do I hear from the {it}?"),
        look_up(column(facts.ANIMALS, 3), "The {it} {fact}."),
    ),
    "young": Kind(
        ("What is a young {it} called?", "Tell me the name of a young {it}.", "How do I call a young {it}?",
         "Do you know the word for a young {it}?", "What is the baby of the {it}?"),
        look_up({n: with_article(row[4]) for n, row in facts.ANIMALS.items()}, "A young {it} is called {fact}."),
    ),
    "check": Kind(
        ("Is the {it} {said}?", "Is it true that the {it} is {said}?", "Do you think the {it} is {said}?",
         "I say the {it} is {said}. Am I right?"),
        check_color, 3.0, "question", False,
    ),
    "job": Kind(
        ("What is the job of {it}?", "What does {it} do?", "Tell me the job of {it}.", "Which job does {it} have?",
         "Do you know the job of {it}?", "What work does {it} do?"),
        look_up({n: with_article(row[0]) for n, row in facts.PEOPLE.items()}, "{it} is {fact}."),
    ),
    "pet": Kind(
        ("Which pet does {it} have?", "What is the pet of {it}?", "Tell me the pet of {it}.",
         "Do you know which pet {it} has?", "Which animal does {it} keep?"),
        look_up({n: with_article(row[1]) for n, row in facts.PEOPLE.items()}, "{it} has {fact}."),
    ),
    "likes": Kind(
        ("What does {it} like?", "Tell me what {it} likes.", "Do you know what {it} likes?",
         "What makes {it} happy?", "What can I give to {it}?"),
        look_up(column(facts.PEOPLE, 2), "{it} likes {fact}."),
    ),
    "work": Kind(
        ("What does a good {it} do?", "Tell me what a {it} does.", "What is the work of a {it}?",
         "Do you know what a {it} does all day?", "How does a {it} earn money?"),
        look_up(facts.WORK, "A {it} {fact}."),
    ),
    "capital": Kind(
        ("What is the capital of {it}?", "Tell me the capital of {it}.", "Name the capital of {it}.",
         "Which city is the capital of {it}?", "Do you know the capital of {it}?"),
        look_up(facts.CAPITALS, "The capital of {it} is {fact}."),
    ),
    "country": Kind(
        ("Which country is {it} in?", "In which country is {it}?", "Tell me the country of {it}.",
         "Do you know where {it} is?", "Where on the map is {it}?"),
        look_up({city: land for land, city in facts.CAPITALS.items()}, "{it} is in {fact}."),
    ),
    "opposite": Kind(
        ("What is the opposite of {it}?", "Tell me the opposite of {it}.", "Name the opposite of {it}.",
         "Which word is the opposite of {it}?", "Do you know the opposite of {it}?"),
        look_up(facts.OPPOSITES, "The opposite of {it} is {fact}."), 1.5,
    ),
    "plural": Kind(
        ("What is the plural of {it}?", "Tell me the plural of {it}.", "One {it}, but two what?",
         "How do I say more than one {it}?", "Do you know the plural of {it}?"),
        look_up(facts.PLURALS, "The plural of {it} is {fact}."),
    ),
    "past": Kind(
        ("What is the past of {it}?", "Tell me the past of {it}.", "Today I {it}, and yesterday?",
         "How do I say {it} about yesterday?", "Do you know the past of {it}?"),
        look_up(facts.PASTS, "The past of {it} is {fact}."),
    ),
    "after": Kind(
        ("What comes after {it}?", "Tell me what comes after {it}.", "Which one comes after {it}?",
         "Name the one after {it}.", "What follows {it}?"),
        neighbor("After {it} comes {fact}.", 1),
    ),
    "before": Kind(
        ("What comes before {it}?", "Tell me what comes before {it}.", "Which one comes before {it}?",
         "Name the one before {it}.", "What is just ahead of {it}?"),
        neighbor("Before {it} comes {fact}.", -1),
    ),
    "sort": Kind(
        ("What kind of word is {it}?", "Tell me what kind of word {it} is.", "What does the word {it} name?",
         "Is {it} an animal, a color, a thing, a job or a city?"),
        look_up(facts.SORTS, "The word {it} names {fact}."),
    ),
    "letter": Kind(
        ("Which letter does {it} start with?", "What is the first letter of {it}?", "Tell me the first letter of {it}.",
         "How does the word {it} begin?"),
        look_up({w: w[0] for w in facts.LIST_WORDS}, "The word {it} starts with {fact}."),
    ),
    "spell": Kind(
        ("Spell the word {it}.", "How do you spell {it}?", "Tell me the letters of {it}.", "Which letters are in {it}?"),
        look_up({w: ", ".join(w) for w in facts.LIST_WORDS if len(w) < 7}, "You spell {it} like this: {fact}."), 1.5,
    ),
    "plus": Kind(
        ("What is {x} plus {y}?", "Add {x} and {y}.", "How much is {x} plus {y}?", "Tell me {x} plus {y}.",
         "Do you know {x} plus {y}?"),
        plus, 2.5,
    ),
    "minus": Kind(
        ("What is {x} minus {y}?", "Take {y} from {x}.", "How much is {x} minus {y}?", "Tell me {x} minus {y}.",
         "Do you know {x} minus {y}?"),
        minus, 2.5,
    ),
    "times": Kind(
        ("What is {x} times {y}?", "Multiply {x} and {y}.", "How much is {x} times {y}?", "Tell me {x} times {y}.",
         "Do you know {x} times {y}?"),
        times,
    ),
    "bigger": Kind(
        ("Which is bigger, {x} or {y}?", "Tell me which number is bigger, {x} or {y}.", "What is more, {x} or {y}?"),
        compare(max, "bigger"), 1.5, "question",
    ),
    "smaller": Kind(
        ("Which is smaller, {x} or {y}?", "Tell me which number is smaller, {x} or {y}.", "What is less, {x} or {y}?"),
        compare(min, "smaller"), 1.5, "question",
    ),
    "first": Kind(
        ("What is the first word of this list: {words}?", "Tell me the first word: {words}.", "Which word is first: {words}?"),
        in_list(lambda words: f"The first word is {words[0]}."), 2.0, "question",
    ),
    "last": Kind(
        ("What is the last word of this list: {words}?", "Tell me the last word: {words}.", "Which word is last: {words}?"),
        in_list(lambda words: f"The last word is {words[-1]}."), 1.0, "question",
    ),
    "repeat": Kind(
        ("Repeat these words: {words}.", "Say this list again: {words}.", "What did I say: {words}?"),
        in_list(lambda words: f"You say {', '.join(words)}."), 2.0, "question",
    ),
    "reverse": Kind(
        ("Say these words backwards: {words}.", "Turn this list around: {words}.", "Reverse this list: {words}."),
        in_list(lambda words: f"Backwards it is {', '.join(words[::-1])}."), 1.5, "question",
    ),
    "count": Kind(
        ("How many times do I say {it}: {words}?", "Count the word {it}: {words}.", "How often is {it} in this list: {words}?"),
        count, 3.0, "question", False,
    ),
    "has": Kind(
        ("{story} What does {name} have?", "{story} Tell me what {name} has.", "{story} Which thing does {name} have?"),
        has, 3.0, "question", False,
    ),
    "who has": Kind(
        ("{story} Who has the {thing}?", "{story} Tell me who has the {thing}.", "{story} Do you know who has the {thing}?"),
        who_has, 3.0, "question", False,
    ),
    "where": Kind(
        ("{story} Where is {name}?", "{story} Tell me where {name} is.", "{story} In which place is {name}?"),
        where, 2.5, "question", False,
    ),
    "greeting": Kind(
        ("I am {it}.", "My name is {it}.", "Say hello to {it}.", "You can call me {it}.", "This is {it}.",
         "{it} is here.", "Meet {it}.", "{it} says hello."),
        look_up(dict.fromkeys(facts.PEOPLE, ""), "Hello, {it}."), 0.7,
    ),
}  # fmt: skip

PROMISED = tuple(name for name, kind in KINDS.items() if kind.promised)


# ---- asking


def is_held_out(question: str) -> bool:
    """Whether a question, without its lead, is kept from training: one in six, by hash, on every machine the same."""
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def ask(chance: Random, *, kind: str | None = None, held_out: bool = False) -> Question:
    """Draw one question from the training side or from the held-out side."""
    while True:
        name = kind or chance.choices(list(KINDS), [k.weight for k in KINDS.values()])[0]
        fields, answer = KINDS[name].draw(chance)
        text = chance.choice(KINDS[name].phrasings).format(**fields)
        if is_held_out(text) == held_out:
            lead = chance.choice(LEADS) if chance.random() < 0.4 else ""
            return Question(name, lead + text, answer)


def exam(each: int, *, seed: int = 0, kinds: tuple[str, ...] = PROMISED) -> list[Question]:
    """`each` different held-out questions of every kind."""
    chance, questions = Random(seed), []
    for kind in kinds:
        drawn: dict[str, Question] = {}
        while len(drawn) < each:
            question = ask(chance, kind=kind, held_out=True)
            drawn.setdefault(question.text, question)
        questions += drawn.values()
    return questions
