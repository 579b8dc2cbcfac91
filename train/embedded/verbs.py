"""Verbs of the embedded corpus, by what may stand beside them."""

from __future__ import annotations

from dataclasses import replace

from .german import ACCUSATIVE, DATIVE, HABEN, HATTE, SEIN, WAR
from .lexicon import verb, verbs

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
        "translate = übersetzen, print = drucken, receive = erhalten ~erhält erhalten, burn = verbrennen verbrannt"
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
TRANSITIVE = {kinds: verbs(table) for kinds, table in _TRANSITIVE.items()}
SEEING = next(iter(TRANSITIVE.values()))
HAVE = replace(verb("have had = haben gehabt"), present=HABEN, preterite=HATTE)
BE = replace(verb("be was been = sein gewesen sein"), present=SEIN, preterite=WAR)
DATIVE_VERBS = verbs(
    "help = helfen ~hilf geholfen, thank = danken, follow = folgen sein, believe = glauben, "
    "answer = antworten, trust = vertrauen, listen_to = zu+hören, congratulate = gratulieren, "
    "obey = gehorchen"
)
# A verb with the German preposition of its object, and that object's case.
PREPOSITIONAL_VERBS = {
    ("auf", ACCUSATIVE): verbs("wait_for = warten"),
    ("an", ACCUSATIVE): verbs("think_of thought = denken gedacht"),
    ("über", ACCUSATIVE): verbs("laugh_at = lachen"),
    ("für", ACCUSATIVE): verbs("work_for = arbeiten, cook_for = kochen"),
    ("mit", DATIVE): verbs(
        "talk_to = sprechen ~sprich gesprochen, play_with = spielen, dance_with = tanzen, "
        "travel_with travelled = reisen sein"
    ),
    ("von", DATIVE): verbs("dream_of = träumen"),
    ("nach", DATIVE): verbs("ask_after = fragen"),
}
DITRANSITIVE = verbs(
    "give gave given = geben ~gib gegeben, show showed shown = zeigen, send sent = schicken, "
    "bring brought = bringen gebracht, lend lent = leihen geliehen, sell sold = verkaufen, "
    "promise = versprechen ~versprich versprochen, offer = an+bieten angeboten"
)
MOTION = verbs(
    "go went gone = gehen gegangen sein, run ran run = laufen ~läuf gelaufen sein, "
    "come came come = kommen gekommen sein, hurry = eilen sein, "
    "drive drove driven = fahren ~fähr gefahren sein, return = zurück+kehren sein"
)
PUT = (verb("lay laid = legen"), verb("place = stellen"), verb("hang hung = hängen"))
STAND = (verb("lie lay lain = liegen gelegen"), verb("stand stood = stehen gestanden"))
# Done with no object, in some place.
ACTIVITIES = verbs(
    "work = arbeiten, laugh = lachen, cry = weinen, sing sang sung = singen gesungen, dance = tanzen, "
    "wait = warten, play = spielen, smoke = rauchen, learn = lernen, sit sat = sitzen gesessen, "
    "cook = kochen, whisper = flüstern, sleep slept = schlafen ~schläf geschlafen, snore = schnarchen, "
    "pray = beten gebetet, smile = lächeln, watch+TV = fern+sehen ~sieh ferngesehen, "
    "shop shopped = ein+kaufen, tidy+up = auf+räumen, get+up got = auf+stehen aufgestanden sein, "
    "fall+asleep fell fallen = ein+schlafen ~schläf eingeschlafen sein, "
    "wake+up woke woken = auf+wachen sein, swim swam swum = schwimmen geschwommen sein"
)
# Done with no object and no place named.
EVENTS = verbs(
    "come+back came come = zurück+kommen zurückgekommen sein, arrive = an+kommen angekommen sein, "
    "set+off set = los+fahren ~fähr losgefahren sein, give+up gave given = auf+geben ~gib aufgegeben, "
    "stop stopped = auf+hören, hike = wandern sein, sneeze = niesen, knit knitted = stricken"
)
ANIMAL_ACTIVITIES = verbs(
    "sleep slept = schlafen ~schläf geschlafen, run ran run = laufen ~läuf gelaufen sein, "
    "jump = springen gesprungen sein, wait = warten, play = spielen, wake+up woke woken = auf+wachen sein"
)
COST = replace(verb("cost cost = kosten"), preterite=("kostete", "kostetest", "kostete", "kosteten", "kosteten"))
WEIGH = replace(verb("weigh = wiegen gewogen"), preterite=("wog", "wogst", "wog", "wogen", "wogen"))
TRADE = verbs("buy bought = kaufen, sell sold = verkaufen, repair = reparieren")
