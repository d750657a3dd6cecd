"""The plain tasks of the base corpus: a product is described, questioned, counted, changed and renamed."""

from collections.abc import Callable
from random import Random

from everyday import everyday_task
from products import KEYS, MATERIALS, VALUES, Product, article, capital, draw
from remarks import FABRICS, FEATURES

Task = tuple[str, str]

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

STYLE_FACTS = {
    "casual": ("easy and friendly", "made for slow weekends", "good for a walk with friends"),
    "elegant": ("refined and polished", "made for the evening", "good for a dinner with grace"),
    "classic": ("timeless", "a favorite for years", "good for every season"),
    "sporty": ("active and full of energy", "made to move", "good for a run or a game"),
    "vintage": ("old and full of charm", "like an old film", "good for a flea market"),
    "modern": ("sharp and bold", "made for the city", "good for a busy week in town"),
    "romantic": ("sweet and dreamy", "made for love and candlelight", "good for a first date"),
    "minimal": ("calm and simple", "pure, with nothing extra", "good for a tidy wardrobe"),
}
SMALL_TALK = {
    "Hello": "Hello. How can I help you?",
    "Hi": "Hello. How can I help you?",
    "Good morning": "Good morning. How can I help you?",
    "Good evening": "Good evening. How can I help you?",
    "How are you": "I am fine, thank you.",
    "Who are you": "I am a very small language model.",
    "What are you": "I am a very small language model.",
    "What can you do": "I can read a list of attributes and describe the product.",
    "What is your name": "I have no name. I am a very small language model.",
    "Thank you": "You are welcome.",
    "Thanks": "You are welcome.",
    "Thanks a lot": "You are welcome.",
    "Goodbye": "Goodbye. Have a good day.",
    "Bye": "Goodbye. Have a good day.",
    "Good night": "Good night. Sleep well.",
    "Can you help me": "Yes. Give me a product, such as type#shirt*color#blue.",
    "What is an attribute": "An attribute is a key and a value, such as color#blue.",
}
PLACES = (
    "in the garden",
    "at home",
    "in the wardrobe",
    "on the chair",
    "by the door",
    "in the bag",
    "on the table",
)
OWNERS = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Ida", "Jonas", "Lena", "Max")


def describe(product: Product) -> str:
    """The plain description: what the product is, then one short sentence for each further attribute."""
    forms = product.forms()
    name = product.name if product.plural else article(product.name)
    parts = [f"{forms['This']} {forms['is']} {name}."]
    has = f"{forms['It']} {forms['has']}"
    for key in KEYS[3:]:
        value = product.get(key)
        if value is None:
            continue
        if key in ("style", "pattern", "fit"):
            parts.append(f"The {key} is {value}.")
        elif key == "neck":
            parts.append(f"{has} a {value} neck.")
        elif key == "sleeve":
            parts.append(f"{has} {value} sleeves.")
        else:
            uncounted = value.endswith("s") or value in ("embroidery", "fringe")
            parts.append(f"{has} {value if uncounted else article(value)}.")
    return " ".join(parts)


def _described(_: Random, product: Product) -> Task:
    return product.src, describe(product)


def _asked(random: Random, product: Product) -> Task:
    key = random.choice([pair[0] for pair in product.pairs] if random.random() < 0.8 else KEYS)
    ask = random.choice(("What is the {0}? {1}", "{1} What is the {0}?", "Tell me the {0}. {1}"))
    return ask.format(key, product.src), product.get(key) or f"The {key} is not given."


def _confirmed(random: Random, product: Product) -> Task:
    key, value = random.choice(product.pairs)
    said = value if random.random() < 0.5 else random.choice(VALUES[key])
    answer = f"Yes, the {key} is {value}." if said == value else f"No, the {key} is {value}."
    return f"Is the {key} {said}? {product.src}", answer


def _counted(_: Random, product: Product) -> Task:
    count = len(product.pairs)
    plural = "attribute" if count == 1 else "attributes"
    return (
        f"How many attributes are there? {product.src}",
        f"There {'is' if count == 1 else 'are'} {NUMBERS[count]} {plural}.",
    )


def _listed(random: Random, product: Product) -> Task:
    if random.random() < 0.3:
        return f"List the keys. {product.src}", ", ".join(key for key, _ in product.pairs)
    return f"List the attributes. {product.src}", ", ".join(f"{key}: {value}" for key, value in product.pairs)


def _named(random: Random, product: Product) -> Task:
    ask = random.choice(("Name the product.", "What is it?"))
    return f"{ask} {product.src}", f"{capital(product.name)}."


def _changed(random: Random, product: Product) -> Task:
    place = random.randrange(1, len(product.pairs))
    key = product.pairs[place][0]
    pairs = list(product.pairs)
    if random.random() < 0.3:
        del pairs[place]
        return f"Remove the {key}. {product.src}", Product(tuple(pairs)).src
    pairs[place] = (key, random.choice(VALUES[key]))
    return f"Change the {key} to {pairs[place][1]}. {product.src}", Product(tuple(pairs)).src


def _parsed(_: Random, product: Product) -> Task:
    ordered = Product(tuple((key, value) for key in KEYS if (value := product.get(key))))
    return f"Write the attributes. {describe(ordered)}", ordered.src


def _placed(random: Random, product: Product) -> Task:
    forms = product.forms()
    place, owner = random.choice(PLACES), random.choice(OWNERS)
    if random.random() < 0.5:
        return f"Where {forms['is']} {forms['it']}? {product.src}*place#{place}", (
            f"{forms['This']} {product.name} {forms['is']} {place}."
        )
    return (
        f"Who has {forms['it']}? {product.src}*owner#{owner}",
        f"{owner} has {forms['this']} {product.name}.",
    )


def _fact(random: Random, key: str, value: str) -> str:
    """One plain sentence about a style, a material or a part: ``The soft cotton is kind to the skin.``"""
    if key == "style":
        return f"The {value} style is {random.choice(STYLE_FACTS[value])}."
    return f"{capital(random.choice(FABRICS[value] if key == 'material' else FEATURES[key, value]))}."


def _commented(random: Random, product: Product) -> Task:
    known = [(key, value) for key, value in product.pairs if key not in ("type", "color")]
    if not known:
        return _named(random, product)
    if random.random() < 0.5:
        key, value = random.choice(known)
        return f"Comment on the {key}. {product.src}", _fact(random, key, value)
    ordered = sorted(known, key=lambda pair: KEYS.index(pair[0]))
    facts = [_fact(random, key, value) for key, value in ordered if key != "style"]
    if style := product.get("style"):
        forms = product.forms()
        facts.insert(0, f"{forms['This']} {product.name} {forms['is']} {random.choice(STYLE_FACTS[style])}.")
    return f"Comment on all. {product.src}", " ".join(facts)


def _known(random: Random, _: Product) -> Task:
    if random.random() < 0.2:
        kind = random.choice(list(MATERIALS))
        material = random.choice(MATERIALS[kind])
        return f"What can the {kind} be made of?", f"The {kind} can be made of {material}."
    ask = random.choice(("What is {0} like?", "Tell me about {0}.", "What do you know of {0}?"))
    if random.random() < 0.5:
        material = random.choice(list(FABRICS))
        return ask.format(material), _fact(random, "material", material)
    style = random.choice(list(STYLE_FACTS))
    return ask.format(f"the {style} style"), _fact(random, "style", style)


def _chatted(random: Random, _: Product) -> Task:
    said, answer = random.choice(list(SMALL_TALK.items()))
    return said + random.choice(("", ".", "!", "?")), answer


def _everyday(random: Random, _: Product) -> Task:
    return everyday_task(random)


TASKS: dict[Callable[[Random, Product], Task], float] = {
    _described: 24,
    _commented: 16,
    _everyday: 16,
    _asked: 14,
    _listed: 10,
    _confirmed: 6,
    _named: 5,
    _changed: 5,
    _placed: 5,
    _parsed: 4,
    _known: 2,
    _counted: 1,
    _chatted: 1,
}


def plain_task(random: Random, held_out: frozenset[frozenset[tuple[str, str]]]) -> Task:
    """One (prompt, answer) pair; no product in it has the attributes of one in ``held_out``."""
    make = random.choices(list(TASKS), list(TASKS.values()))[0]
    product = draw(random, fewest=1, most=6, shuffle=0.2)
    while product.identity in held_out:
        product = draw(random, fewest=1, most=6, shuffle=0.2)
    return make(random, product)
