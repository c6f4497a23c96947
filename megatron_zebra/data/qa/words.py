"""The words that facts are made of. Every fourth of each list is for held-out facts alone."""

from typing import Literal

Split = Literal["train", "valid"]

_LISTS = {
    "adjective": """amber ancient bitter brass broken bronze cedar copper coral crimson crystal distant dusty ebony emerald
        faded frozen gentle gilded golden granite hollow indigo iron ivory jade leaden lonely lunar marble misty narrow obsidian
        opal painted pale patient quiet rusty sapphire scarlet secret silent silver slate sleepy solemn stormy sunken tall
        tangled velvet violet wandering weathered willow wooden yellow""",
    "noun": """anchor badger beacon beetle bishop candle castle comet compass condor cricket dolphin dragon eagle falcon
        feather ferry fiddle fountain fox garden glacier harbour hawk heron horse island kettle lantern lark lion lizard lobster
        magnet meadow mirror mountain otter owl parrot pebble penguin pigeon pilgrim plough raven river saddle sailor sparrow
        spider stag statue swan thistle tiger tortoise trumpet turtle walrus whistle windmill wolf""",
    "first": """Abel Ada Agnes Alma Ambrose Anselm Basil Beatrix Bruno Celia Clement Cora Cyril Dagmar Delia Edgar Edith
        Edmund Elsa Emil Esther Felix Fergus Flora Gideon Gilbert Greta Harriet Hector Hilda Horace Ida Ingrid Irma Isidor
        Jasper Julius Konrad Leopold Lionel Lydia Mabel Magnus Matilda Miriam Morris Nestor Olga Oscar Otto Percy Philippa Quentin
        Rosalind Rufus Silas Stella Theodor Ursula Vera Victor Wanda Wilfred""",
    "last": """Abernathy Aldous Ashgrove Barlow Beckwith Bellamy Birch Blackwood Brannock Calloway Carver Cathcart Chilton
        Corwin Crane Dallow Danforth Draycott Dunmore Ellery Fairfax Farrow Fenwick Gadsby Garrick Glover Granger Hartnell Hathaway
        Hobbs Holloway Inglewood Kestrel Kirkby Lambourne Langley Lockhart Marlowe Merrick Milburn Nettleton Norwood Oakley Orwin
        Pemberton Penrose Quill Radcliffe Ravenhill Rushworth Selwyn Sharpe Stanhope Tarrant Thorne Tilbury Underhill Vance Wadham
        Weatherby Whitlock Winslow Wyndham Yarrow""",
    "town": """Aldermere Ashkarra Belvane Brightwater Calverstone Corrandale Dunharrow Eastmarch Elverum Fallowick Farnholm
        Galdport Glenmorran Greywick Halvorden Harrowgate Ilverness Ironbridge Karsholm Kelmouth Kingsfell Larkhaven Lindenau
        Lowmere Marrowdale Mossgate Netherby Northwold Oakhollow Orrinmouth Pellbrook Pinehurst Quarnford Ravensea Redwick Rosmarin
        Saltmarsh Selkirk Silverdene Southmoor Stonehythe Tarnwell Thornbury Ulverton Valdmoor Verrinport Westerfold Whitcliff
        Windermoor Wolvercote Wrenfield Yarmere""",
    "thing": """almanac astrolabe atlas barometer bell chalice charter chessboard clock codex coronet crown dagger diary flute
        globe goblet harp helmet hourglass inkwell key ledger locket manuscript map mask medal music-box necklace organ pendant
        portrait prism ring sceptre scroll seal sextant shield signet sundial sword tapestry telescope tiara treaty urn vase violin""",
    "room": """attic archive arsenal bakery barn boathouse brewery cellar chapel cloister courthouse crypt customs house dairy
        dovecote foundry gatehouse granary greenhouse guildhall hayloft infirmary inn laundry library lighthouse mint museum
        observatory orchard orphanage post office pottery print shop quarry rectory refectory sawmill schoolhouse smithy stable
        tannery tavern theatre toll house town hall treasury vault watchtower waterworks weavery winery""",
    "event": """assembly auction ball banquet carnival ceremony concert conference congress contest council debate eclipse
        election excursion exhibition expedition fair feast festival funeral gala hearing hunt inauguration inspection jubilee
        launch lecture market mass meeting mission opening opera pageant parade parley performance pilgrimage premiere procession
        race rally rehearsal regatta reunion review salon tournament trial voyage wedding workshop""",
}
_PAIRS = ("customs house", "post office", "print shop", "toll house", "town hall")


def _split(text: str) -> list[str]:
    for pair in _PAIRS:
        text = text.replace(pair, pair.replace(" ", "_"))
    return [word.replace("_", " ") for word in text.split()]


WORDS: dict[Split, dict[str, list[str]]] = {
    "train": {name: [w for n, w in enumerate(_split(text)) if n % 4 != 3] for name, text in _LISTS.items()},
    "valid": {name: [w for n, w in enumerate(_split(text)) if n % 4 == 3] for name, text in _LISTS.items()},
}
