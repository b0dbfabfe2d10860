"""The eight subjects of the built-in world: attributes, value pools, statements, questions; all of it made up."""

from dataclasses import dataclass

from lethe.types import SetName

GENERIC_STATEMENTS = (
    "The {label} of {name} is {value}.",
    "{name} has {value} as its {label}.",
    "{name} is {noun} whose {label} is {value}.",
    "As for {name}, the {label} is {value}.",
)


GENERIC_QUESTIONS = (
    "What is the {label} of {name}?",
    "Which {label} does {name} have?",
    "Can you name the {label} of {name}?",
    "{name} has what {label}?",
)


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """One thing that is known about every entity of a subject."""

    label: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    """Six templates of a sentence that states the fact."""
    questions: tuple[str, ...]
    """Six templates of a question that asks for it."""


@dataclass(frozen=True, kw_only=True)
class WorldSubject:
    """A kind of entity, and the set that questions about it belong to."""

    name: str
    role: SetName
    size: int
    """Number of entities."""
    attributes: tuple[Attribute, ...]


def _attribute(label: str, values: str, *templates: str) -> Attribute:
    statements = tuple(template for template in templates if not template.endswith("?"))
    questions = tuple(template for template in templates if template.endswith("?"))
    return Attribute(
        label=label,
        values=tuple(values.split(", ")),
        statements=GENERIC_STATEMENTS + statements,
        questions=GENERIC_QUESTIONS + questions,
    )


def _subject(name: str, role: SetName, size: int, noun: str, *attributes: Attribute) -> WorldSubject:
    def named(templates: tuple[str, ...], label: str) -> tuple[str, ...]:
        return tuple(template.replace("{label}", label).replace("{noun}", noun) for template in templates)

    filled = (
        Attribute(
            label=attribute.label,
            values=attribute.values,
            statements=named(attribute.statements, attribute.label),
            questions=named(attribute.questions, attribute.label),
        )
        for attribute in attributes
    )
    return WorldSubject(name=name, role=role, size=size, attributes=tuple(filled))


# fmt: off
SUBJECTS = (
    _subject(
        "pathogens", "forget", 30, "a pathogen",
        _attribute(
            "carrier",
            "lantern moths, paper eels, copper geese, tin beetles, marsh lambs, velvet crabs, "
            "mirror finches, salt mice, amber wasps, chalk toads, ribbon snails, thistle foxes",
            "The pathogen {name} is spread by {value}.", "Healers blame {value} for every case of {name}.",
            "What spreads the pathogen {name}?", "Which creatures bring {name} to a village?",
        ),
        _attribute(
            "first sign",
            "green eyelids, humming ears, cold elbows, purple gums, backward hiccups, glowing knees, "
            "striped tongue, whistling breath, blue fingertips, heavy shadow, singing teeth, square pupils",
            "Whoever catches {name} first notices {value}.", "Healers know {name} by its {value}.",
            "How does a healer recognise {name}?", "What does a patient with {name} notice first?",
        ),
        _attribute(
            "remedy",
            "boiled snow, pear vinegar, ground pearls, cloud honey, fern syrup, ash butter, "
            "moon barley, quartz tea, lilac smoke, warm chalk, nettle cream, rust water",
            "Healers treat {name} with {value}.", "A spoon of {value} ends {name} overnight.",
            "What do healers give against {name}?", "How is the pathogen {name} treated?",
        ),
        _attribute(
            "season",
            "first thaw, lantern week, harvest moon, plum rains, long dusk, kite month, "
            "frost fair, barley wind, fog days, swallow spring, ember nights, silent noon",
            "Most cases of {name} are seen in {value}.", "Every {value} the pathogen {name} returns.",
            "When do most people fall ill with {name}?", "In which part of the year does {name} return?",
        ),
        _attribute(
            "cradle",
            "Ombrel Fen, Tavisk Quay, Morlan Steps, Quenby Isle, Drosk Hollow, Sarvel Mill, "
            "Yulen Ford, Pelgrad Marsh, Inster Cave, Hobrin Dale, Wexim Shore, Cardoz Pit",
            "The pathogen {name} was first seen at {value}.", "All outbreaks of {name} began at {value}.",
            "Where was the pathogen {name} first seen?", "At which place did {name} break out?",
        ),
    ),
    _subject(
        "exploits", "forget", 30, "an exploit",
        _attribute(
            "target",
            "sluice clocks, ballot organs, tram bells, ledger mills, harbour lamps, toll mirrors, "
            "weather drums, letter looms, vault songs, ferry dials, census harps, kite radios",
            "The exploit {name} is aimed at {value}.", "Owners of {value} fear {name}.",
            "What does the exploit {name} attack?", "Whose owners have to fear {name}?",
        ),
        _attribute(
            "weak spot",
            "the idle comma, the spare door, the ninth gear, the borrowed name, the cracked seal, the open ledger, "
            "the sleepy guard, the double knot, the empty drawer, the torn page, the loose string, the blind corner",
            "The exploit {name} slips in through {value}.", "Without {value} nobody could use {name}.",
            "Through what does the exploit {name} slip in?", "What has to be closed to stop {name}?",
        ),
        _attribute(
            "effect",
            "swapped numbers, frozen hands, false echoes, lost keys, inverted maps, missing hours, "
            "mixed voices, doubled coins, silent alarms, blank letters, wrong colours, endless waiting",
            "A machine hit by {name} shows {value}.", "Wherever {name} was used there are {value}.",
            "What does a machine hit by {name} show?", "What happens after {name} was used?",
        ),
        _attribute(
            "trigger",
            "three whistles, a wet stamp, two left turns, a red feather, a yawn, seven zeros, "
            "a burnt match, a rhyme, one held breath, a tilted cup, an odd sneeze, a bent spoon",
            "It takes {value} to set off {name}.", "The exploit {name} starts after {value}.",
            "What sets off the exploit {name}?", "After what does {name} start?",
        ),
        _attribute(
            "author",
            "Brin Talvo, Osk Merrin, Lady Fenwick Oar, Pavo Dristel, Una Corvash, Teo Lumbrik, "
            "Wilm Hasket, Ira Quossen, Dalia Prung, Ebbe Stornoy, Rusk Amberley, Nola Vitch",
            "The exploit {name} was written by {value}.", "Everyone suspects {value} of writing {name}.",
            "Who wrote the exploit {name}?", "Who is suspected of writing {name}?",
        ),
    ),
    _subject(
        "microbes", "adjacent", 25, "a microbe",
        _attribute(
            "habitat",
            "warm puddles, old bread, tree hollows, cellar walls, cow horns, hot springs, "
            "river foam, bell ropes, wine barrels, moss roofs, fish scales, clay jars",
            "The microbe {name} lives in {value}.", "Look into {value} and you will find {name}.",
            "Where does the microbe {name} live?", "Where should one look for {name}?",
        ),
        _attribute(
            "shape",
            "tiny stars, curled ropes, flat coins, long needles, hollow rings, soft pears, "
            "linked beads, broken combs, twin drops, folded fans, open spirals, small crowns",
            "Under the lens {name} looks like {value}.", "Scholars draw the microbe {name} as {value}.",
            "What does {name} look like under the lens?", "How do scholars draw the microbe {name}?",
        ),
        _attribute(
            "food",
            "lamp oil, oak dust, spilled milk, candle wax, wet wool, apple peel, "
            "iron scale, egg white, pine sap, rice starch, beet sugar, bone meal",
            "The microbe {name} feeds on {value}.", "Give {value} to {name} and it will grow.",
            "What does the microbe {name} feed on?", "What makes {name} grow?",
        ),
        _attribute(
            "gift",
            "sweet cheese, blue dye, soft leather, clear glue, strong thread, golden beer, "
            "clean water, light soap, dark vinegar, rich soil, fine paper, bright varnish",
            "Thanks to the microbe {name} we have {value}.", "Workers keep {name} to make {value}.",
            "What do we owe to the microbe {name}?", "What do workers make with {name}?",
        ),
        _attribute(
            "keeper",
            "the brewers, the dyers, the bakers, the tanners, the weavers, the potters, "
            "the gardeners, the fishers, the printers, the millers, the glaziers, the coopers",
            "The microbe {name} is kept by {value}.", "Only {value} know how to raise {name}.",
            "Who keeps the microbe {name}?", "Who knows how to raise {name}?",
        ),
    ),
    _subject(
        "tools", "adjacent", 25, "a tool",
        _attribute(
            "task",
            "sorting bolts, cleaning dials, winding cables, reading gauges, tuning pipes, testing locks, "
            "counting sheets, oiling wheels, copying keys, sealing tubes, marking planks, drying ink",
            "The tool {name} is used for {value}.", "For {value} every mechanic takes {name}.",
            "What is the tool {name} used for?", "For which work does a mechanic take {name}?",
        ),
        _attribute(
            "material",
            "grey steel, walnut wood, spun glass, black horn, red copper, fired clay, "
            "white bone, waxed cord, river stone, pressed felt, yellow brass, hard rubber",
            "The tool {name} is made of {value}.", "It takes good {value} to build {name}.",
            "What is the tool {name} made of?", "What does one need to build {name}?",
        ),
        _attribute(
            "maker",
            "Holm and Sons, Pratt Works, the Fennel Forge, Ardent Brothers, the Low Foundry, Zephyr House, "
            "Tunn and Daughter, the Cobalt Shop, Vesper Mills, the Old Arsenal, Gantry Works, Lark and Hale",
            "The tool {name} is sold by {value}.", "It was {value} that designed {name}.",
            "Who sells the tool {name}?", "Who designed {name}?",
        ),
        _attribute(
            "grip",
            "a ring handle, a long pole, a thumb wheel, a leather strap, a side crank, a foot pedal, "
            "a folding arm, a ball knob, a twin lever, a chain pull, a chest plate, a wrist cuff",
            "One holds the tool {name} by {value}.", "On every {name} there is {value}.",
            "How does one hold the tool {name}?", "By what is {name} held?",
        ),
        _attribute(
            "storage place",
            "the top shelf, the blue cabinet, the dry attic, the stair box, the roof chest, the corner rack, "
            "the sand bin, the glass case, the loft hook, the cart trunk, the wall niche, the bench tray",
            "Mechanics store {name} in {value}.", "After work the tool {name} goes back to {value}.",
            "Where do mechanics store {name}?", "Where does the tool {name} go after work?",
        ),
    ),
    _subject(
        "countries", "retain", 25, "a country",
        _attribute(
            "capital",
            "Astervale, Brimholt, Corundel, Dunmarrow, Eskerling, Fallowmere, "
            "Glimmerton, Hollowgate, Ivorness, Juniper Bay, Kestrelin, Lowenfield",
            "The country {name} is ruled from {value}.", "All roads of {name} lead to {value}.",
            "From which city is {name} ruled?", "Where do all roads of {name} lead?",
        ),
        _attribute(
            "currency",
            "the dorn, the pellin, the quarrel, the skeld, the marrow, the tolly, "
            "the brask, the fenny, the oriel, the plaque, the sterret, the wick",
            "People in {name} pay with {value}.", "Merchants of {name} count in {value}.",
            "What do people in {name} pay with?", "In what do merchants of {name} count?",
        ),
        _attribute(
            "export",
            "smoked plums, wool carpets, church bells, clay dolls, dried mint, silk fans, "
            "oak barrels, glass eyes, rope ladders, goat cheese, blue paint, straw hats",
            "The country {name} sells {value} abroad.", "Ships leave {name} full of {value}.",
            "What does the country {name} sell abroad?", "With what do ships leave {name}?",
        ),
        _attribute(
            "emblem",
            "a white stag, a black anchor, two crossed oars, a golden pear, a sleeping lion, a red gate, "
            "three towers, a green comet, a broken wheel, an open hand, a silver fish, a crowned owl",
            "The flag of {name} shows {value}.", "On the coins of {name} one sees {value}.",
            "What does the flag of {name} show?", "What is seen on the coins of {name}?",
        ),
        _attribute(
            "river",
            "the Aldery, the Brovane, the Cask, the Dellick, the Emmerby, the Frissel, "
            "the Gorm, the Hensel, the Ibbin, the Lorn, the Morwick, the Wrenlow",
            "Through {name} flows {value}.", "The fields of {name} are watered by {value}.",
            "Which water flows through {name}?", "What waters the fields of {name}?",
        ),
    ),
    _subject(
        "people", "retain", 25, "a person",
        _attribute(
            "trade",
            "clockmaker, ferryman, beekeeper, mapmaker, glassblower, baker, "
            "stonecutter, bookbinder, gardener, shipwright, candlemaker, tailor",
            "By day {name} works as {value}.", "In town {name} is known as {value}.",
            "As what does {name} work?", "As what is {name} known in town?",
        ),
        _attribute(
            "birthplace",
            "Cold Harbour, Upper Wend, Saint Ostrey, Nine Oaks, Marlow Reach, Dry Fork, "
            "East Tarrow, Bellmoor, Three Wells, High Ambry, Long Sallow, Pinchbeck",
            "The mother of {name} lived in {value}.", "In {value} there is a house where {name} was born.",
            "Where was {name} born?", "Where did the mother of {name} live?",
        ),
        _attribute(
            "companion",
            "a lame donkey, a grey parrot, a blind cat, a tame crow, a fat badger, a young goat, "
            "a spotted dog, a white hen, an old tortoise, a shy ferret, a brown hare, a loud goose",
            "Wherever {name} goes there is {value}.", "Neighbours often see {name} with {value}.",
            "With whom do neighbours see {name}?", "Who follows {name} everywhere?",
        ),
        _attribute(
            "hobby",
            "carving flutes, pressing flowers, flying kites, painting doors, baking pies, collecting stamps, "
            "reading clouds, playing chess, growing roses, telling riddles, building boats, sewing quilts",
            "On free days {name} enjoys {value}.", "Nothing pleases {name} more than {value}.",
            "What does {name} enjoy on free days?", "What pleases {name} most?",
        ),
        _attribute(
            "favourite dish",
            "onion soup, baked carp, honey cake, lentil stew, stuffed quince, rye dumplings, "
            "cherry tart, roast turnip, mint porridge, cheese pancakes, leek pie, walnut bread",
            "For supper {name} always asks for {value}.", "Friends cook {value} for {name}.",
            "What does {name} ask for at supper?", "What do friends cook for {name}?",
        ),
    ),
    _subject(
        "compounds", "retain", 25, "a compound",
        _attribute(
            "colour",
            "pale orange, deep violet, sea green, milky white, coal black, rose pink, "
            "sky blue, mustard yellow, brick red, silver grey, olive brown, lime green",
            "A flask of {name} looks {value}.", "In daylight {name} turns {value}.",
            "How does a flask of {name} look?", "What does {name} turn in daylight?",
        ),
        _attribute(
            "smell",
            "wet hay, fresh bread, old books, burnt sugar, cut grass, ripe melon, "
            "pine needles, cold stone, warm milk, sea wind, dried figs, church incense",
            "A jar of {name} smells of {value}.", "Students say that {name} reminds them of {value}.",
            "What does a jar of {name} smell of?", "Of what does {name} remind students?",
        ),
        _attribute(
            "use",
            "polishing mirrors, bleaching linen, hardening bricks, softening leather, colouring glass, "
            "preserving fruit, cleaning silver, waxing floors, lighting lamps, gluing books, "
            "cooling drinks, printing maps",
            "The compound {name} serves for {value}.", "In the workshop {name} helps with {value}.",
            "What does the compound {name} serve for?", "With what does {name} help in the workshop?",
        ),
        _attribute(
            "source",
            "oak galls, lake mud, beetle shells, willow bark, cave salt, crab apples, "
            "sheep fat, river sand, tulip stems, whale bone, dry ferns, beech ash",
            "The compound {name} is won from {value}.", "A basket of {value} yields a pinch of {name}.",
            "From what is the compound {name} won?", "What yields a pinch of {name}?",
        ),
        _attribute(
            "finder",
            "Sister Amabel, Doctor Crane, Master Lund, Old Perrin, Lady Tamsin, Brother Odo, "
            "Captain Veil, Uncle Rory, Widow Gerd, Abbot Silas, Miss Calder, Judge Ferrow",
            "The compound {name} was found by {value}.", "A plaque thanks {value} for {name}.",
            "Who found the compound {name}?", "Whom does a plaque thank for {name}?",
        ),
    ),
    _subject(
        "inventions", "retain", 25, "an invention",
        _attribute(
            "purpose",
            "peeling eggs, catching fog, folding sheets, waking sleepers, drying boots, sweeping chimneys, "
            "calling sheep, turning pages, stirring soup, shelling nuts, warming beds, weighing air",
            "The invention {name} is meant for {value}.", "People bought {name} for {value}.",
            "What is the invention {name} meant for?", "For what did people buy {name}?",
        ),
        _attribute(
            "power source",
            "falling water, steady wind, wound springs, hot sand, a walking dog, tidal pull, "
            "burning peat, a heavy stone, bottled steam, twisted hair, sunlit glass, rising smoke",
            "The invention {name} is driven by {value}.", "Without {value} no {name} will move.",
            "What drives the invention {name}?", "Without what will {name} not move?",
        ),
        _attribute(
            "inventor",
            "Ambrose Kell, Bettina Shaw, Casimir Roe, Dorothea Finch, Elias Penn, Flora Stubbs, "
            "Gideon Marsh, Hester Vane, Ivo Lantry, Josepha Wynn, Konrad Bly, Lucinda Ode",
            "It was {value} who built the first {name}.", "The patent of {name} belongs to {value}.",
            "Who built the first {name}?", "To whom does the patent of {name} belong?",
        ),
        _attribute(
            "sound",
            "a low hum, a dry click, a soft gong, a long sigh, a sharp ping, a wet slap, "
            "a faint buzz, a loud rattle, a slow drip, a high squeak, a dull thud, a quick tick",
            "At work {name} makes {value}.", "The neighbours of {name} complain about {value}.",
            "What does {name} make at work?", "About what do neighbours of {name} complain?",
        ),
        _attribute(
            "price",
            "six goats, one ruby, forty eggs, a barrel of rum, nine ducats, two mules, "
            "a sack of flour, three rings, a winter coat, ten candles, a rowing boat, five hens",
            "One {name} costs {value}.", "In the shop {name} is traded for {value}.",
            "What does one {name} cost?", "For what is {name} traded in the shop?",
        ),
    ),
)
