"""MediaWiki XML dump -> plain text: articles only, without redirects and without most of the markup.

The markup is parsed in one pass with a stack, so any input takes linear time, including the many unclosed brackets of
Wikipedia.
"""

import html
import re
import xml.etree.ElementTree

from minidistil.errors import UserError

_NAMESPACE = re.compile(rb'<namespace key="(-2|6|14)"[^<>]*>([^<>]*)</namespace>')  # Media, File, Category
_DROPPED_LINKS = {"media", "file", "image", "category"}


def dropped_links(header):
    """Returns the prefixes of links without text (file, category ...), in English and in the language of the dump."""
    return _DROPPED_LINKS | {name.decode("utf-8", "replace").lower() for _, name in _NAMESPACE.findall(header)}


def articles(payload):
    """Returns the texts of the articles in some `<page>` elements; `payload` is (path, XML bytes, dropped_links)."""
    path, data, dropped = payload
    try:
        pages = data[max(data.find(b"<page"), 0) :].decode("utf-8")
        root = xml.etree.ElementTree.fromstring(f"<pages>{pages}</pages>")
    except (UnicodeDecodeError, xml.etree.ElementTree.ParseError) as error:
        raise UserError(f"{path} is not a MediaWiki dump ({error}): fetch it again") from None
    documents = []
    for page in root:
        if page.findtext("ns", "0") == "0" and page.find("redirect") is None:
            documents += [plain(text.text or "", dropped) for text in page.findall("revision/text")[-1:]]
    return documents


# opening and closing marks of nested parts, and elements whose contents are not wiki markup
_RAW = "ref|math|chem|ce|nowiki|pre|source|syntaxhighlight|timeline|gallery|score|hiero|imagemap|graph|templatedata"
_TOKEN = re.compile(
    rf"\{{\{{|\}}\}}|\[\[|\]\]|<!--|<(?P<raw>{_RAW})\b[^<>]*>|^[ \t:*#;]*(?P<table>\{{\|)|^[ \t]*\|\}}(?!\}})",
    re.MULTILINE | re.IGNORECASE,
)
_OPENS = {"}}": "{{", "]]": "[[", "|}": "{|"}
_DEEPEST = 100  # deeper nesting is noise, and its text would be copied at every level
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\[\]]*[ \t]*([^\[\]\n]*)\]")


def plain(markup, dropped=frozenset(_DROPPED_LINKS)):
    """Returns wiki markup as plain text: one line per paragraph, list item and heading."""
    # external links twice: one may be in the caption of a picture, and a link in the label of one
    return _lines(_nested(_EXTERNAL.sub(r"\1", markup), dropped))


def _nested(markup, dropped):
    """Returns `markup` without templates, tables, comments and raw elements, and with links as the text they show."""
    frames = [("", [])]  # (opening mark, text so far)
    depth = {"{{": 0, "[[": 0, "{|": 0}
    endless = set()  # raw elements without a closing tag in the rest: searching again would take quadratic time

    def close():
        opener, parts = frames.pop()
        depth[opener] -= 1
        return "".join(parts)

    position = 0
    while token := _TOKEN.search(markup, position):
        frames[-1][1].append(markup[position : token.start()])
        position = token.end()
        mark = "{|" if token["table"] else token[0].strip()
        if mark == "<!--":
            end = markup.find("-->", position)
            position = end + 3 if end >= 0 else len(markup)  # as MediaWiki does
        elif token["raw"]:
            if not mark.endswith("/>"):
                name = token["raw"].lower()
                end = None if name in endless else re.compile(f"</{name}\\s*>", re.IGNORECASE).search(markup, position)
                if end is None:
                    endless.add(name)
                else:
                    if name == "nowiki":
                        frames[-1][1].append(markup[position : end.start()])
                    position = end.end()
        elif mark in depth and len(frames) < _DEEPEST:
            frames.append((mark, []))
            depth[mark] += 1
        elif mark in _OPENS and depth[_OPENS[mark]]:
            while frames[-1][0] != _OPENS[mark]:  # opened inside but never closed: plain text
                inner = close()
                frames[-1][1].append(inner)
            text = close()
            shown = _link(text, dropped) if mark == "]]" else _template(text) if mark == "}}" else ""
            frames[-1][1].append(shown)
    frames[-1][1].append(markup[position:])
    return "".join(part for _, parts in frames for part in parts)


def _link(text, dropped):
    """Returns what [[text]] shows: "cats" for [[Felidae|cats]], nothing for a file, a category or another language."""
    target, _, label = text.partition("|")
    prefix = target.partition(":")[0].strip().lower() if ":" in target else ""
    if prefix in dropped or (2 <= len(prefix) <= 3 and not label):  # [[fr:Chat]]
        return ""
    return label or target.lstrip(":")


_FIRST = set(  # templates that show their first argument
    """formatnum num val nowrap nobr j small smaller big larger abbr abbrlink tooltip nihongo nihongo2 quote blockquote
    quotation cquote rquote quote_box bquote sic angbr strong em b i italic smallcaps sc sc2 sup sub mvar math var
    underline u kbd code typo ill interlanguage_link illm visible_anchor vanchor tq linktext nts number""".split()
)
_LAST = set("lang langx transl transliteration translit script color colour font_color colored_text".split())
_FIXED = {
    "nbsp": " ", "space": " ", "spaced ndash": " – ", "snd": " – ", "spnd": " – ", "ndash": "–", "mdash": "—", "'": "'",
    "'s": "'s", "=": "=", "·": " · ", "•": " • ", "minus": "−", "times": "×", "degree": "°", "ellipsis": "...",
    "pi": "π", "mu": "µ", "prime": "′", "pprime": "″", "half": "1/2",
}  # fmt: skip
_PREFIXES = {"us$": "US$", "usd": "US$", "$": "$", "gbp": "£", "£": "£", "eur": "€", "€": "€", "inr": "₹", "¥": "¥",
             "circa": "c. ", "c.": "c. ", "as of": "As of "}  # fmt: skip
_RANGES = {"to": "to", "-": "to", "–": "to", "to(-)": "to", "and": "and", "and(-)": "and", "or": "or", "x": "by",
           "by": "by", "×": "by", "+/-": "±", "±": "±"}  # fmt: skip
_PARSER_FUNCTION = re.compile(r"(?:formatnum|uc|lc|ucfirst|lcfirst):(.*)", re.IGNORECASE | re.DOTALL)  # MediaWiki's
_NAME_OF_ARGUMENT = re.compile(r"([\w -]*)=(.*)", re.DOTALL)


def _template(text):
    """Returns what a template shows inside a sentence; "" for an unknown template."""
    name, *arguments = (part.strip() for part in text.split("|"))
    if function := _PARSER_FUNCTION.match(name):
        return function[1].strip()
    name, shown, named = name.lower().replace("_", " "), [], {}
    for argument in arguments:
        if key := _NAME_OF_ARGUMENT.match(argument):
            named[key[1].strip()] = key[2].strip()
        else:
            shown.append(argument)
    shown += [named[key] for key in ("1", "2", "3", "text", "quote") if named.get(key)]
    if name in _FIXED or not shown:
        return _FIXED.get(name, "")
    if name in ("convert", "cvt"):
        return _quantity(shown)
    if name in ("frac", "fraction", "sfrac"):
        return _fraction(shown)
    if name in _PREFIXES:
        return _PREFIXES[name] + shown[0]
    if name.replace(" ", "_") in _LAST:
        return shown[-1] if name not in ("lang", "langx") else shown[min(1, len(shown) - 1)]
    if name.replace(" ", "_") in _FIRST or re.fullmatch("lang-[a-z-]+", name):  # {{lang-fr|mot}}
        return f"{shown[0]} {named.get('u', named.get('ul', '')) if name == 'val' else ''}".strip()
    return ""


def _quantity(arguments):
    """Returns the quantity that {{convert}} is given, and its unit: "5 km", "2 to 3 ft"."""
    first, *rest = arguments
    shown = [first]
    while len(rest) > 1 and rest[0] in _RANGES:
        shown += [_RANGES[rest[0]], rest[1]]
        rest = rest[2:]
    return " ".join(shown + rest[:1])


def _fraction(arguments):
    """Returns {{frac|1|2}} as "1/2", {{frac|3|1|2}} as "3 1/2" and {{frac|2}} as "1/2"."""
    *whole, above, below = ["1", *arguments] if len(arguments) == 1 else arguments[:3]
    return " ".join([*whole, f"{above}/{below}"])


_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_BREAK = re.compile(r"<br\b[^<>]*>", re.IGNORECASE)
_HEADING = re.compile(r"={1,6}[^=]")


def _lines(text):
    """Returns text without inline markup, blank lines, and headings without text below."""
    text = _TAG.sub("", _BREAK.sub("\n", _EXTERNAL.sub(r"\1", text)))
    kept, heading = [], []
    for line in html.unescape(text).replace("\xa0", " ").split("\n"):
        line = line.strip()
        if _HEADING.match(line) and line.endswith("="):
            heading = [line.strip("= ")]
            continue
        line = re.sub("'{2,}|__[A-Z]+__", "", line.lstrip("*#:; "))
        line = re.sub(r"\( ?[,;:]? ?\)", "", line)  # left by a dropped template: "Rome ( ; ) is"
        line = re.sub(r"\( ?[,;] ?", "(", line)
        line = re.sub(r" {2,}", " ", line).strip()
        if line and line[0] not in "|!{}":  # rows of a table that was never closed
            kept += [*heading, line]
            heading = []
    return "\n".join(kept)
