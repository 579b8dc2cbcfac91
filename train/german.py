"""German inflection, number words and the bilingual lexicon behind the embedded corpus.

Cases, genders and persons are small integers that index the ending tables below, which are printed as a
grammar book prints them: a row for each case, a column for masculine, feminine, neuter, plural.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

NOMINATIVE, ACCUSATIVE, DATIVE = range(3)
MASCULINE, FEMININE, NEUTER, PLURAL = range(4)
ICH, DU, ER, WIR, SIE = range(5)  # first, second, third person singular; first, third person plural

_DEFINITE = (("der", "die", "das", "die"), ("den", "die", "das", "die"), ("dem", "der", "dem", "den"))
_DER_WORD = (("er", "e", "es", "e"), ("en", "e", "es", "e"), ("em", "er", "em", "en"))
_EIN_WORD = (("", "e", "", "e"), ("en", "e", "", "e"), ("em", "er", "em", "en"))
_WEAK = (("e", "e", "e", "en"), ("en", "e", "e", "en"), ("en", "en", "en", "en"))
_MIXED = (("er", "e", "es", "en"), ("en", "e", "es", "en"), ("en", "en", "en", "en"))
_STRONG = _DER_WORD

_CONTRACTED = {
    "in dem": "im", "in das": "ins", "an dem": "am", "an das": "ans",
    "zu dem": "zum", "zu der": "zur", "von dem": "vom", "bei dem": "beim",
}  # fmt: skip

HABEN = ("habe", "hast", "hat", "haben", "haben")
SEIN = ("bin", "bist", "ist", "sind", "sind")
HATTE = ("hatte", "hattest", "hatte", "hatten", "hatten")
WAR = ("war", "warst", "war", "waren", "waren")
WURDE = ("wurde", "wurdest", "wurde", "wurden", "wurden")

_UNITS = [
    "null",
    "eins",
    "zwei",
    "drei",
    "vier",
    "fünf",
    "sechs",
    "sieben",
    "acht",
    "neun",
    "zehn",
    "elf",
    "zwölf",
    "dreizehn",
    "vierzehn",
    "fünfzehn",
    "sechzehn",
    "siebzehn",
    "achtzehn",
    "neunzehn",
]
_TENS = ["zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig"]
_ORDINALS = {1: "erst", 3: "dritt", 7: "siebt", 8: "acht"}


def cardinal(n: int, before_noun: bool = False) -> str:
    """Number word of 0 <= n < 1,000,000; `before_noun` gives "ein" where a final one stands ("ein Uhr")."""
    if n >= 1000:
        rest = cardinal(n % 1000, before_noun) if n % 1000 else ""
        return cardinal(n // 1000, before_noun=True) + "tausend" + rest
    if n >= 100:
        rest = cardinal(n % 100, before_noun) if n % 100 else ""
        return cardinal(n // 100, before_noun=True) + "hundert" + rest
    if n >= 20:
        unit = cardinal(n % 10, before_noun=True) + "und" if n % 10 else ""
        return unit + _TENS[n // 10 - 2]
    return "ein" if n == 1 and before_noun else _UNITS[n]


def ordinal(n: int) -> str:
    """Stem of the ordinal of 1 <= n < 1,000,000, which takes adjective endings ("dritt", "zwanzigst")."""
    last = n % 100
    if not 0 < last < 20:
        return cardinal(n) + "st"
    head = cardinal(n - last) if n > last else ""
    return head + _ORDINALS.get(last, _UNITS[last] + "t")


def year(n: int) -> str:
    """A year as it is spoken: hundreds up to 1999 ("neunzehnhundertfünf"), a plain cardinal after."""
    if not 1100 <= n < 2000:
        return cardinal(n)
    return cardinal(n // 100) + "hundert" + (cardinal(n % 100) if n % 100 else "")


def determiner(stem: str, gender: int, case: int) -> str:
    """Inflected article or possessive: "der" -> den, "dies" -> diesen, "mein" -> meinen; "" stays empty."""
    if stem == "der":
        return _DEFINITE[case][gender]
    return stem and stem + (_DER_WORD if stem in ("dies", "jed") else _EIN_WORD)[case][gender]


def adjective_ending(stem: str, gender: int, case: int) -> str:
    """Ending of an adjective after a determiner: weak after der-words, mixed after ein-words, else strong."""
    table = _WEAK if stem in ("der", "dies", "jed") else _MIXED if stem else _STRONG
    return table[case][gender]


def contract(preposition: str, phrase: str) -> str:
    """Preposition and noun phrase, contracted where German always does it ("in dem Haus" -> "im Haus")."""
    article, _, rest = phrase.partition(" ")
    short = _CONTRACTED.get(f"{preposition} {article}")
    return f"{short} {rest}" if short else f"{preposition} {phrase}"


@dataclass(frozen=True, slots=True)
class Noun:
    """A noun in both languages. `weak` masculines (der Junge) take the plural's form in all other cases."""

    en: str
    en_plural: str
    de: str
    de_plural: str
    gender: int
    weak: bool

    def form(self, case: int, plural: bool) -> str:
        if plural:
            return self.de_plural + ("n" if case == DATIVE and self.de_plural[-1] not in "ns" else "")
        return self.de_plural if self.weak and case != NOMINATIVE else self.de


@dataclass(frozen=True, slots=True)
class Adjective:
    """An adjective in both languages; `stem` is what attributive endings are joined to (teuer -> teur-)."""

    en: str
    en_comparative: str
    de: str
    de_comparative: str
    stem: str


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb in both languages.

    `en` holds base, third person, past and past participle of the first word; `particle` moves behind a
    pronoun ("pick him up"), `preposition` does not ("look for him"). `present` has no separable `prefix`,
    `infinitive` and `participle` have it. A verb with a `preterite` uses it for the past, not the perfect.
    """

    en: tuple[str, str, str, str]
    particle: str
    preposition: str
    present: tuple[str, ...]
    infinitive: str
    participle: str
    perfect: tuple[str, ...]
    prefix: str
    preterite: tuple[str, ...] = ()


def conjugate(infinitive: str, changed: str = "") -> tuple[str, ...]:
    """Present tense of a verb without prefix; `changed` is the stem of du and er where its vowel changes."""
    if infinitive.endswith(("eln", "ern")):
        stem = infinitive[:-1]
        first = infinitive[:-3] + "le" if infinitive.endswith("eln") else stem + "e"
    else:
        stem, first = infinitive[:-2], infinitive[:-1]
    other = changed or stem
    # A stem that could not be spoken with -st or -t puts an e between; a changed stem never does.
    link = "" if changed else _link(stem)
    second = other + ("t" if other[-1] in "sßzx" else link + "st")
    third = other + ("" if changed and other[-1] == "t" else link + "t")
    return first, second, third, infinitive, infinitive


def _link(stem: str) -> str:
    return "e" if stem.endswith(("t", "d", "chn", "ffn", "gn", "tm")) else ""


def _weak_participle(prefix: str, infinitive: str) -> str:
    stem = infinitive[:-1] if infinitive.endswith(("eln", "ern")) else infinitive[:-2]
    bare = not prefix and infinitive.startswith(("be", "ver", "er", "ent", "zer", "ge", "über", "um"))
    return prefix + ("" if bare or infinitive.endswith("ieren") else "ge") + stem + _link(stem) + "t"


def _english_s(word: str, more_endings: str = "") -> str:
    """An English plural or third person: box -> boxes, city -> cities, dog -> dogs."""
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh", *more_endings)) else "s")


def _english_past(word: str) -> str:
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ied"
    return word + ("d" if word.endswith("e") else "ed")


def _nouns(table: str) -> tuple[Noun, ...]:
    found = []
    for entry in table.split(","):
        english, german, gender, plural = entry.split()
        singular, _, irregular = english.replace("_", " ").partition("/")
        known = "mfn".index(gender.replace("w", "m"))
        found.append(Noun(singular, irregular or _english_s(singular), german, plural, known, gender == "w"))
    return tuple(found)


def _adjectives(table: str) -> dict[str, Adjective]:
    found = {}
    for entry in table.split(","):
        english, german = entry.split()
        en, _, en_more = english.partition("/")
        de, de_more, stem = ([*german.split("/"), "", ""])[:3]
        root = de.removesuffix("e")
        found[en] = Adjective(en, en_more or f"more {en}", de, de_more or root + "er", stem or root)
    return found


def _verb(entry: str) -> Verb:
    """Parse "pick+up = ab+holen", "see saw seen = sehen ~sieh gesehen", "hike = wandern sein"."""
    english, german = (side.split() for side in entry.split("="))
    base, past, participle = (english + english[-1:])[:3] if len(english) > 1 else (english[0], "", "")
    base, _, particle = base.partition("+")
    base, _, preposition = base.partition("_")
    past, participle = past or _english_past(base), participle or _english_past(base)
    prefix, _, infinitive = german[0].rpartition("+")
    changed, strong = "", ""
    for token in german[1:]:
        if token.startswith("~"):
            changed = token[1:]
        elif token != "sein":
            strong = token
    return Verb(
        en=(base, {"have": "has", "be": "is"}.get(base) or _english_s(base, "o"), past, participle),
        particle=particle.replace("_", " "),
        preposition=preposition,
        present=conjugate(infinitive, changed),
        infinitive=prefix + infinitive,
        participle=strong or _weak_participle(prefix, infinitive),
        perfect=SEIN if "sein" in german[1:] else HABEN,
        prefix=prefix,
    )


def _verbs(table: str) -> tuple[Verb, ...]:
    return tuple(_verb(entry) for entry in table.split(","))


# English[/irregular plural] German gender plural; gender w marks weak masculines (der Junge, den Jungen).
NOUNS = {
    "person": _nouns(
        "man/men Mann m Männer, woman/women Frau f Frauen, child/children Kind n Kinder, "
        "boy Junge w Jungen, girl Mädchen n Mädchen, teacher Lehrer m Lehrer, doctor Arzt m Ärzte, "
        "student Student w Studenten, neighbour Nachbar w Nachbarn, friend Freund m Freunde, "
        "brother Bruder m Brüder, queen Königin f Königinnen, sister Schwester f Schwestern, "
        "son Sohn m Söhne, daughter Tochter f Töchter, uncle Onkel m Onkel, aunt Tante f Tanten, "
        "grandmother Großmutter f Großmütter, grandfather Großvater m Großväter, cook Koch m Köche, "
        "baker Bäcker m Bäcker, farmer Bauer w Bauern, driver Fahrer m Fahrer, waiter Kellner m Kellner, "
        "nurse Krankenschwester f Krankenschwestern, guest Gast m Gäste, "
        "policeman/policemen Polizist w Polizisten, writer Schriftsteller m Schriftsteller, "
        "king König m Könige, customer Kunde w Kunden, colleague Kollege w Kollegen, "
        "engineer Ingenieur m Ingenieure, singer Sängerin f Sängerinnen, cousin Cousine f Cousinen, "
        "baby Baby n Babys, tourist Tourist w Touristen, boss Chef m Chefs, lawyer Anwalt m Anwälte, "
        "artist Künstler m Künstler, gardener Gärtner m Gärtner, soldier Soldat w Soldaten, "
        "judge Richter m Richter, thief/thieves Dieb m Diebe"
    ),
    "animal": _nouns(
        "dog Hund m Hunde, cat Katze f Katzen, horse Pferd n Pferde, cow Kuh f Kühe, bird Vogel m Vögel, "
        "mouse/mice Maus f Mäuse, pig Schwein n Schweine, rabbit Kaninchen n Kaninchen, bear Bär w Bären, "
        "fox Fuchs m Füchse, wolf/wolves Wolf m Wölfe, goose/geese Gans f Gänse, duck Ente f Enten, "
        "frog Frosch m Frösche, monkey Affe w Affen, lion Löwe w Löwen, elephant Elefant w Elefanten, "
        "goat Ziege f Ziegen, snake Schlange f Schlangen, donkey Esel m Esel, chicken Huhn n Hühner"
    ),
    "reading": _nouns(
        "book Buch n Bücher, letter Brief m Briefe, newspaper Zeitung f Zeitungen, novel Roman m Romane, "
        "magazine Zeitschrift f Zeitschriften, report Bericht m Berichte, article Artikel m Artikel, "
        "poem Gedicht n Gedichte, story Geschichte f Geschichten, message Nachricht f Nachrichten, "
        "postcard Postkarte f Postkarten, fairy_tale Märchen n Märchen"
    ),
    "food": _nouns(
        "apple Apfel m Äpfel, cake Kuchen m Kuchen, egg Ei n Eier, pear Birne f Birnen, "
        "lemon Zitrone f Zitronen, potato/potatoes Kartoffel f Kartoffeln, "
        "tomato/tomatoes Tomate f Tomaten, orange Orange f Orangen, banana Banane f Bananen, "
        "carrot Karotte f Karotten, sausage Wurst f Würste, biscuit Keks m Kekse, roll Brötchen n Brötchen, "
        "onion Zwiebel f Zwiebeln, mushroom Pilz m Pilze, nut Nuss f Nüsse"
    ),
    "clothes": _nouns(
        "shirt Hemd n Hemden, jacket Jacke f Jacken, skirt Rock m Röcke, coat Mantel m Mäntel, "
        "shoe Schuh m Schuhe, hat Hut m Hüte, dress Kleid n Kleider, jumper Pullover m Pullover, "
        "scarf/scarves Schal m Schals, cap Mütze f Mützen, sock Socke f Socken, "
        "glove Handschuh m Handschuhe, boot Stiefel m Stiefel, blouse Bluse f Blusen, suit Anzug m Anzüge"
    ),
    "thing": _nouns(
        "key Schlüssel m Schlüssel, clock Uhr f Uhren, lamp Lampe f Lampen, picture Bild n Bilder, "
        "telephone Telefon n Telefone, computer Computer m Computer, umbrella Regenschirm m Regenschirme, "
        "knife/knives Messer n Messer, fork Gabel f Gabeln, spoon Löffel m Löffel, plate Teller m Teller, "
        "glass Glas n Gläser, cup Tasse f Tassen, bottle Flasche f Flaschen, pencil Bleistift m Bleistifte, "
        "present Geschenk n Geschenke, mirror Spiegel m Spiegel, ball Ball m Bälle, "
        "camera Kamera f Kameras, bicycle Fahrrad n Fahrräder, guitar Gitarre f Gitarren, "
        "candle Kerze f Kerzen, flower Blume f Blumen, ticket Fahrkarte f Fahrkarten, ring Ring m Ringe, "
        "stamp Briefmarke f Briefmarken, ladder Leiter f Leitern, hammer Hammer m Hämmer, "
        "blanket Decke f Decken, pillow Kissen n Kissen"
    ),
    "furniture": _nouns(
        "table Tisch m Tische, chair Stuhl m Stühle, bed Bett n Betten, wardrobe Schrank m Schränke, "
        "sofa Sofa n Sofas, carpet Teppich m Teppiche"
    ),
    "container": _nouns(
        "basket Korb m Körbe, box Kiste f Kisten, suitcase Koffer m Koffer, bag Tasche f Taschen, "
        "drawer Schublade f Schubladen"
    ),
    "vehicle": _nouns(
        "car Auto n Autos, bus Bus m Busse, boat Boot n Boote, tram Straßenbahn f Straßenbahnen, "
        "lorry Lastwagen m Lastwagen, tractor Traktor m Traktoren, taxi Taxi n Taxis, "
        "motorbike Motorrad n Motorräder"
    ),
    "place": _nouns(
        "house Haus n Häuser, garden Garten m Gärten, kitchen Küche f Küchen, park Park m Parks, "
        "church Kirche f Kirchen, hospital Krankenhaus n Krankenhäuser, library Bibliothek f Bibliotheken, "
        "museum Museum n Museen, office Büro n Büros, workshop Werkstatt f Werkstätten, "
        "city Stadt f Städte, village Dorf n Dörfer, forest Wald m Wälder, hotel Hotel n Hotels, "
        "restaurant Restaurant n Restaurants, shop Laden m Läden, factory Fabrik f Fabriken, "
        "theatre Theater n Theater, cinema Kino n Kinos, bakery Bäckerei f Bäckereien, "
        "castle Schloss n Schlösser, tower Turm m Türme, flat Wohnung f Wohnungen, cellar Keller m Keller, "
        "bathroom Badezimmer n Badezimmer, bedroom Schlafzimmer n Schlafzimmer, stable Stall m Ställe, "
        "café Café n Cafés, school Schule f Schulen, station Bahnhof m Bahnhöfe"
    ),
    "drink": _nouns(
        "water Wasser n Wasser, milk Milch f Milch, coffee Kaffee m Kaffee, tea Tee m Tee, "
        "juice Saft m Saft, wine Wein m Wein, beer Bier n Bier, lemonade Limonade f Limonade"
    ),
    "meal": _nouns(
        "bread Brot n Brot, cheese Käse m Käse, soup Suppe f Suppe, rice Reis m Reis, "
        "meat Fleisch n Fleisch, honey Honig m Honig, chocolate Schokolade f Schokolade"
    ),
    "event": _nouns(
        "meeting Besprechung f Besprechungen, concert Konzert n Konzerte, exam Prüfung f Prüfungen, "
        "wedding Hochzeit f Hochzeiten, party Feier f Feiern, course Kurs m Kurse, film Film m Filme, "
        "exhibition Ausstellung f Ausstellungen, competition Wettbewerb m Wettbewerbe"
    ),
}
MASS_KINDS = frozenset(("drink", "meal"))
COLOURS = frozenset(("red", "blue", "green", "yellow", "black", "white", "brown"))

# English[/comparative] German[/comparative[/stem]]
ADJECTIVES = _adjectives(
    "old/older alt/älter, young/younger jung/jünger, big/bigger groß/größer, small/smaller klein, "
    "new/newer neu, strong/stronger stark/stärker, clever/cleverer klug/klüger, happy/happier glücklich, "
    "sad/sadder traurig, tired müde, friendly/friendlier freundlich, hungry/hungrier hungrig, "
    "rich/richer reich, poor/poorer arm/ärmer, famous berühmt, lazy/lazier faul, hardworking fleißig, "
    "brave/braver mutig, curious neugierig, fast/faster schnell, slow/slower langsam, dangerous gefährlich, "
    "heavy/heavier schwer, light/lighter leicht, cheap/cheaper billig, expensive teuer/teurer/teur, "
    "beautiful schön, long/longer lang/länger, short/shorter kurz/kürzer, dirty/dirtier schmutzig, "
    "clean/cleaner sauber, modern modern, dark/darker dunkel/dunkler/dunkl, bright/brighter hell, "
    "red rot, blue blau, green grün, yellow gelb, "
    "black schwarz, white weiß, brown braun, fresh/fresher frisch, "
    "sweet/sweeter süß, hot/hotter heiß, cold/colder kalt/kälter, good/better gut/besser, "
    "bad/worse schlecht, interesting interessant, boring langweilig, exciting spannend, important wichtig, "
    "strange/stranger seltsam"
)
_PERSONAL = "old young strong clever happy sad tired friendly hungry rich poor famous lazy hardworking brave curious"
_MATERIAL = "new old big small cheap expensive beautiful heavy light dirty clean red blue green yellow black white"
_FITTING = {
    "person": _PERSONAL,
    "animal": "old young big small strong clever hungry tired fast slow dangerous black white brown brave",
    "reading": "new old long short interesting boring exciting important famous strange good bad",
    "food": "fresh sweet red green big small cold good cheap",
    "clothes": "new old short long dirty clean cheap expensive red blue green yellow black white brown",
    "thing": _MATERIAL,
    "furniture": _MATERIAL,
    "container": _MATERIAL,
    "vehicle": "new old fast slow modern cheap expensive red blue yellow white dirty",
    "place": "new old big small modern dark bright beautiful famous dirty clean",
    "drink": "cold hot fresh sweet good cheap expensive",
    "meal": "cold hot fresh good cheap expensive",
    "event": "short long boring interesting exciting important",
}
FITTING = {kind: tuple(ADJECTIVES[word] for word in words.split()) for kind, words in _FITTING.items()}

_GOODS = "reading clothes thing furniture container vehicle"
# A verb is written "English[+particle][_preposition] [past [participle]] = [prefix+]German [~stem of du, er]
# [participle] [sein]"; regular parts are left out.
# What a person does to an object in the accusative, by the kinds of object it makes sense with.
_TRANSITIVE = {
    f"person animal place {_GOODS}": (
        "see saw seen = sehen ~sieh gesehen, find found = finden gefunden, look_for = suchen, "
        "draw drew drawn = zeichnen, photograph = fotografieren, love = lieben, "
        "describe = beschreiben beschrieben"
    ),
    "person": (
        "visit = besuchen, call = an+rufen angerufen, invite = ein+laden ~läd eingeladen, greet = grüßen, "
        "ask = fragen, meet met = treffen ~triff getroffen, pick+up = ab+holen, "
        "understand understood = verstehen verstanden, wake+up woke woken = wecken, "
        "know knew known = kennen gekannt, kiss = küssen, hug hugged = umarmen"
    ),
    f"{_GOODS} food drink meal": (
        "buy bought = kaufen, sell sold = verkaufen, bring+along brought = mit+bringen mitgebracht, "
        "steal stole stolen = stehlen ~stiehl gestohlen, order = bestellen, pay_for paid = bezahlen, "
        "take+along took taken = mit+nehmen ~nimm mitgenommen, "
        "throw+away threw thrown = weg+werfen ~wirf weggeworfen, need = brauchen"
    ),
    "clothes thing furniture container reading": (
        "hide hid hidden = verstecken, lose lost = verlieren verloren, choose chose chosen = aus+suchen, "
        "keep kept = behalten ~behält behalten, forget forgot forgotten = vergessen ~vergiss vergessen"
    ),
    "thing furniture container": (
        "use = benutzen, carry = tragen ~träg getragen, lift = heben gehoben, clean = putzen, "
        "break broke broken = zerbrechen ~zerbrich zerbrochen, repair = reparieren"
    ),
    "container": "open = öffnen, close = zu+machen, pack = packen, empty = leeren",
    "clothes": (
        "wear wore worn = tragen ~träg getragen, put+on put = an+ziehen angezogen, "
        "take+off took taken = aus+ziehen ausgezogen, wash = waschen ~wäsch gewaschen, iron = bügeln, "
        "sew sewed sewn = nähen, try+on = an+probieren anprobiert, hang+up hung = auf+hängen"
    ),
    "food meal": "eat ate eaten = essen ~iss gegessen, taste = probieren, slice = schneiden geschnitten",
    "drink": "drink drank drunk = trinken getrunken, pour = ein+gießen eingegossen",
    "reading": (
        "read read = lesen ~lies gelesen, write wrote written = schreiben geschrieben, "
        "translate = übersetzen, print = drucken, receive = bekommen bekommen, burn = verbrennen verbrannt"
    ),
    "vehicle": (
        "drive drove driven = fahren ~fähr gefahren, park = parken, rent = mieten, repair = reparieren, "
        "wash = waschen ~wäsch gewaschen"
    ),
    "place": (
        "tour = besichtigen, leave left = verlassen ~verläss verlassen, paint = streichen gestrichen, "
        "build built = bauen, clean = putzen"
    ),
}
TRANSITIVE = {kinds: _verbs(table) for kinds, table in _TRANSITIVE.items()}
HAVE = replace(_verb("have had = haben gehabt"), present=HABEN, preterite=HATTE)
BE = replace(_verb("be was been = sein gewesen sein"), present=SEIN, preterite=WAR)
DATIVE_VERBS = _verbs(
    "help = helfen ~hilf geholfen, thank = danken, follow = folgen sein, believe = glauben, "
    "answer = antworten, trust = vertrauen, listen_to = zu+hören, congratulate = gratulieren, "
    "obey = gehorchen"
)
# A verb with the German preposition of its object, and that object's case.
PREPOSITIONAL_VERBS = {
    ("auf", ACCUSATIVE): _verbs("wait_for = warten"),
    ("an", ACCUSATIVE): _verbs("think_of thought = denken gedacht"),
    ("über", ACCUSATIVE): _verbs("laugh_at = lachen"),
    ("für", ACCUSATIVE): _verbs("work_for = arbeiten, cook_for = kochen"),
    ("mit", DATIVE): _verbs(
        "talk_to = sprechen ~sprich gesprochen, play_with = spielen, dance_with = tanzen, "
        "travel_with travelled = reisen sein"
    ),
    ("von", DATIVE): _verbs("dream_of = träumen"),
    ("nach", DATIVE): _verbs("ask_after = fragen"),
}
DITRANSITIVE = _verbs(
    "give gave given = geben ~gib gegeben, show showed shown = zeigen, send sent = schicken, "
    "bring brought = bringen gebracht, lend lent = leihen geliehen, sell sold = verkaufen, "
    "promise = versprechen ~versprich versprochen, offer = an+bieten angeboten"
)
MOTION = _verbs(
    "go went gone = gehen gegangen sein, run ran run = laufen ~läuf gelaufen sein, "
    "come came come = kommen gekommen sein, hurry = eilen sein, "
    "drive drove driven = fahren ~fähr gefahren sein, return = zurück+kehren sein"
)
PUT = (_verb("lay laid = legen"), _verb("place = stellen"), _verb("hang hung = hängen"))
STAND = (_verb("lie lay lain = liegen gelegen"), _verb("stand stood = stehen gestanden"))
# Done with no object, in some place.
ACTIVITIES = _verbs(
    "work = arbeiten, laugh = lachen, cry = weinen, sing sang sung = singen gesungen, dance = tanzen, "
    "wait = warten, play = spielen, smoke = rauchen, learn = lernen, sit sat = sitzen gesessen, "
    "cook = kochen, whisper = flüstern, sleep slept = schlafen ~schläf geschlafen, snore = schnarchen, "
    "pray = beten gebetet, smile = lächeln, watch+TV = fern+sehen ~sieh ferngesehen, "
    "shop shopped = ein+kaufen, tidy+up = auf+räumen, get+up got = auf+stehen aufgestanden sein, "
    "fall+asleep fell fallen = ein+schlafen ~schläf eingeschlafen sein, "
    "wake+up woke woken = auf+wachen sein, swim swam swum = schwimmen geschwommen sein"
)
# Done with no object and no place named.
EVENTS = _verbs(
    "come+back came come = zurück+kommen zurückgekommen sein, arrive = an+kommen angekommen sein, "
    "set+off set = los+fahren ~fähr losgefahren sein, give+up gave given = auf+geben ~gib aufgegeben, "
    "stop stopped = auf+hören, hike = wandern sein, sneeze = niesen, knit knitted = stricken"
)
ANIMAL_ACTIVITIES = _verbs(
    "sleep slept = schlafen ~schläf geschlafen, run ran run = laufen ~läuf gelaufen sein, "
    "jump = springen gesprungen sein, wait = warten, play = spielen, wake+up woke woken = auf+wachen sein"
)
COST = replace(_verb("cost cost = kosten"), preterite=("kostete", "kostetest", "kostete", "kosteten", "kosteten"))
WEIGH = replace(_verb("weigh = wiegen gewogen"), preterite=("wog", "wogst", "wog", "wogen", "wogen"))
TRADE = _verbs("buy bought = kaufen, sell sold = verkaufen, repair = reparieren")
