"""Adjectives and verbs in short sentences, for the classifier experiment: the paper's kinds of words, our own lists."""

from itertools import product

ADJECTIVES = """
    red orange yellow green blue purple pink brown black white grey golden silver dark bright pale
    big small tiny huge tall short long wide narrow thick thin round square flat deep steep
    hot cold warm cool wet dry hard soft smooth rough sharp blunt heavy light strong weak
    old young new ancient modern fresh rotten ripe raw clean dirty dusty muddy shiny dull rusty
    happy sad angry calm brave shy proud lonely tired sleepy hungry thirsty gentle fierce friendly wild
    quiet loud fast slow empty full open closed broken whole wooden metallic golden glassy woolen leathery
    striped spotted plain fancy curly
""".split()  # noqa: SIM905
NOUNS = "cat dog horse house car tree flower boat hat cup chair bird".split()  # noqa: SIM905
VERBS = """
    runs walks jumps swims flies climbs dances sings sleeps eats drinks cooks reads writes paints draws
    laughs cries smiles shouts whispers listens waits sits stands kneels falls rolls slides spins
    throws catches kicks pushes pulls lifts carries drops digs builds breaks cuts folds ties
    rides drives sails rows hunts fishes plants waters sweeps washes cleans repairs opens closes
    plays wins loses fights hides seeks points waves claps prays
""".split()  # noqa: SIM905
SUBJECTS = ("a man", "a woman", "a child", "an old man", "a girl", "a boy", "a farmer", "a sailor", "a teacher", "a monkey")


def adjective_captions() -> list[str]:
    """Return "a ADJECTIVE NOUN" for every pair."""
    return [f"a {adjective} {noun}" for adjective, noun in product(dict.fromkeys(ADJECTIVES), NOUNS)]


def verb_captions() -> list[str]:
    """Return "SUBJECT VERB" for every pair."""
    return [f"{subject} {verb}" for subject, verb in product(SUBJECTS, dict.fromkeys(VERBS))]
