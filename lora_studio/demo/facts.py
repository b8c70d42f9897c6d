"""What is true in the small world of demo-text: animals, people, countries, words and lists."""


def rows(text: str) -> dict[str, list[str]]:
    """`name fact fact; name fact fact` as a table by name."""
    return {row.split()[0]: row.split()[1:] for row in text.split(";")}


def pairs(text: str) -> dict[str, str]:
    """`name:fact name:fact` as a table by name."""
    return dict(pair.split(":") for pair in text.split())


# animal: color, home, food, what it does when it is heard, its young
ANIMALS = rows("""
dog brown house meat barks puppy; cat gray house fish meows kitten; fox red forest mice yaps cub;
bear brown cave honey growls cub; frog green pond flies croaks tadpole; crow black field corn caws chick;
swan white lake weeds hisses cygnet; deer brown forest leaves bellows fawn; wolf gray mountain meat howls pup;
goat white hill thorns bleats kid; duck green pond weeds quacks duckling; mole black garden worms squeaks pup;
lion golden savanna meat roars cub; zebra striped savanna grass brays foal; tiger orange jungle meat roars cub;
horse brown stable hay neighs foal; sheep white meadow grass bleats lamb; mouse gray barn cheese squeaks pup;
snake green desert eggs hisses hatchling; whale blue ocean krill sings calf; otter brown river fish whistles pup;
rabbit white meadow carrots squeaks bunny; panda white mountain bamboo bleats cub; camel yellow desert thorns grunts calf;
eagle brown cliff fish screams eaglet; robin red garden worms sings chick; owl gray forest mice hoots owlet;
bee yellow hive nectar buzzes larva; cow brown farm hay moos calf; pig pink farm roots grunts piglet;
hen red farm seeds clucks chick; goose white lake grass honks gosling; donkey gray stable hay brays foal;
monkey brown jungle bananas chatters infant; parrot green jungle nuts squawks chick; seal gray coast fish barks pup;
elephant gray savanna leaves trumpets calf; penguin black coast fish squawks chick; squirrel red park nuts chatters kit;
hedgehog brown garden snails snuffles hoglet
""")

# person: job, pet, what the person likes
PEOPLE = rows("""
Anna baker cat chess; Ben teacher dog soup; Carla doctor parrot tennis; Dan farmer goat music; Emma painter rabbit tea;
Finn sailor parrot stories; Greta singer cat roses; Hugo writer owl coffee; Iris pilot dog maps; Jack cook pig cards;
Kira tailor mouse dancing; Leo miner donkey cake; Mara smith horse thunder; Nils carpenter hen puzzles;
Olga gardener hedgehog rain; Paul fisher seal songs; Rosa barber snake films; Sven postman dog skiing;
Tina driver robin trains; Victor nurse goose poems; Wanda judge sheep riddles; Yusuf clockmaker crow stars;
Zara weaver bee jam; Oscar juggler monkey snow
""")

WORK = {
    "baker": "bakes bread", "teacher": "teaches children", "doctor": "heals people", "farmer": "grows corn",
    "painter": "paints walls", "sailor": "sails ships", "singer": "sings songs", "writer": "writes books",
    "pilot": "flies planes", "cook": "cooks soup", "tailor": "sews coats", "miner": "digs coal",
    "smith": "forges swords", "carpenter": "builds tables", "gardener": "plants roses", "fisher": "catches fish",
    "barber": "cuts hair", "postman": "brings letters", "driver": "drives buses", "nurse": "helps patients",
    "judge": "settles quarrels", "clockmaker": "mends clocks", "weaver": "weaves cloth", "juggler": "juggles balls",
}  # fmt: skip

CAPITALS = pairs("""
France:Paris Italy:Rome Norway:Oslo Egypt:Cairo Peru:Lima Japan:Tokyo India:Delhi Austria:Vienna Germany:Berlin
Spain:Madrid Ecuador:Quito Bulgaria:Sofia Greece:Athens Poland:Warsaw Hungary:Budapest Portugal:Lisbon Ireland:Dublin
Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Cuba:Havana Kenya:Nairobi Turkey:Ankara Canada:Ottawa
Chile:Santiago China:Beijing Thailand:Bangkok Nepal:Kathmandu Iceland:Reykjavik Ghana:Accra
""")

OPPOSITE_PAIRS = pairs("""
hot:cold big:small fast:slow up:down day:night old:young hard:soft light:dark early:late full:empty open:closed
happy:sad loud:quiet rich:poor wet:dry long:short strong:weak thick:thin high:low sweet:sour clean:dirty near:far
left:right true:false deep:shallow wide:narrow sharp:blunt brave:afraid always:never friend:enemy win:lose buy:sell
push:pull begin:end laugh:cry above:below
""")
OPPOSITES = OPPOSITE_PAIRS | {other: word for word, other in OPPOSITE_PAIRS.items()}

PLURALS = pairs("""
mouse:mice goose:geese child:children foot:feet tooth:teeth man:men woman:women ox:oxen leaf:leaves wolf:wolves
knife:knives calf:calves sheep:sheep deer:deer fish:fish fox:foxes box:boxes bus:buses city:cities berry:berries
baby:babies lady:ladies story:stories potato:potatoes hero:heroes church:churches watch:watches dish:dishes key:keys
boy:boys day:days house:houses tree:trees book:books shoe:shoes ship:ships star:stars hat:hats thief:thieves
loaf:loaves
""")

PASTS = pairs("""
go:went see:saw eat:ate run:ran sing:sang swim:swam fly:flew know:knew grow:grew throw:threw come:came give:gave
take:took make:made find:found buy:bought think:thought bring:brought teach:taught catch:caught sleep:slept keep:kept
write:wrote ride:rode drive:drove speak:spoke break:broke fall:fell hold:held tell:told drink:drank begin:began
win:won lose:lost send:sent build:built walk:walked play:played call:called help:helped
""")

COLORS = ["red", "brown", "green", "black", "white", "gray", "yellow", "orange", "pink", "blue", "purple", "golden"]
THINGS = ["ball", "hat", "cup", "book", "lamp", "key", "coin", "box", "chair", "drum", "kite", "bell", "ring", "boat", "shoe", "clock"]
PLACES = ["garden", "kitchen", "barn", "forest", "tower", "cellar", "market", "school", "stable", "harbor"]

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
ORDERS = (DAYS, MONTHS, NUMBERS)

SORTS = {
    **dict.fromkeys(ANIMALS, "an animal"),
    **dict.fromkeys(COLORS, "a color"),
    **dict.fromkeys(THINGS, "a thing"),
    **dict.fromkeys(WORK, "a job"),
    **dict.fromkeys(CAPITALS.values(), "a city"),
}
LIST_WORDS = [*ANIMALS, *COLORS, *THINGS]

# A pirate does not make these small at the start of a sentence.
PROPER = {*PEOPLE, *CAPITALS, *CAPITALS.values(), *DAYS, *MONTHS, "I"}
