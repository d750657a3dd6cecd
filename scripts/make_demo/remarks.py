"""What there is to say about a material and about a part: clauses that either corpus puts into sentences."""

FABRICS = {
    "cotton": (
        "the soft cotton is kind to the skin",
        "breathable cotton keeps you fresh all day",
    ),
    "linen": (
        "airy linen stays cool under the sun",
        "the linen breathes with every breeze",
    ),
    "silk": (
        "smooth silk catches the light with every move",
        "the silk glides over the skin like water",
    ),
    "denim": (
        "sturdy denim gets better with every wear",
        "the denim is tough, honest and built to last",
    ),
    "flannel": (
        "brushed flannel keeps you snug",
        "the flannel feels as warm as a fireside",
    ),
    "chiffon": (
        "floating chiffon dances with every step",
        "the chiffon is as light as air",
    ),
    "lace": (
        "delicate lace plays with light and shadow",
        "fine lace shows the art in every thread",
    ),
    "velvet": (
        "plush velvet glows in the evening light",
        "the velvet is deep, soft and rich to the touch",
    ),
    "leather": (
        "supple leather grows richer with every year",
        "the leather is strong, smooth and full of character",
    ),
    "wool": (
        "warm wool holds the cold at bay",
        "cozy wool keeps the winter outside",
    ),
    "cashmere": (
        "fine cashmere feels like a gentle hug",
        "the cashmere is warm, light and endlessly soft",
    ),
    "suede": (
        "soft suede invites your touch",
        "the suede adds warmth and depth",
    ),
    "corduroy": (
        "soft ridges of corduroy add depth and comfort",
        "the corduroy feels warm and full of character",
    ),
    "fleece": (
        "fluffy fleece keeps the chill away",
        "the fleece is as soft as a cloud",
    ),
    "canvas": (
        "strong canvas is ready for every adventure",
        "sturdy canvas takes every trip in its stride",
    ),
    "straw": (
        "woven straw brings the sunshine along",
        "natural straw smells of holidays by the sea",
    ),
}

FEATURES = {
    ("pattern", "striped"): ("crisp stripes add rhythm", "the stripes keep the look lively"),
    ("pattern", "checked"): ("neat checks add character", "the checks bring a friendly touch"),
    ("pattern", "floral"): ("the flowers bloom like a spring garden", "floral notes bring the garden along"),
    ("pattern", "dotted"): ("playful dots add a smile", "the dots dance with joy"),
    ("pattern", "plain"): ("the plain finish goes with everything", "the plain surface keeps the look pure"),
    ("fit", "loose"): ("the loose cut gives you room to move", "the loose fit falls with ease"),
    ("fit", "slim"): ("the slim cut follows your shape", "the slim fit draws a long, clean line"),
    ("fit", "straight"): ("the straight cut falls in a clean line", "the straight fit flatters every shape"),
    ("fit", "relaxed"): ("the relaxed cut feels free all day", "the relaxed fit never holds you back"),
    ("neck", "round"): ("the round neck frames your face softly", "the round neck keeps the look gentle"),
    ("neck", "high"): ("the high neck draws a proud line", "the high neck adds a graceful touch"),
    ("neck", "square"): ("the square neck adds a graceful frame", "the square neck opens the look"),
    ("sleeve", "long"): ("long sleeves finish the look", "the long sleeves add comfort"),
    ("sleeve", "short"): ("short sleeves keep things breezy", "the short sleeves welcome the sun"),
    ("detail", "pockets"): ("handy pockets carry the little things", "the pockets keep your hands free"),
    ("detail", "buttons"): ("polished buttons add a neat finish", "the buttons shine like small jewels"),
    ("detail", "belt"): ("the belt shapes the waist", "a neat belt brings it all together"),
    ("detail", "hood"): ("the hood is there when the wind picks up", "a roomy hood shuts out the rain"),
    ("detail", "zipper"): ("the zipper adds a quick, bold line", "a smooth zipper saves you time"),
    ("detail", "pleats"): ("the pleats swing with every step", "crisp pleats add movement"),
    ("detail", "ruffles"): ("the ruffles add a playful touch", "gentle ruffles move like waves"),
    ("detail", "embroidery"): (
        "fine embroidery rewards a closer look",
        "the embroidery tells a story by hand",
    ),
    ("detail", "fringe"): ("the fringe swings with every step", "a lively fringe adds movement"),
    ("detail", "ribbon"): ("the ribbon adds a sweet finish", "a neat ribbon brings it all together"),
    ("detail", "strap"): ("the strap sits lightly on your shoulder", "a long strap keeps your hands free"),
    ("detail", "laces"): ("the laces hold firm with every step", "sturdy laces keep you steady"),
}
