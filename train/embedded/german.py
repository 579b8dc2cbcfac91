"""German inflection and number words.

Cases, genders and persons are small integers that index the ending tables below, which are printed as a
grammar book prints them: a row for each case, a column for masculine, feminine, neuter, plural.
"""

from __future__ import annotations

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


def weak_participle(prefix: str, infinitive: str) -> str:
    stem = infinitive[:-1] if infinitive.endswith(("eln", "ern")) else infinitive[:-2]
    bare = not prefix and infinitive.startswith(("be", "ver", "er", "ent", "zer", "ge", "über", "um"))
    return prefix + ("" if bare or infinitive.endswith("ieren") else "ge") + stem + _link(stem) + "t"
