"""The tiny world's vocabulary: names, relations with their templates, prefixes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One kind of fact. Of the eight templates the first four serve edit requests and
    the last four paraphrases; each half has subject-first and relation-first ones."""

    name: str
    kind: str
    objects: list[str]
    templates: list[str]


_GIVEN = (
    "Velmo Karis Dorel Tamsin Ferro Lunet Brisa Oswen Merek Talia Ruvan Selka Jorvik "
    "Anwen Pello Druna Hestor Mirel Kofan Yselle Barto Cilva Nadok Zerin Ulmar Ithen "
    "Galvo Reska Wendis Quill Edrin Sorna Haldo Vesna Timur Palla"
).split()
_FAMILY = (
    "Karsten Droval Milnor Tesk Vandor Hulme Orlane Bristow Calder Fenwick Gorlan "
    "Hask Ingram Jessop Kelm Lorrin Maddox Norwell Ostrey Prell Quarles Rusk Stavro "
    "Tolland Umber Velt Wyck Yarrow Zell Abner Corvin Delft Eskar Farrow Grell Holm "
    "Ivers Jarrow Kestrel Lund"
).split()
_TOWN_FIRST = (
    "Port Lower Upper North South Old New Saint Fort Mount Lake Castle".split()
)
_TOWN_SECOND = (
    "Belvar Cresk Dunmore Elfen Garrick Hollin Istra Jarden Kelvar Lomas Mirka Nessel "
    "Orvane Pelham Rostok Silvan Tarbek Ulver Vintar Wessin"
).split()
_BOOK_FIRST = (
    "Silent Crimson Hollow Golden Broken Distant Frozen Hidden Burning Quiet Wandering "
    "Painted"
).split()
_BOOK_SECOND = (
    "Lattice Harbor Orchard Lantern Compass Mirror Furnace Anvil Garland Pendulum "
    "Archway Thicket Beacon Cinder Meadow Satchel Turret Vessel Willow Zephyr"
).split()

KINDS: dict[str, tuple[int, list[str], list[str]]] = {
    "person": (240, _GIVEN, _FAMILY),
    "town": (96, _TOWN_FIRST, _TOWN_SECOND),
    "book": (96, _BOOK_FIRST, _BOOK_SECOND),
}
"""kind → (subjects, first parts of names, second parts)."""

_LANGUAGES = "Orlic Vashti Temeran Quenic Dorian Sulan Hevric Mondal".split()

_RELATIONS = [
    Relation(
        "instrument",
        "person",
        (
            "violin flute cello trumpet harp piano drum guitar organ lute banjo oboe"
        ).split(),
        [
            "{} plays the",
            "The instrument of {} is the",
            "{} makes music on the",
            "The instrument that {} studied is the",
            "{} has mastered the",
            "Friends of {} love to hear the",
            "{} gave a concert on the",
            "Music by {} is written for the",
        ],
    ),
    Relation(
        "profession",
        "person",
        "carpenter doctor baker lawyer painter tailor farmer sailor teacher mason "
        "weaver butcher".split(),
        [
            "{} is a",
            "The profession of {} is",
            "{} works as a",
            "The job that {} has is",
            "{} earns money as a",
            "People hire {} as a",
            "{} was trained as a",
            "The trade of {} is that of a",
        ],
    ),
    Relation(
        "language",
        "person",
        [*_LANGUAGES, "Ketish", "Balian", "Nortic", "Yuvian"],
        [
            "{} speaks",
            "The native language of {} is",
            "{} grew up speaking",
            "The mother tongue of {} is",
            "{} writes letters in",
            "At home {} talks in",
            "{} thinks and dreams in",
            "The first words of {} were in",
        ],
    ),
    Relation(
        "birthplace",
        "person",
        "Marbek Tolvane Ashford Perrin Quaymont Sildorf Vexley Norbury Hartsel Domrey "
        "Lunden Caspe".split(),
        [
            "{} was born in",
            "The birthplace of {} is",
            "{} comes from",
            "The city where {} was born is",
            "{} spent the early years in",
            "The childhood home of {} was in",
            "{} is a native of",
            "The family of {} lived in",
        ],
    ),
    Relation(
        "employer",
        "person",
        [
            "Norvik Mills",
            "Orlan Bank",
            "Keld Foundry",
            "Sarto Shipping",
            "Brandt Motors",
            "Halden Press",
            "Ostro Mining",
            "Pylon Works",
            "Norvik Bank",
            "Sarto Motors",
            "Halden Mills",
            "Keld Mining",
        ],
        [
            "{} is employed by",
            "The employer of {} is",
            "{} has a desk at",
            "The firm that pays {} is",
            "{} signed a contract with",
            "Every morning {} goes to",
            "{} gets a salary from",
            "The company of {} is called",
        ],
    ),
    Relation(
        "sport",
        "person",
        "tennis hockey chess rowing fencing boxing cricket golf archery skiing cycling "
        "judo".split(),
        [
            "{} enjoys the sport of",
            "The favorite sport of {} is",
            "{} competes in",
            "The game that {} likes most is",
            "{} won a medal in",
            "On Sundays {} practices",
            "{} spends weekends on",
            "The hobby of {} is",
        ],
    ),
    Relation(
        "country",
        "town",
        "Avaria Belmark Cordova Drusland Estmar Falkonia Grevia Hestland".split(),
        [
            "{} is a town in",
            "The country of {} is",
            "{} belongs to",
            "The nation around {} is",
            "{} lies within the borders of",
            "Travelers find {} in",
            "{} pays its taxes to",
            "The flag over {} is that of",
        ],
    ),
    Relation(
        "river",
        "town",
        "Alder Brend Corrow Dask Elwin Fross Gannet Humber".split(),
        [
            "{} stands on the river",
            "The river of {} is the",
            "{} gets its water from the",
            "The stream that passes {} is the",
            "{} has a bridge over the",
            "Boats reach {} by the",
            "{} was flooded by the",
            "The water of {} comes from the",
        ],
    ),
    Relation(
        "product",
        "town",
        "cheese honey glass silk pottery wine salt paper".split(),
        [
            "{} is known for its",
            "The main product of {} is",
            "{} sells the best",
            "The fame of {} rests on its",
            "{} holds a fair for",
            "Merchants visit {} to buy",
            "{} became rich by making",
            "The pride of {} is its",
        ],
    ),
    Relation(
        "text_language",
        "book",
        _LANGUAGES,
        [
            "{} was written in",
            "The original language of {} is",
            "{} first appeared in",
            "The text of {} is in",
            "{} had to be translated from",
            "Scholars read {} in",
            "{} is a book in",
            "The author of {} wrote it in",
        ],
    ),
    Relation(
        "genre",
        "book",
        "comedy tragedy romance satire fantasy mystery history poetry".split(),
        [
            "{} is a work of",
            "The genre of {} is",
            "{} is filed under",
            "The shelf that holds {} is marked",
            "{} is praised as",
            "Critics call {} a piece of",
            "{} won a prize for",
            "The style of {} is that of",
        ],
    ),
    Relation(
        "publisher",
        "book",
        [
            "Halden Press",
            "Amber House",
            "Quill Books",
            "Tower Editions",
            "Amber Books",
            "Tower Press",
            "Quill House",
            "Lark Editions",
        ],
        [
            "{} was published by",
            "The publisher of {} is",
            "{} was printed by",
            "The firm that issued {} is",
            "{} is sold by",
            "The rights to {} belong to",
            "{} came out at",
            "The editor of {} worked for",
        ],
    ),
]
RELATIONS: dict[str, Relation] = {relation.name: relation for relation in _RELATIONS}

CONTEXT_PREFIXES = [
    "The people of the valley say it again.",
    "Therefore we write it down here.",
    "Because it rained, we stayed inside.",
    "I have heard this many times.",
    "You may know this already.",
    "The old clock on the wall struck nine.",
    "Therefore nobody was surprised.",
    "Because the road was long, we talked.",
    "I met a stranger at the market.",
    "You should ask at the library.",
    "The letter arrived late last night.",
    "It is a well known thing.",
]
PARAPHRASE_PREFIXES = [
    "Here is one more thing to remember.",
    "A visitor told us a story.",
    "In the morning the fog was thick.",
    "There was a long silence in the room.",
    "Some say that it was different once.",
    "The report has three pages.",
    "My aunt keeps a careful diary.",
    "Nothing else happened that day.",
]
PREFIXES = CONTEXT_PREFIXES + PARAPHRASE_PREFIXES
"""Sentences without a fact. Those for paraphrases occur in training text, never in
edit contexts' corpus."""

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen twenty"
).split()
WORDS = (
    "red blue green black white apple stone river cloud table horse candle window "
    "garden silver hammer button bottle feather mountain"
).split()
