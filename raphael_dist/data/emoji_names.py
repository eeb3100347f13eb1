"""Emoji names into English phrases: "red heart" -> "a red heart", "flag France" -> "the flag of france"."""

import re
import unicodedata

# Head nouns that take no article: masses, games, signs of the zodiac and other proper names.
_BARE = """
    rice bread broccoli bacon garlic ginger salt butter ice fire wood yarn thread sushi oden dango popcorn soap dna
    money luggage tennis badminton bowling baseball softball volleyball basketball lacrosse hockey pong spaghetti sake
    mate fog infinity cooking camping construction food coral herb falafel clothes claus fuji breast-feeding selfie
    aries taurus gemini cancer leo virgo libra scorpio sagittarius capricorn aquarius pisces ophiuchus polish racing
    foggy locked unlocked zzz radioactive biohazard customs star-struck multiply divide plus minus dizzy voltage away
""".split()  # noqa: SIM905 (a word list reads better than 80 quoted lines)
_BARE_PHRASES = (
    *("american football", "rugby football", "hair pick", "flag in hole", "tokyo tower", "palms up together"),
    "rolling on the floor laughing",
)
_THE = ("milky way", "statue of liberty", "wheel of dharma", "kaaba")
# These end in "s" but are one thing.
_SINGULAR_S = re.compile(r"(ss|us|(?<!sk)is|os|lens|gas|'s)$")
# Names that begin with these go on with what the person does; the first word is the head noun.
_BEINGS = ("person", "man", "woman", "face", "cat")
_PEOPLE = ("men", "women", "people", "hands", "children")
_CONSONANT_SOUND = re.compile(r"(uni|eu|ewe|one\b|one-|use|ufo)")
_VOWEL_SOUND = re.compile(r"([aeiou]|hour|x-ray|sos\b|ng\b|atm\b)")
_HEAD = re.compile(r" (?:with|without|of|in|on|at|from|behind|facing|and|over|holding|showing|for|by) ")
_SYMBOLS = {"#": "hash", "*": "asterisk", "&": "and", "!": "", "\u201c": "", "\u201d": "", "\u2019": "'"}


def clean_name(name: str, category: str) -> str:
    """Return a CLDR short name as a lower-case noun phrase without brackets, quotes or bare symbols."""
    name = re.sub(r"\s*\([^)]*\)", "", name)
    name = " ".join("".join(_SYMBOLS.get(c, c) for c in name).lower().split())
    if category == "flags" and name.startswith("flag "):
        return "flag of " + name.removeprefix("flag ")
    if match := re.fullmatch(r"(man|woman|person) (bald|beard|(?:blond|red|curly|white) hair)", name):
        who, trait = match.groups()
        return f"bald {who}" if trait == "bald" else f"{who} with {'a ' if trait == 'beard' else ''}{trait}"
    if name.startswith("family "):
        return "family of " + name.removeprefix("family ").replace(", ", " and ")
    return name


def with_article(concept: str) -> str:
    """Return the concept with "a", "an", "the", or nothing before plurals, masses and proper names."""
    if concept in _THE or concept.startswith("flag of "):
        return f"the {concept}"
    words = _HEAD.split(concept)[0].split()
    head = words[0] if words[0] in _BEINGS else words[-1]
    plural = (head.endswith("s") and not _SINGULAR_S.search(head)) or words[0] in _PEOPLE
    if head in _BARE or concept in _BARE_PHRASES or plural:
        return concept
    vowel = _VOWEL_SOUND.match(concept) and not _CONSONANT_SOUND.match(concept)
    return f"{'an' if vowel else 'a'} {concept}"


def slug(text: str) -> str:
    """Return the text as lower-case ASCII letters, digits and dashes: safe in a webdataset key (no dots)."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("'", "")).strip("-")


def captions(concept: str, style: str, category: str) -> list[str]:
    """Return the captions of one sample; the first is the canonical one."""
    phrase = with_article(concept)
    return [
        f"{phrase}, {style} style",
        f"an emoji of {phrase} in {style} style",
        f"{style} icon: {concept}, {category}",
        f"{phrase} on a white background, drawn in {style} style",
    ]
