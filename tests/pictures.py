"""What a picture says."""

import xml.etree.ElementTree


def svg_texts(path):
    """The texts of an SVG."""
    return [e.text for e in xml.etree.ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]
