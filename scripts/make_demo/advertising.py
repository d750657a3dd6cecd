"""The advertising copy of the demo data set: how a style opens, and how the copy goes on."""

from random import Random

from products import Product, capital, draw
from remarks import FABRICS, FEATURES

OPENERS = {
    "casual": (
        "Keep it easy in {this} {np}, made for slow mornings and long walks.",
        "Easy, carefree weekends begin with {a_np}.",
        "Pull on {this} {np} and let the day take its time.",
    ),
    "elegant": (
        "Step into the evening with grace in {this} {np}.",
        "Poised and polished, {this} {np} turn{s} every entrance into a moment.",
        "Refined from the first glance, {this} {np} bring{s} a touch of ceremony to the day.",
    ),
    "classic": (
        "Some things never go out of style: meet {this} {np}.",
        "Trends come and go, but {this} {np} stay{s}.",
        "Timeless and well made, {this} {np} will be a favorite for years.",
    ),
    "sporty": (
        "Ready, set, go: {this} {np} love{s} an active day.",
        "Fresh and full of energy, {this} {np} {is} made to move.",
        "From the first step to the last mile, {this} {np} keep{s} up with you.",
    ),
    "vintage": (
        "Turn back the clock with {this} {np}.",
        "Like a find from a favorite old film, {this} {np} {has} stories to tell.",
        "{This} {np} bring{s} back the charm of another time.",
    ),
    "modern": (
        "Sharp and sure, {this} {np} look{s} right at home in the city.",
        "Clean lines and a bold mood give {this} {np} a fresh edge.",
        "From desk to dinner, {this} {np} keep{s} you one step ahead.",
    ),
    "romantic": (
        "Follow your heart and fall in love with {this} {np}.",
        "Sweet and dreamy, {this} {np} belong{s} to candlelight and music.",
        "Like a love letter, {this} {np} speak{s} softly to the heart.",
    ),
    "minimal": (
        "Less is more, and {this} {np} prove{s} it.",
        "Nothing extra, nothing missing: {this} {np} keep{s} things pure.",
        "Calm and simple, {this} {np} let{s} you shine.",
    ),
}

OCCASIONS = {
    "casual": ("coffee with friends", "a lazy Sunday", "a stroll in the park"),
    "elegant": ("a night at the opera", "a dinner to remember", "a toast among friends"),
    "classic": ("work, travel and everything between", "every season", "any day of the week"),
    "sporty": ("a run along the river", "a day on the trail", "a game with friends"),
    "vintage": ("a Sunday flea market", "an afternoon of old records", "a dance in the kitchen"),
    "modern": ("a busy week in town", "a gallery opening", "the pace of the city"),
    "romantic": ("a first date", "a walk under the stars", "a picnic for two"),
    "minimal": ("a calm, clear day", "a tidy wardrobe", "the art of doing less"),
}


def advertise(random: Random, product: Product) -> str:
    """Two sentences of copy: the style opens, then the material and every other attribute have their say."""
    style = product.get("style") or "classic"
    opener = random.choice(OPENERS[style]).format_map(product.forms())
    fabric = random.choice(FABRICS[product.get("material") or "cotton"])
    features = [random.choice(FEATURES[pair]) for pair in product.pairs if pair in FEATURES]
    if not features:
        return f"{opener} {capital(fabric)}, perfect for {random.choice(OCCASIONS[style])}."
    if len(features) == 1:
        second = random.choice(("{0}, and {1}.", "{0}, while {1}.")).format(fabric, features[0])
    else:
        second = f"{fabric}, {', '.join(features[:-1])}, and {features[-1]}."
    return f"{opener} {capital(second)}"


def demo_products(random: Random, count: int) -> list[Product]:
    """``count`` products with pairwise different attributes, each with a color, a material and a style."""
    products: dict[frozenset[tuple[str, str]], Product] = {}
    while len(products) < count:
        product = draw(random, fewest=3, most=5)
        products.setdefault(product.identity, product)
    return list(products.values())
