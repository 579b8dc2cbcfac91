"""Vocabulary entries are inflected as dictionaries list them."""

from __future__ import annotations

import pytest

from tritonsparse.train.embedded import german as de
from tritonsparse.train.embedded import verbs
from tritonsparse.train.embedded.nouns import ADJECTIVES, NOUNS

VERBS = {
    verb.infinitive: verb
    for found in (
        *verbs.TRANSITIVE.values(), *verbs.PREPOSITIONAL_VERBS.values(), verbs.DATIVE_VERBS, verbs.DITRANSITIVE,
        verbs.MOTION, verbs.PUT, verbs.STAND, verbs.ACTIVITIES, verbs.EVENTS, verbs.ANIMAL_ACTIVITIES,
        (verbs.BE, verbs.HAVE, verbs.COST, verbs.WEIGH),
    )
    for verb in found
}  # fmt: skip


def test_the_vocabulary_has_several_hundred_stems() -> None:
    assert sum(map(len, NOUNS.values())) + len(VERBS) + len(ADJECTIVES) > 350


# infinitive: ich, du, er, participle (with its auxiliary in the third person)
@pytest.mark.parametrize(
    ("infinitive", "forms"),
    [
        ("kaufen", "kaufe kaufst kauft hat gekauft"),
        ("arbeiten", "arbeite arbeitest arbeitet hat gearbeitet"),
        ("öffnen", "öffne öffnest öffnet hat geöffnet"),
        ("tanzen", "tanze tanzt tanzt hat getanzt"),
        ("sehen", "sehe siehst sieht hat gesehen"),
        ("lesen", "lese liest liest hat gelesen"),
        ("essen", "esse isst isst hat gegessen"),
        ("schlafen", "schlafe schläfst schläft hat geschlafen"),
        ("helfen", "helfe hilfst hilft hat geholfen"),
        ("einladen", "lade lädst lädt hat eingeladen"),
        ("behalten", "behalte behältst behält hat behalten"),
        ("wandern", "wandere wanderst wandert ist gewandert"),
        ("bügeln", "bügle bügelst bügelt hat gebügelt"),
        ("reparieren", "repariere reparierst repariert hat repariert"),
        ("besuchen", "besuche besuchst besucht hat besucht"),
        ("aufstehen", "stehe stehst steht ist aufgestanden"),
        ("anbieten", "biete bietest bietet hat angeboten"),
        ("zuhören", "höre hörst hört hat zugehört"),
        ("umarmen", "umarme umarmst umarmt hat umarmt"),
        ("folgen", "folge folgst folgt ist gefolgt"),
        ("beten", "bete betest betet hat gebetet"),
        ("anprobieren", "probiere probierst probiert hat anprobiert"),
        ("gehen", "gehe gehst geht ist gegangen"),
        ("vergessen", "vergesse vergisst vergisst hat vergessen"),
        ("sein", "bin bist ist ist gewesen"),
        ("haben", "habe hast hat hat gehabt"),
    ],
)
def test_verbs_are_conjugated(infinitive: str, forms: str) -> None:
    verb = VERBS[infinitive]
    assert " ".join((*verb.present[:3], verb.perfect[de.ER], verb.participle)) == forms


@pytest.mark.parametrize(
    ("adjective", "english", "german"),
    [
        ("good", "better", "besser"),
        ("old", "older", "älter"),
        ("big", "bigger", "größer"),
        ("tired", "more tired", "müder"),
        ("expensive", "more expensive", "teurer"),
        ("poor", "poorer", "ärmer"),
        ("dark", "darker", "dunkler"),
    ],
)
def test_comparatives(adjective: str, english: str, german: str) -> None:
    found = ADJECTIVES[adjective]
    assert (found.en_comparative, found.de_comparative) == (english, german)
