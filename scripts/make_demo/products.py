"""Products and their attributes: what there is, what goes together, how a sentence names it."""

from dataclasses import dataclass
from random import Random

KEYS = ("type", "color", "material", "style", "pattern", "fit", "neck", "sleeve", "detail")

COLORS = (
    "black", "white", "gray", "navy", "blue", "red", "green", "olive", "brown", "beige", "cream", "pink",
    "yellow", "orange", "purple",
)  # fmt: skip
STYLES = ("casual", "elegant", "classic", "sporty", "vintage", "modern", "romantic", "minimal")
PATTERNS = ("striped", "checked", "floral", "dotted", "plain")
FITS = ("loose", "slim", "straight", "relaxed")
NECKS = ("round", "high", "square")
SLEEVES = ("long", "short")

MATERIALS = {
    "shirt": ("cotton", "linen", "silk", "flannel", "denim"),
    "blouse": ("cotton", "linen", "silk", "chiffon", "lace"),
    "dress": ("cotton", "linen", "silk", "chiffon", "velvet", "lace"),
    "skirt": ("cotton", "denim", "leather", "wool", "silk", "velvet", "corduroy"),
    "coat": ("wool", "cashmere", "leather", "cotton"),
    "jacket": ("denim", "leather", "wool", "velvet", "suede", "corduroy"),
    "sweater": ("wool", "cashmere", "cotton"),
    "cardigan": ("wool", "cashmere", "cotton"),
    "hoodie": ("cotton", "fleece"),
    "vest": ("wool", "fleece", "denim", "corduroy"),
    "scarf": ("wool", "cashmere", "silk", "cotton"),
    "hat": ("wool", "straw", "cotton", "corduroy"),
    "bag": ("leather", "canvas", "suede", "straw"),
    "trousers": ("wool", "linen", "cotton", "corduroy", "velvet"),
    "jeans": ("denim",),
    "shorts": ("cotton", "linen", "denim"),
    "shoes": ("leather", "suede", "canvas"),
    "boots": ("leather", "suede"),
    "gloves": ("leather", "wool", "cashmere", "suede"),
}
TYPES = tuple(MATERIALS)
PLURAL = frozenset({"trousers", "jeans", "shorts", "shoes", "boots", "gloves"})
PATTERNED = frozenset(
    {
        "shirt",
        "blouse",
        "dress",
        "skirt",
        "coat",
        "sweater",
        "cardigan",
        "scarf",
        "trousers",
        "shorts",
        "vest",
    }
)
PRINTABLE = frozenset({"cotton", "linen", "silk", "flannel", "chiffon", "wool", "cashmere"})
FITTED = frozenset(
    {"shirt", "blouse", "dress", "coat", "jacket", "sweater", "hoodie", "trousers", "jeans", "shorts", "vest"}
)
NECKED = frozenset({"blouse", "dress", "sweater"})
SLEEVED = frozenset({"shirt", "blouse", "dress", "sweater"})
DETAILS = {
    "shirt": ("buttons", "embroidery"),
    "blouse": ("buttons", "ruffles", "embroidery"),
    "dress": ("belt", "pleats", "ruffles", "embroidery", "pockets"),
    "skirt": ("pleats", "buttons", "pockets", "belt", "zipper"),
    "coat": ("belt", "pockets", "buttons", "hood"),
    "jacket": ("pockets", "zipper", "buttons"),
    "sweater": ("embroidery", "buttons"),
    "cardigan": ("buttons", "pockets", "embroidery"),
    "hoodie": ("hood", "zipper", "pockets"),
    "vest": ("pockets", "buttons", "zipper"),
    "scarf": ("embroidery", "fringe"),
    "hat": ("ribbon", "embroidery"),
    "bag": ("strap", "zipper", "pockets", "fringe"),
    "trousers": ("pockets", "pleats", "belt"),
    "jeans": ("pockets", "buttons", "embroidery"),
    "shorts": ("pockets", "belt", "pleats"),
    "shoes": ("laces", "embroidery"),
    "boots": ("laces", "zipper", "fringe"),
    "gloves": ("buttons", "embroidery"),
}
VALUES: dict[str, tuple[str, ...]] = {
    "type": TYPES,
    "color": COLORS,
    "material": tuple(sorted({material for group in MATERIALS.values() for material in group})),
    "style": STYLES,
    "pattern": PATTERNS,
    "fit": FITS,
    "neck": NECKS,
    "sleeve": SLEEVES,
    "detail": tuple(sorted({detail for group in DETAILS.values() for detail in group})),
}


def article(words: str) -> str:
    """``words`` behind its indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def capital(text: str) -> str:
    """``text`` with a capital first letter."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Product:
    """One product: its (key, value) pairs in the order in which they are written."""

    pairs: tuple[tuple[str, str], ...]

    def get(self, key: str) -> str | None:
        """The value under ``key``, or None."""
        return dict(self.pairs).get(key)

    @property
    def src(self) -> str:
        """The product in the advertisement format, ``type#shirt*color#blue``."""
        return "*".join(f"{key}#{value}" for key, value in self.pairs)

    @property
    def identity(self) -> frozenset[tuple[str, str]]:
        """The attributes without their order."""
        return frozenset(self.pairs)

    @property
    def plural(self) -> bool:
        """Whether the noun is a plural, as in ``jeans``."""
        return self.get("type") in PLURAL

    @property
    def name(self) -> str:
        """Color, material and type, as in ``blue cotton shirt``."""
        return " ".join(value for key in ("color", "material", "type") if (value := self.get(key)))

    def forms(self) -> dict[str, str]:
        """The words that agree with this product in number, for ``str.format_map``."""
        many = self.plural
        words = {
            "n": self.get("type") or "",
            "np": self.name,
            "this": "these" if many else "this",
            "a_np": f"a pair of {self.name}" if many else article(self.name),
            "it": "they" if many else "it",
            "them": "them" if many else "it",
            "its": "their" if many else "its",
            "s": "" if many else "s",
            "es": "" if many else "es",
            "is": "are" if many else "is",
            "has": "have" if many else "has",
        }
        return words | {f"{key[0].upper()}{key[1:]}": capital(words[key]) for key in ("this", "a_np", "it")}


def draw(random: Random, *, fewest: int = 1, most: int = 6, shuffle: float = 0.0) -> Product:
    """A product whose attributes go together, with ``fewest`` to ``most`` attributes beside its type."""
    kind = random.choice(TYPES)
    material = random.choice(MATERIALS[kind])
    offers = {"color": random.choice(COLORS), "material": material, "style": random.choice(STYLES)}
    extras = {}
    if kind in PATTERNED and material in PRINTABLE:
        extras["pattern"] = random.choice(PATTERNS)
    if kind in FITTED:
        extras["fit"] = random.choice(FITS)
    if kind in NECKED:
        extras["neck"] = random.choice(NECKS)
    if kind in SLEEVED:
        extras["sleeve"] = random.choice(SLEEVES)
    extras["detail"] = random.choice(DETAILS[kind])
    count = random.randint(fewest, most)
    kept = random.sample(sorted(offers), min(count, len(offers)))
    kept += random.sample(sorted(extras), min(count - len(kept), len(extras)))
    everything = offers | extras
    pairs = [(key, everything[key]) for key in KEYS if key in kept]
    if random.random() < shuffle:
        random.shuffle(pairs)
    return Product((("type", kind), *pairs))
