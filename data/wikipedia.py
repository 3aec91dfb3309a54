"""A MediaWiki XML dump to readable text: articles only, without redirects, and without most of the markup.

The markup is read in one pass with a stack, so that any input takes linear time: unclosed brackets included, of
which Wikipedia has many.
"""

import html
import re
import xml.etree.ElementTree

from minidistil.errors import UserError

_NAMESPACE = re.compile(rb'<namespace key="(-2|6|14)"[^<>]*>([^<>]*)</namespace>')  # Media, File, Category
_DROPPED_LINKS = {"media", "file", "image", "category"}


def dropped_links(header):
    """Returns the prefixes of links that show no text: file, category, in English and in the language of this dump."""
    return _DROPPED_LINKS | {name.decode("utf-8", "replace").lower() for _, name in _NAMESPACE.findall(header)}


def articles(payload):
    """Returns the text of each article among some `<page>` elements; `payload` is (path, XML bytes, dropped_links)."""
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


# what opens and closes the parts that nest, and the elements whose contents are not wiki markup
_RAW = "ref|math|chem|ce|nowiki|pre|source|syntaxhighlight|timeline|gallery|score|hiero|imagemap|graph|templatedata"
_TOKEN = re.compile(
    rf"\{{\{{|\}}\}}|\[\[|\]\]|<!--|<(?P<raw>{_RAW})\b[^<>]*>|^[ \t:*#;]*(?P<table>\{{\|)|^[ \t]*\|\}}(?!\}})",
    re.MULTILINE | re.IGNORECASE,
)
_OPENS = {"}}": "{{", "]]": "[[", "|}": "{|"}
_DEEPEST = 100  # what is nested deeper is noise, and would be copied at every level
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\[\]]*[ \t]*([^\[\]\n]*)\]")


def plain(markup, dropped=frozenset(_DROPPED_LINKS)):
    """Returns wiki markup as plain text: paragraphs, list items and headings on lines of their own."""
    # external links twice: one may stand in the caption of a picture, and a link in the label of one
    return _lines(_nested(_EXTERNAL.sub(r"\1", markup), dropped))


def _nested(markup, dropped):
    """Returns `markup` without templates, tables, comments and raw elements, and with links as the text they show."""
    frames = [("", [])]  # (what opened it, its text so far)
    depth = {"{{": 0, "[[": 0, "{|": 0}
    endless = set()  # raw elements that are not closed any more: seeking again would take quadratic time

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
            while frames[-1][0] != _OPENS[mark]:  # opened inside and never closed: plain text
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


def _template(text):
    """Returns what a few templates show inside sentences; other templates show nothing."""
    name, *arguments = (part.strip() for part in text.split("|"))
    arguments = [argument for argument in arguments if "=" not in argument]
    name = name.lower()
    if name in ("convert", "cvt"):
        return " ".join(arguments[:2])
    if name in ("lang", "transl", "transliteration", "nowrap", "nobr", "small", "nihongo") and arguments:
        return arguments[-1] if name != "nihongo" else arguments[0]
    return {"nbsp": " ", "spaced ndash": " – ", "snd": " – ", "ndash": "–", "mdash": "—", "'": "'"}.get(name, "")


_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_BREAK = re.compile(r"<br\b[^<>]*>", re.IGNORECASE)
_HEADING = re.compile(r"={1,6}[^=]")


def _lines(text):
    """Returns text without inline markup, blank lines, and headings that nothing follows."""
    text = _TAG.sub("", _BREAK.sub("\n", _EXTERNAL.sub(r"\1", text)))
    kept, heading = [], []
    for line in html.unescape(text).replace("\xa0", " ").split("\n"):
        line = line.strip()
        if _HEADING.match(line) and line.endswith("="):
            heading = [line.strip("= ")]
            continue
        line = re.sub("'{2,}|__[A-Z]+__", "", line.lstrip("*#:; "))
        line = re.sub(r"\( ?[,;:]? ?\)", "", line)  # what a dropped template leaves: "Rome ( ; ) is"
        line = re.sub(r"\( ?[,;] ?", "(", line)
        line = re.sub(r" {2,}", " ", line).strip()
        if line and line[0] not in "|!{}":  # rows of a table that was never closed
            kept += [*heading, line]
            heading = []
    return "\n".join(kept)
