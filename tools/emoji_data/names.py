"""Turns emoji names into English phrases: "red heart" into "a red heart", "flag France" into "the flag of france"."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable

# Head nouns that take no article: masses, games and proper names.
_BARE = """
    rice bread broccoli bacon garlic ginger salt butter ice fire wood yarn thread sushi oden dango popcorn soap dna
    money luggage tennis badminton bowling lacrosse hockey pong spaghetti sake mate fog coral herb falafel clothes
    claus fuji polish racing meat food zzz
""".split()  # noqa: SIM905 (a word list reads better than 80 quoted lines)
_BARE_PHRASES = ("tokyo tower", "palms up together")
_THE = ("back of a raised hand", "milky way", "statue of liberty", "wheel of dharma", "kaaba")
# Endings of singular nouns that end in "s".
_SINGULAR_S = re.compile(r"(ss|us|(?<!sk)is|os|lens|gas|'s)$")
# After these beginnings a name states what the person does; the first word is the head noun.
_BEINGS = ("person", "man", "woman", "face", "cat")
_PLURAL_STARTS = ("men", "women", "people", "hands", "children", "two")
_CONSONANT_SOUND = re.compile(r"(uni|eu|ewe|one\b|one-|use|ufo)")
_VOWEL_SOUND = re.compile(r"([aeiou]|hour|x-ray|sos\b|ng\b|atm\b)")
_HEAD = re.compile(r" (?:with|without|of|in|on|at|from|behind|facing|and|over|holding|showing|for|by|under|meaning) ")
_SYMBOLS = {"&": "and", "!": "", "\u201c": "", "\u201d": "", "\u2019": "'"}

# Names that state the meaning of a sign.
_SIGNS = (
    *("potable water", "non-potable water", "water closet", "restroom", "men's room", "women's room", "customs"),
    *("passport control", "baggage claim", "left luggage", "warning", "no entry", "prohibited"),
    *("no bicycles", "no smoking", "no littering", "no pedestrians", "no mobile phones", "no one under eighteen"),
    *("radioactive", "biohazard", "wireless", "vibration mode", "mobile phone off", "multiply", "plus", "minus", "divide"),
    *("infinity", "om", "copyright", "registered", "trade mark", "information", "currency exchange", "cinema"),
    *("place of worship", "high voltage"),
)
_ZODIAC = (
    *("aries", "taurus", "gemini", "cancer", "leo", "virgo", "libra", "scorpio", "sagittarius", "capricorn", "aquarius"),
    *("pisces", "ophiuchus"),
)
_RENAMED = {
    "children crossing": "sign of children crossing",
    "dizzy": "dizzy star",
    "dashing away": "puff of air",
    "star-struck": "star-struck face",
    "rolling on the floor laughing": "face rolling on the floor laughing",
    "raised back of hand": "back of a raised hand",
    "selfie": "hand taking a selfie",
    "breast-feeding": "person breast-feeding a baby",
    "cooking": "egg frying in a pan",
    "pouring liquid": "glass pouring liquid",
    "camping": "campsite",
    "building construction": "building under construction",
    "construction": "construction barrier",
    "foggy": "foggy city",
    "wedding": "wedding chapel",
    "station": "train station",
    "light rail": "light rail train",
    "airplane departure": "departing airplane",
    "airplane arrival": "arriving airplane",
    "globe showing europe-africa": "globe showing europe and africa",
    "globe showing americas": "globe showing the americas",
    "globe showing asia-australia": "globe showing asia and australia",
    "hourglass done": "finished hourglass",
    "hourglass not done": "running hourglass",
    "performing arts": "pair of theater masks",
    "flag in hole": "golf flag in a hole",
    "joker": "joker card",
    "mahjong red dragon": "mahjong tile of the red dragon",
    "locked": "locked padlock",
    "unlocked": "unlocked padlock",
    "locked with pen": "locked padlock with a pen",
    "locked with key": "locked padlock with a key",
    "chart increasing": "rising chart",
    "chart decreasing": "falling chart",
    "chart increasing with yen": "rising chart with a yen sign",
    "input latin uppercase": "button for uppercase letters",
    "input latin lowercase": "button for lowercase letters",
    "input numbers": "button for numbers",
    "input symbols": "button for symbols",
    "input latin letters": "button for letters",
    "kiss woman, man": "woman and a man kissing",
    "kiss man, man": "two men kissing",
    "kiss woman, woman": "two women kissing",
    "couple with heart woman, man": "woman and a man with a heart",
    "couple with heart man, man": "two men with a heart",
    "couple with heart woman, woman": "two women with a heart",
    "woman and man holding hands": "woman and a man holding hands",
    "keycap #": "keycap with a hash",
    "keycap *": "keycap with an asterisk",
    "flag congo - kinshasa": "flag of congo kinshasa",
    "flag congo - brazzaville": "flag of congo brazzaville",
    "flag hong kong sar china": "flag of hong kong",
    "flag macao sar china": "flag of macao",
    "flag south georgia and south sandwich islands": "flag of south georgia and the south sandwich islands",
    "flag st. vincent and grenadines": "flag of st. vincent and the grenadines",
}
# Names omit the article after these words, as headlines do.
_BEFORE = "with|without|in|on|behind|getting|tipping|raising|taking|rowing|bouncing|wearing|feeding"
_COUNTED = (
    "halo|tear|diagonal mouth|open mouth|mouth|raised eyebrow|peeking eye|medical mask|thermometer|head-bandage|monocle|"
    "wry smile|speech bubble|arrow|ribbon|hearing aid|crown|skullcap|headscarf|veil|turban|white cane|tuxedo|suit|heart|"
    "steamy room|motorized wheelchair|manual wheelchair|massage|haircut|hand|bath|boat|ball|baby|bone|spoon|plate|swirl|"
    "handle|popping cork|straw|umbrella|garden|face|small cloud|large cloud|rain cloud|cloud|slash|flash|curl|ballot|"
    "decorative cover|raised flag|lowered flag|check"
)
_REWRITES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"(.* (?:from|on|under)) (nose|mouth|eyes)", r"\1 its \2"),
    (rf"(.+ (?:{_BEFORE})) ((?:{_COUNTED})(?![\w-]).*)", lambda m: f"{m[1]} {_a(m[2])}"),
    (r"(.*) and (hand over .*)", r"\1 and a \2"),
    (r"(.*hand over) mouth", r"\1 its mouth"),
    (r"(.* with) tongue", r"\1 its tongue out"),
    (r"(.* (?:in|on)) (wind|ground|lotus position)", r"\1 the \2"),
    (r"(.*)index pointing(.*)", r"\1index finger pointing\2"),
    (r"(.* o'clock|.*-thirty)", r"clock at \1"),
    (r"speaker (low|medium|high) volume", r"speaker at \1 volume"),
    (r"keycap (\d+)", r"keycap with the number \1"),
    (r"japanese (.*) button", r"japanese button meaning \1"),
    (r"([abop]|ab|cl|ng) button", lambda m: f"button with the letter{'s' * (len(m[1]) > 1)} {m[1]}"),
    (r"(black|white) (large|medium|medium-small|small) square", r"\2 \1 square"),
    (r"(man|woman|person) ((?:blond|red|curly|white) hair)", r"\1 with \2"),
    (r"(man|woman|person) beard", r"\1 with a beard"),
    (r"(man|woman|person) bald", r"bald \1"),
    # "man pilot", but neither "man running" nor "man in a tuxedo"
    (r"man (?!.*ing\b|in\b|with\b|and\b)(.*)", r"male \1"),
    (r"woman (?!.*ing\b|in\b|with\b|and\b)(.*)", r"female \1"),
]
_FLAGS_WITH_THE = re.compile(
    r"(?!heard).*\b(islands|territor(y|ies)|emirates|states|kingdom|union|nations|republic|netherlands)|"
    r"bahamas|gambia|maldives|philippines|seychelles|comoros|isle of man"
)
_PLURALS = {"man": "men", "woman": "women", "boy": "boys", "girl": "girls", "adult": "adults", "child": "children"}


def clean_name(name: str, category: str) -> str:
    """Turn the Unicode (CLDR) short name of an emoji into a lower-case noun phrase without brackets, quotes or symbols.

    `category`: category of the emoji, such as "flags".
    """
    name = re.sub(r"\s*\([^)]*\)", "", name)
    name = " ".join("".join(_SYMBOLS.get(c, c) for c in name).lower().split())
    if name in _RENAMED:
        return _RENAMED[name]
    if name in _SIGNS or name in _ZODIAC:
        return f"{name} {'zodiac ' if name in _ZODIAC else ''}sign"
    if category == "flags" and name.startswith("flag "):
        place = name.removeprefix("flag ")
        return f"flag of {'the ' if _FLAGS_WITH_THE.fullmatch(place) else ''}{place}"
    if name.startswith("family "):
        return "family of " + _listed(name.removeprefix("family ").split(", "))
    for pattern, rewritten in _REWRITES:
        if match := re.fullmatch(pattern, name):
            name = rewritten(match) if callable(rewritten) else match.expand(rewritten)
    return name


def with_article(concept: str) -> str:
    """Return a noun phrase with "a", "an" or "the", or without article for plurals, masses and proper names."""
    if concept in _THE or concept.startswith("flag of "):
        return f"the {concept}"
    words = _HEAD.split(concept)[0].split()
    head = words[0] if words[0] in _BEINGS else words[-1]
    plural = (head.endswith("s") and not _SINGULAR_S.search(head)) or words[0] in _PLURAL_STARTS
    return concept if head in _BARE or concept in _BARE_PHRASES or plural else _a(concept)


def slug(text: str) -> str:
    """Return the text as lower-case ASCII letters, digits and dashes: safe in a webdataset key (no dots)."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("'", "")).strip("-")


def captions(concept: str, style: str, category: str) -> list[str]:
    """Return the captions of an emoji in a style; evaluation uses the first one.

    `concept`: the emoji's noun phrase, as `clean_name` returns it. `category`: its category, such as "flags".
    """
    phrase = with_article(concept)
    return [
        f"{phrase}, {style} style",
        f"an emoji of {phrase} in {style} style",
        f"{style} icon: {concept}, {category}",
        f"{phrase} on a white background, drawn in {style} style",
    ]


def _a(phrase: str) -> str:
    vowel = _VOWEL_SOUND.match(phrase) and not _CONSONANT_SOUND.match(phrase)
    return f"{'an' if vowel else 'a'} {phrase}"


def _listed(members: Iterable[str]) -> str:
    """Return a list of persons as text, e.g. ["man", "boy", "boy"] as "a man and two boys"."""
    parts = [_a(who) if count == 1 else f"two {_PLURALS[who]}" for who, count in Counter(members).items()]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
