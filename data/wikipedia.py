"""MediaWiki XML dump -> plain text: articles only, without redirects and without most of the markup.

The text is what a reader of the page sees, with one line per paragraph, list item and heading, except that these are
left out on purpose: tables, pictures and galleries with their captions, formulas, listings of code, footnotes and their
marks, infoboxes, notes above and below an article, headings without text below, brackets that nothing closes, numbers
of links without text, and what data/wiki_templates.py names.
A power of ten keeps its mark, "10^8"; other superscripts and subscripts are plain, "H2O".

The markup is parsed in one pass with a stack, so any input takes linear time, including the many unclosed brackets of
Wikipedia.
"""

import html
import re
import xml.etree.ElementTree

from data.wiki_templates import shown
from minidistil.errors import UserError

_NAMESPACE = re.compile(rb'<namespace key="(-2|6|14)"[^<>]*>([^<>]*)</namespace>')  # Media, File, Category
_REDIRECT = re.compile(r"\s*#redirect\b", re.IGNORECASE)
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
            texts = [text.text or "" for text in page.findall("revision/text")[-1:]]
            documents += [plain(text, dropped) for text in texts if not _REDIRECT.match(text)]
    return documents


# opening and closing marks of nested parts, and elements whose contents are not wiki markup
_RAW = "ref|math|chem|ce|nowiki|pre|source|syntaxhighlight|timeline|gallery|score|hiero|imagemap|graph|templatedata"
_TOKEN = re.compile(
    rf"\{{\{{|\}}\}}|\[\[|\]\]|<!--|<(?P<raw>{_RAW})\b[^<>]*>|^[ \t:*#;]*(?P<table>\{{\|)|^[ \t]*\|\}}(?!\}})",
    re.MULTILINE | re.IGNORECASE,
)
_OPENS = {"}}": "{{", "]]": "[[", "|}": "{|"}
_DEEPEST = 100  # deeper nesting is noise, and its text would be copied at every level
_EXTERNAL = re.compile(r"\[(?:(?:https?:|ftp:)?//|mailto:)[^\s\[\]]*[ \t]*([^\[\]\n]*)\]")
_LANGUAGE = re.compile(r"\s*(?:[a-z]{2,3}(?:-[a-z-]+)?|simple):\S")  # [[fr:Chat]], but not [[Up: A film]]
_MEDIA = re.compile(
    r"\.(?:jpe?g|png|svg|gif|tiff?|webp|og[agv]|webm|mpe?g|pdf|djvu|xcf|midi?|flac|opus|mp3|wav|stl)$", re.IGNORECASE
)
_MARKUP = str.maketrans({c: f"&#{ord(c)};" for c in "'<>[]{}|=*#:;_!-"})
_INNER = str.maketrans({c: f"&#{ord(c)};" for c in "|="})  # what would part the arguments of an outer template


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
        return opener, "".join(parts)

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
                        frames[-1][1].append(markup[position : end.start()].translate(_MARKUP))
                    position = end.end()
        elif mark in depth and len(frames) < _DEEPEST:
            frames.append((mark, []))
            depth[mark] += 1
        elif mark in _OPENS and depth[_OPENS[mark]]:
            while frames[-1][0] != _OPENS[mark]:  # opened inside but never closed: plain text
                inner = _unclosed(*close())
                frames[-1][1].append(inner)
            text = close()[1]
            text = _link(text, dropped) if mark == "]]" else shown(text) if mark == "}}" else ""
            frames[-1][1].append(text.translate(_INNER) if depth["{{"] else text)
    frames[-1][1].append(markup[position:])
    return "".join(_unclosed(opener, "".join(parts)) for opener, parts in frames)


def _unclosed(opener, text):
    """Returns the text after a mark that nothing closes; the first line of a table is its attributes."""
    return text.partition("\n")[2] if opener == "{|" else text


def _link(text, dropped):
    """Returns what [[text]] shows: "cats" for [[Felidae|cats]], nothing for a file, a category or another language."""
    target, _, label = text.partition("|")
    prefix = target.partition(":")[0].strip().lower() if ":" in target else ""
    if prefix in dropped or _LANGUAGE.match(target) and not label:
        return ""
    if prefix and target.count(":") == 1 and prefix != "special" and _MEDIA.search(target.strip()):
        return ""  # a file by an older name of its namespace, which no dump lists; one of another wiki has two colons
    return label or target.lstrip(":")


_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_BREAK = re.compile(r"<(?:br|hr|/?p|/?div|/?blockquote|/?li)\b[^<>]*>", re.IGNORECASE)
_POWER = re.compile(r"(?<=\d)<sup\b[^<>]*>\s*(?=[+−–-]?\d+\s*</sup>)", re.IGNORECASE)
_HEADING = re.compile(r"={1,6}[^=]")
_REMNANTS = [  # of dropped parts in parentheses: "Rome ( ; ) is"
    (re.compile(pattern), new)
    for pattern, new in (
        (r" ?\( ?(?:[,;:] ?)*\)", ""),
        (r"\( ?(?:[,;] ?)+", "("),
        (r"(?: ?[,;])+ ?\)", ")"),
        (r"; ?(?:; ?)+", "; "),
    )
]


def _lines(text):
    """Returns text without inline markup, blank lines, and headings without text below."""
    text = _TAG.sub("", _POWER.sub("^", _BREAK.sub("\n", _EXTERNAL.sub(r"\1", text))))
    kept, heading = [], []
    for line in text.split("\n"):
        line = line.strip()
        if _HEADING.match(line) and line.endswith("="):
            heading = [_readable(line.strip("= "))]
        elif line and line[0] not in "|!{}" and line.strip("-"):  # rows of a table that was never closed, rules
            term, mark, definition = line.partition(" : ") if line[0] == ";" else (line, "", "")
            for part in (term, definition):
                if part := _readable(part.lstrip("*#:; ")):
                    kept += [*heading, part]
                    heading = []
    return "\n".join(kept)


def _readable(line):
    """Returns a line without quotes for bold and italics, magic words, entities and remnants."""
    line = html.unescape(re.sub("'{2,}|__[A-Z]+__", "", line)).replace("\xa0", " ")
    if "(" in line or ";" in line:
        for pattern, new in _REMNANTS:
            line = pattern.sub(new, line)
    return re.sub(" {2,}", " ", line).strip()
