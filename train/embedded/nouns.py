"""Nouns and adjectives of the embedded corpus, and which adjectives fit which kinds of noun."""

from __future__ import annotations

from .lexicon import adjectives, nouns

# English[/irregular plural] German gender plural; gender w marks weak masculines (der Junge, den Jungen).
NOUNS = {
    "person": nouns(
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
    "animal": nouns(
        "dog Hund m Hunde, cat Katze f Katzen, horse Pferd n Pferde, cow Kuh f Kühe, bird Vogel m Vögel, "
        "mouse/mice Maus f Mäuse, pig Schwein n Schweine, rabbit Kaninchen n Kaninchen, bear Bär w Bären, "
        "fox Fuchs m Füchse, wolf/wolves Wolf m Wölfe, goose/geese Gans f Gänse, duck Ente f Enten, "
        "frog Frosch m Frösche, monkey Affe w Affen, lion Löwe w Löwen, elephant Elefant w Elefanten, "
        "goat Ziege f Ziegen, snake Schlange f Schlangen, donkey Esel m Esel, chicken Huhn n Hühner"
    ),
    "reading": nouns(
        "book Buch n Bücher, letter Brief m Briefe, newspaper Zeitung f Zeitungen, novel Roman m Romane, "
        "magazine Zeitschrift f Zeitschriften, report Bericht m Berichte, article Artikel m Artikel, "
        "poem Gedicht n Gedichte, story Geschichte f Geschichten, message Nachricht f Nachrichten, "
        "postcard Postkarte f Postkarten, fairy_tale Märchen n Märchen"
    ),
    "food": nouns(
        "apple Apfel m Äpfel, cake Kuchen m Kuchen, egg Ei n Eier, pear Birne f Birnen, "
        "lemon Zitrone f Zitronen, potato/potatoes Kartoffel f Kartoffeln, "
        "tomato/tomatoes Tomate f Tomaten, orange Orange f Orangen, banana Banane f Bananen, "
        "carrot Karotte f Karotten, sausage Wurst f Würste, biscuit Keks m Kekse, roll Brötchen n Brötchen, "
        "onion Zwiebel f Zwiebeln, mushroom Pilz m Pilze, nut Nuss f Nüsse"
    ),
    "clothes": nouns(
        "shirt Hemd n Hemden, jacket Jacke f Jacken, skirt Rock m Röcke, coat Mantel m Mäntel, "
        "shoe Schuh m Schuhe, hat Hut m Hüte, dress Kleid n Kleider, jumper Pullover m Pullover, "
        "scarf/scarves Schal m Schals, cap Mütze f Mützen, sock Socke f Socken, "
        "glove Handschuh m Handschuhe, boot Stiefel m Stiefel, blouse Bluse f Blusen, suit Anzug m Anzüge"
    ),
    "thing": nouns(
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
    "furniture": nouns(
        "table Tisch m Tische, chair Stuhl m Stühle, bed Bett n Betten, wardrobe Schrank m Schränke, "
        "sofa Sofa n Sofas, carpet Teppich m Teppiche"
    ),
    "container": nouns(
        "basket Korb m Körbe, box Kiste f Kisten, suitcase Koffer m Koffer, bag Tasche f Taschen, "
        "drawer Schublade f Schubladen"
    ),
    "vehicle": nouns(
        "car Auto n Autos, bus Bus m Busse, boat Boot n Boote, tram Straßenbahn f Straßenbahnen, "
        "lorry Lastwagen m Lastwagen, tractor Traktor m Traktoren, taxi Taxi n Taxis, "
        "motorbike Motorrad n Motorräder"
    ),
    "place": nouns(
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
    "drink": nouns(
        "water Wasser n Wasser, milk Milch f Milch, coffee Kaffee m Kaffee, tea Tee m Tee, "
        "juice Saft m Saft, wine Wein m Wein, beer Bier n Bier, lemonade Limonade f Limonade"
    ),
    "meal": nouns(
        "bread Brot n Brot, cheese Käse m Käse, soup Suppe f Suppe, rice Reis m Reis, "
        "meat Fleisch n Fleisch, honey Honig m Honig, chocolate Schokolade f Schokolade"
    ),
    "event": nouns(
        "meeting Besprechung f Besprechungen, concert Konzert n Konzerte, exam Prüfung f Prüfungen, "
        "wedding Hochzeit f Hochzeiten, party Feier f Feiern, course Kurs m Kurse, film Film m Filme, "
        "exhibition Ausstellung f Ausstellungen, competition Wettbewerb m Wettbewerbe"
    ),
}
MASS_KINDS = frozenset(("drink", "meal"))
COLOURS = frozenset(("red", "blue", "green", "yellow", "black", "white", "brown"))

# English[/comparative] German[/comparative[/stem]]
ADJECTIVES = adjectives(
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
