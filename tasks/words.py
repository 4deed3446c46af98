"""Words that generated tasks are made of: capitalised single words, so that a name is one token everywhere."""

from __future__ import annotations

PEOPLE = tuple(
    """
    Adam Alan Alba Alma Amos Andy Anna Arlo Arne Asta Beth Bill Bob Boris Bruno Carl Cara Carmen Cecil Clara
    Cora Dale Dan Dana Dave Dean Diana Dora Doris Duncan Earl Edgar Edith Elena Eli Elsa Emil Emma Eric Erna
    Ethan Eva Fay Felix Fiona Flora Frank Fred Freya Gail Gary Gina Glen Grace Greta Gus Hana Hank Hans Hazel
    Heidi Helen Henry Hilda Hugo Ida Igor Ike Ilse Inga Ira Irene Iris Ivan Ivy Jack Jade Jake James Jane
    Jason Jean Jill Joan Joel John Jonas Jose Joy Juan Jude Judy Julia June Karen Karl Kate Keith Kim Kurt
    Kyle Lara Lars Laura Lea Lena Leo Lily Linda Lisa Lois Lola Lucas Lucy Luis Luke Luna Lydia Mabel Marc
    Maria Mark Mary Max May Maya Mila Mina Mona Nadia Nell Nick Nina Noah Nora Norman Olga Oliver Omar Oscar
    Otto Owen Pablo Pam Paul Paula Perry Pete Phil Pia Polly Rita Robin Roger Roman Rosa Ross Roy Ruby Rudy
    Ruth Ryan Sally Sam Sara Scott Sean Simon Sofia Sonia Stan Stella Sven Tara Ted Tess Theo Tim Tina Toby
    Todd Tom Tony Uma Una Ursula Vera Vic Viola Wade Walt Wanda Ward Wendy Will Yana Yuri Zara Zelda Zoe
    """.split()  # noqa: SIM905 (a word list reads better as text)
)
PLACES = tuple(
    """
    Accra Agra Aleppo Algiers Amman Ankara Athens Austin Baku Bari Basel Beirut Berlin Bern Bogota Bonn Boston
    Bremen Brest Bristol Cadiz Cairo Calais Cannes Chester Cologne Cork Cuzco Dakar Dallas Davos Delhi Denver
    Derby Dover Dresden Dublin Durban Essen Florence Gdansk Geneva Genoa Ghent Glasgow Granada Graz Hague
    Halle Hamburg Hanoi Havana Houston Hull Jena Kabul Kiel Kiev Kobe Krakow Lagos Lahore Leeds Leipzig Leon
    Liege Lille Lima Linz Lisbon Liverpool London Lucca Lund Lusaka Lyon Macon Madrid Malmo Manila Medina Metz
    Miami Milan Minsk Mumbai Munich Murcia Nantes Naples Nice Odessa Oran Orlando Osaka Oslo Oxford Padua
    Palermo Parma Patna Perth Petra Pisa Porto Prague Quebec Quito Reno Riga Rome Rouen Salem Salta Seattle
    Seoul Seville Siena Sofia Split Tampa Tangier Tirana Tokyo Toledo Toronto Tours Trent Trier Tulsa Tunis
    Turin Utrecht Valencia Verona Vienna Vilnius Warsaw York Zagreb Zurich
    """.split()  # noqa: SIM905 (a word list reads better as text)
)
THINGS = ("apples", "books", "cards", "coins", "cups", "eggs", "keys", "nuts", "pens", "shells", "stamps", "stones")
