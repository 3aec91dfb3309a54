"""data/wikipedia.py against articles of our own, written after the documentation of the templates that they use."""

import itertools
import pathlib

import pytest

from data import wiki_templates, wikipedia

# each article: "%%%% what it is about", its markup, "%%", the text that a reader sees but for what is left out
ARTICLES = {}
for article in pathlib.Path(__file__).with_name("wikipedia_articles.txt").read_text("utf-8").split("%%%% ")[1:]:
    title, _, rest = article.partition("\n")
    ARTICLES[title] = rest.split("%%\n")


def test_there_are_a_hundred():
    assert len(ARTICLES) >= 100 and all(len(parts) == 2 for parts in ARTICLES.values())


@pytest.mark.parametrize("title", ARTICLES)
def test_an_article_is_what_a_reader_sees(title):
    markup, seen = ARTICLES[title]
    assert wikipedia.plain(markup) == seen.strip("\n")


def test_no_arguments_are_too_odd():
    """Every template with up to seven arguments, missing, blank, or no numbers where there should be some."""
    names = [*wiki_templates._FUNCTIONS, *wiki_templates._FIXED, *wiki_templates._PREFIXES, *wiki_templates._FIRST, "x"]
    for name in [*names, *wiki_templates._AROUND, "lang-", "lang-ru", "formatnum:", "uc:"]:
        for argument, count in itertools.product(("", "x", "12", "\u00b2", "-", "1=", "3=y", "df=y"), range(8)):
            assert isinstance(wiki_templates.shown("|".join([name, *[argument] * count])), str)
