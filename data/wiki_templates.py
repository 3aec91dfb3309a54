"""What the templates of English Wikipedia show inside a sentence, after their documentation there.

A few tables name the templates that show one of their arguments, a sign or a label; functions do those that compose
their text. An unknown template shows nothing, as most templates are notes, boxes and navigation. On purpose, and though
a reader sees it, nothing is shown for

* pronunciations (IPA, respelling, audio), coordinates, flags, signs that ask for a source ("citation needed"), and the
  language in which an article of a red link exists;
* what has to be calculated from the date of reading or from tables: ages today, inflation, converted units.

Numbers stay as they are written, without separators of thousands, and units are symbols: "12000 ft".
"""

import re

_MONTHS = "January February March April May June July August September October November December".split()
_FIRST = set(  # templates that show their first argument
    """formatnum num number nts nowrap nobr nwr nobold noitalic normal small smaller big larger large abbr abbrlink
    tooltip nihongo2 nihongo_foot em strong b i italic bold smallcaps sc sc1 sc2 sup sub math mvar var dfn underline
    u strike s strikethrough overline kbd key key_press keypress code mono tt samp typo chem2 visible_anchor vanchor
    anchored tq xt linktext unicode proper_name block_indent blockindent plainlist flatlist columns-list column_list
    flag flagcountry flagu center midsize highlight poem lower raise inline_block""".split()
)
_LAST = set(
    """transl transliteration translit script color colour font_color colored_text background_color resize font-size
    fontsize font sort hs""".split()
)
_FIXED = {
    "nbsp": " ", "space": " ", "thinsp": " ", "thin space": " ", "nnbsp": " ", "hair space": " ", "pad": " ",
    "spaced ndash": " – ", "snd": " – ", "spnd": " – ", "spaced en dash": " – ", "spaced mdash": " — ", "ndash": "–",
    "en dash": "–", "mdash": "—", "em dash": "—", "'": "'", "'s": "'s", "\"'": "\"'", "'\"": "'\"", "=": "=", "!": "|",
    "(": "{", ")": "}", "((": "{{", "))": "}}", "*": "*", "·": " · ", "dot": " · ", "middot": " · ", "•": " • ",
    "bullet": " • ", "minus": "−", "times": "×", "pm": "±", "degree": "°", "deg": "°", "ellipsis": "...", "pi": "π",
    "mu": "µ", "prime": "′", "pprime": "″", "half": "1/2", "dagger": "†", "double-dagger": "‡", "okina": "ʻ",
    "hamza": "ʾ", "ayin": "ʿ", "plus": "+", "hyphen": "-", "shy": "", "sharp": "♯", "flat": "♭", "euro": "€",
    "pound": "£", "gbp": "£", "usd": "US$", "euros": "€", "br": "\n", "break": "\n", "crlf": "\n", "pb": "\n",
    "paragraph break": "\n", "paragraph": "\n", "circa": "c. ", "c.": "c. ", "ca.": "c. ", "sic": "[sic]",
}  # fmt: skip
_PREFIXES = {
    "us$": "US$", "usd": "US$", "$": "$", "aud": "A$", "a$": "A$", "cad": "C$", "c$": "C$", "nz$": "NZ$", "gbp": "£",
    "£": "£", "gbp2": "£", "eur": "€", "€": "€", "euro": "€", "inr": "₹", "₹": "₹", "indian rupee": "₹", "¥": "¥",
    "jpy": "¥", "cny": "CN¥", "rmb": "CN¥", "krw": "₩", "floruit": "fl. ", "fl.": "fl. ", "fl": "fl. ", "isbn": "ISBN ",
    "issn": "ISSN ", "doi": "doi:", "hms": "HMS ", "rms": "RMS ", "uss": "USS ", "ss": "SS ", "hmas": "HMAS ",
    "hmcs": "HMCS ", "sms": "SMS ", "radic": "√", "sqrt": "√", "e": "×10^", "10^": "10^", "lit.": "lit. ",
}  # fmt: skip
_AROUND = {  # marks around the first argument
    "angbr": "⟨⟩", "angle bracket": "⟨⟩", "bracket": "[]", "brackets": "[]", "gloss": "''", "single quote": "''",
    "abs": "||", "paren": "()", "parentheses": "()", "double quote": '""',
}  # fmt: skip
_LANGUAGES = dict(
    part.split(":")
    for part in """af:Afrikaans ang:Old_English ar:Arabic be:Belarusian bg:Bulgarian bn:Bengali ca:Catalan cs:Czech
    cy:Welsh da:Danish de:German el:Greek en:English eo:Esperanto es:Spanish et:Estonian eu:Basque fa:Persian fi:Finnish
    fr:French ga:Irish gd:Scottish_Gaelic gl:Galician grc:Ancient_Greek he:Hebrew hi:Hindi hr:Croatian hu:Hungarian
    hy:Armenian id:Indonesian is:Icelandic it:Italian ja:Japanese ka:Georgian ko:Korean la:Latin lt:Lithuanian
    lv:Latvian mi:Māori mk:Macedonian ms:Malay mt:Maltese nl:Dutch no:Norwegian nb:Norwegian oc:Occitan pl:Polish
    pt:Portuguese ro:Romanian ru:Russian sa:Sanskrit sk:Slovak sl:Slovene sq:Albanian sr:Serbian sv:Swedish sw:Swahili
    ta:Tamil te:Telugu th:Thai tr:Turkish uk:Ukrainian ur:Urdu vi:Vietnamese yi:Yiddish zh:Chinese""".split()
)
_OTHER_SCRIPTS = set("ar be bg bn el fa grc he hi hy ja ka ko mk ru sa sr ta te th uk ur yi zh".split())
_PARSER_FUNCTIONS = {"formatnum": str, "uc": str.upper, "lc": str.lower,
                     "ucfirst": lambda text: text[:1].upper() + text[1:],
                     "lcfirst": lambda text: text[:1].lower() + text[1:]}  # fmt: skip
_PARSER_FUNCTION = re.compile(rf"({'|'.join(_PARSER_FUNCTIONS)}):(.*)", re.IGNORECASE | re.DOTALL)
_NAME_OF_ARGUMENT = re.compile(r"([\w -]*)=(.*)", re.DOTALL)


def shown(text):
    """Returns what {{text}} shows inside a sentence; "" for an unknown template."""
    name, *parts = (part.strip() for part in text.split("|"))
    if function := _PARSER_FUNCTION.match(name):
        return _PARSER_FUNCTIONS[function[1].lower()](function[2].strip())
    name = " ".join(name.lower().replace("_", " ").split())
    numbered, named = [], {}
    for part in parts:
        if key := _NAME_OF_ARGUMENT.match(part):
            named[key[1].strip()] = key[2].strip()
        else:
            numbered.append(part)
    for i in range(1, 10):  # {{nowrap|1=a = b}}
        if str(i) in named:
            numbered += [""] * (i - len(numbered))
            numbered[i - 1] = named[str(i)]
    if name in _FIXED and not any(numbered):
        return _FIXED[name]
    if name in _FUNCTIONS:
        return _FUNCTIONS[name](numbered, named)
    if re.fullmatch("lang-[a-z-]+", name):  # {{lang-fr|mot}}
        return _labelled([name.removeprefix("lang-"), *numbered], named)
    first = (numbered[0] if numbered else "") or named.get("text", "")
    if not first:
        return ""
    if name in _PREFIXES:
        return _PREFIXES[name] + first
    if name in _AROUND:
        return _AROUND[name][0] + first + _AROUND[name][-1]
    key = name.replace(" ", "_")
    return numbered[-1] if key in _LAST and numbered else first if key in _FIRST or key in _LAST else ""


# --- numbers ---

_RANGES = {"to": " to ", "-": "–", "–": "–", "to(-)": " to ", "to about": " to about ", "and": " and ",
           "and(-)": " and ", "or": " or ", "x": " by ", "by": " by ", "×": " × ", "*": " × ", "xx": " × ",
           "+/-": " ± ", "±": " ± ", "+": " + ", ",": ", "}  # fmt: skip
_UNITS = {"C": "°C", "F": "°F", "C-change": "°C", "F-change": "°F", "sqmi": "sq mi", "sqft": "sq ft", "sqyd": "sq yd",
          "sqin": "sq in", "cuft": "cu ft", "cuin": "cu in", "cuyd": "cu yd", "acre": "acres", "kph": "km/h",
          "usgal": "US gal", "U.S.gal": "US gal", "USgal": "US gal", "impgal": "imp gal", "inch": "in", "foot": "ft",
          "feet": "ft", "LT": "long tons", "ST": "short tons", "t": "tonnes", "oz": "oz"}  # fmt: skip
_PARTS = {("ft", "in"), ("yd", "ft"), ("mi", "yd"), ("mi", "ft"), ("mi", "chain"), ("lb", "oz"), ("st", "lb")}


def _quantity(numbered, named):
    """{{convert}}: the quantity that it is given, and its unit: "5 km", "2 to 3 ft", "5 ft 11 in", "a 5-mi run"."""
    if not numbered:
        return ""
    text, rest = numbered[0], numbered[1:]
    while len(rest) > 1 and rest[0] in _RANGES:
        text += _RANGES[rest[0]] + rest[1]
        rest = rest[2:]
    text = re.sub(r"(?<=\d)\+(?=\d+/)", " ", text).replace("//", "/")  # {{convert|3+1/2|in}}
    if not rest:
        return text
    adjective = named.get("adj") in ("on", "mid")
    joined = "-" if adjective else " "
    text += joined + _UNITS.get(rest[0], rest[0])
    while len(rest) > 2 and (rest[0], rest[2]) in _PARTS:
        text += f"{joined}{rest[1]}{joined}{_UNITS.get(rest[2], rest[2])}"
        rest = rest[2:]
    return text + numbered[-1] if named.get("adj") == "mid" and numbered[-1][:1] == "-" else text


def _value(numbered, named):
    """{{val|1.5|0.2|e=3|u=m}}: "(1.5±0.2)×10^3 m"."""
    if not any(numbered) and not named.get("e"):
        return ""
    number, *spread = numbered or [""]
    if len(spread) > 1:
        number += f" +{spread[0].lstrip('+')} −{spread[1].lstrip('-−')}"
    elif spread and spread[0]:
        number += spread[0] if spread[0][0] == "(" else f"±{spread[0]}"
    if power := named.get("e"):
        number = f"({number})" if len(spread) and "(" not in number else number
        number += f"{'×' * bool(number)}10^{power}"
    unit = named.get("u") or named.get("ul") or ""
    per = named.get("up") or named.get("upl")
    unit += f"/{per}" if per else ""
    unit = unit if unit[:1] in ("%", "°") and len(unit) == 1 else f" {unit}"
    return f"{named.get('p', '')}{number}{named.get('s', '')}{named.get('end', '')}{unit}".strip()


def _fraction(numbered, named):
    """{{frac|1|2}}: "1/2"; {{frac|3|1|2}}: "3 1/2"; {{frac|2}}: "1/2"."""
    if not numbered:
        return ""
    *whole, above, below = ["1", *numbered] if len(numbered) == 1 else numbered[:3]
    return " ".join([*whole, f"{above}/{below}"])


def _ordinal(numbered, named):
    if not numbered or not numbered[0].isdecimal():
        return ""
    number = numbered[0]
    ending = "th" if number[-2:-1] == "1" else {"1": "st", "2": "nd", "3": "rd"}.get(number[-1], "th")
    return number + ending


# --- dates ---


def _date(numbered, named):
    """{{birth date|1990|5|17}}: "May 17, 1990"; with df=y "17 May 1990"; parts may be missing."""
    year, month, day = (numbered + ["", "", ""])[:3]
    if month.isdecimal() and 1 <= int(month) <= 12:
        month = _MONTHS[int(month) - 1]
    day = day.lstrip("0")
    if not month or not day:
        return f"{month} {year}".strip()
    return f"{day} {month} {year}" if named.get("df", "no") not in ("", "no", "n") else f"{month} {day}, {year}"


def _years_between(first, last):
    """Returns the full years between two dates of 3 numbers, as text; "" where they are none."""
    try:
        first, last = tuple(map(int, first)), tuple(map(int, last))
    except ValueError:
        return ""
    return str(last[0] - first[0] - (last[1:] < first[1:]))


def _age(numbered, named):
    half = len(numbered) // 2
    return _years_between(numbered[:half], numbered[half:]) if len(numbered) in (2, 6) else ""


def _death(numbered, named):
    """{{death date and age|2000|1|2|1920|3|4}}: "January 2, 2000 (aged 79)"."""
    age = _years_between(numbered[3:6], numbered[:3]) if len(numbered) >= 6 else ""
    return _date(numbered, named) + (f" (aged {age})" if age else "")


def _as_of(numbered, named):
    if "alt" in named:
        return named["alt"]
    word = "since" if named.get("since") else "as of"
    word = "" if named.get("bare") else word if named.get("lc") else word.capitalize()
    return f"{word} {_date(numbered, {'df': 'y', **named})}".strip()


def _circa(numbered, named):
    years = [year for year in numbered if year]
    return " – ".join(f"c. {year}" for year in years) or "c. "


def _reign(numbered, named):
    return "r. " + " – ".join(numbered[:2])


# --- languages ---


def _labelled(numbered, named):
    """{{langx|ru|Москва|Moskva}}: "Russian: Москва, romanized: Moskva"; a literal translation follows."""
    code, text, *more = numbered + [""] * (2 - len(numbered))
    text = text or named.get("text", "")
    if not text:
        return ""
    latin = code.split("-")[0] not in _OTHER_SCRIPTS
    translit, literal = (["", *more, ""] if latin else [*more, "", ""])[:2]
    translit, literal = named.get("translit") or translit, named.get("lit") or named.get("translation") or literal
    label = named.get("label") or _language(code)
    label = "" if named.get("label") == "none" or not label else f"{label}: "
    return label + text + (f", romanized: {translit}" if translit else "") + (f", lit. '{literal}'" if literal else "")


def _language(code):
    return _LANGUAGES.get(code.split("-")[0], "").replace("_", " ")


def _native(numbered, named):
    """{{native name|fr|Nom}}: "Nom (French)"."""
    code, text = (numbered + ["", ""])[:2]
    language = _language(code)
    return f"{text} ({language})" if text and language else text


def _second(numbered, named):
    return numbered[min(1, len(numbered) - 1)] if numbered else named.get("text", "")


def _composed(order):
    """Returns a function that shows the first of some arguments and the others in parentheses."""

    def compose(numbered, named):
        numbered = numbered + [""] * (4 - len(numbered))
        parts = [numbered[i] for i in order] + [numbered[3] or named.get("extra", "")]
        first, *rest = [part for part in parts if part] or [""]
        if not parts[0] and len(order) == 3 and order[0] == 0:  # without English: Tōkyō (東京)
            first, *rest = [part for part in (numbered[2], numbered[1], parts[3]) if part] or [""]
        return f"{first} ({', '.join(rest)})" if rest else first

    return compose


def _chinese(numbered, named):
    """{{zh|t=|s=|p=}}: "simplified Chinese: ...; traditional Chinese: ...; pinyin: ..."."""
    labels = {"c": "Chinese", "s": "simplified Chinese", "t": "traditional Chinese", "p": "pinyin", "w": "Wade–Giles",
              "j": "Jyutping", "l": "lit."}  # fmt: skip
    known = {key: named[key] for key in labels if named.get(key)}
    texts = [f"{labels[key]} '{text}'" if key == "l" else f"{labels[key]}: {text}" for key, text in known.items()]
    return "; ".join(texts)


# --- others ---


def _quotation(numbered, named):
    """{{quote|text|author|source}}: the text, and on a line of its own who said it."""
    text = named.get("text") or named.get("quote") or (numbered[0] if numbered else "")
    author = named.get("author") or named.get("sign") or (numbered + ["", ""])[1]
    source = named.get("source") or named.get("title") or (numbered + ["", "", ""])[2]
    said = ", ".join(filter(None, (author, source)))
    return "" if not text else f"\n{text}\n— {said}\n" if said else f"\n{text}\n"


def _floating_quotation(numbered, named):  # its first argument is the side
    return _quotation(numbered[1:], named)


def _sic(numbered, named):
    text = "".join(numbered[:2])
    return text if named.get("hide") or named.get("nolink") == "hide" else f"{text} [sic]".strip()


def _link(numbered, named):
    return named.get("lt") or (numbered[0] if numbered else "")


def _section(numbered, named):
    return " § ".join(filter(None, numbered[:2]))


def _url(numbered, named):
    address, label = (numbered + ["", ""])[:2]
    return label or re.sub("^https?://", "", address)


def _author(numbered, named):
    """{{harvtxt|Smith|Jones|2001}}: "Smith & Jones (2001)"."""
    *names, year = numbered or [""]
    return f"{' & '.join(names)} ({year})" if names else ""


def _ship(numbered, named):
    """{{ship|HMS|Victory}}: "HMS Victory"."""
    return " ".join(filter(None, numbered[:2]))


def _joined(separator):
    return lambda numbered, named: separator.join(filter(None, numbered))


_NAMES_OF = {
    _quantity: "convert cvt",
    _value: "val",
    _fraction: "frac fraction sfrac",
    _ordinal: "ordinal",
    _date: "birth_date bda birth_date_and_age birth-date dob start_date start_date_and_age end_date death_date "
    "death-date film_date dts birth_year_and_age birth-date_and_age release_date_and_age date",
    _age: "age age_in_years ayd",
    _death: "death_date_and_age dda death-date_and_age",
    _as_of: "as_of asof",
    _circa: "circa c. ca.",
    _reign: "reign r.",
    _labelled: "langx",
    _native: "native_name native_phrase",
    _second: "lang wikt-lang",
    _composed((0, 1, 2)): "nihongo",
    _composed((2, 1, 0)): "nihongo3",
    _composed((1, 2, 0)): "nihongo_krt",
    _chinese: "zh lang-zh zh-cp",
    _quotation: "quote blockquote quotation cquote bquote quote_box poemquote quotebox block_quote",
    _floating_quotation: "rquote",
    _sic: "sic",
    _link: "ill interlanguage_link illm",
    _section: "section_link slink",
    _url: "url",
    _author: "harvtxt harvcoltxt",
    _ship: "ship",
    _joined(""): "chem not_a_typo",
    _joined(" "): "gaps",
    _joined(" · "): "hlist",
    _joined(", "): "cslist comma_separated_entries",
    _joined("\n"): "unbulleted_list ubl ublist bulleted_list ordered_list br_separated_entries",
    lambda numbered, named: f"lit. '{numbered[0]}'" if numbered else "": "lit literally",
    lambda numbered, named: {"sharp": "♯", "flat": "♭", "natural": "♮"}.get("".join(numbered[:1]), ""): "music",
}
_FUNCTIONS = {name.replace("_", " "): function for function, names in _NAMES_OF.items() for name in names.split()}
