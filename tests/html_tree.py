"""A page as a tree of nodes, read with html.parser, to ask for elements instead of substrings.

    page = parse(text)
    page.one("table", class_="final").rows()

Used by tests/test_report.py and tests/test_report_page.py.
"""

from __future__ import annotations

from html.parser import HTMLParser

VOID = ("meta", "br", "img", "link", "input", "hr")


class Node:
    def __init__(self, tag: str, attrs: dict, parent: Node | None):
        self.tag, self.attrs, self.parent = tag, attrs, parent
        self.children: list[Node | str] = []

    def all(self, tag: str, **attrs) -> list[Node]:
        """Nodes below with this tag and these attributes (data_x for data-x; class_ for class)."""
        wanted = {k.rstrip("_").replace("_", "-"): v for k, v in attrs.items()}
        found = []
        for child in self.children:
            if isinstance(child, Node):
                if tag in ("*", child.tag) and wanted.items() <= child.attrs.items():
                    found.append(child)
                found += child.all(tag, **attrs)
        return found

    def one(self, tag: str, **attrs) -> Node:
        (found,) = self.all(tag, **attrs)
        return found

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def rows(self) -> list[list[str]]:
        """The cells of a table."""
        return [[c.text for c in tr.children if isinstance(c, Node)] for tr in self.all("tr")]


class _Parser(HTMLParser):
    """A tree of Nodes; an end tag without its start is an error."""

    def __init__(self, text: str):
        super().__init__()
        self.root = self.here = Node("", {}, None)
        self.feed(text)
        self.close()
        assert self.here is self.root, f"{self.here.tag} is never closed"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        node = Node(tag, dict(attrs), self.here)
        self.here.children.append(node)
        if tag not in VOID:
            self.here = node

    def handle_startendtag(self, tag, attrs):
        self.here.children.append(Node(tag, dict(attrs), self.here))

    def handle_endtag(self, tag):
        assert self.here.tag == tag, f"</{tag}> inside <{self.here.tag}>"
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.children.append(data)


def parse(text: str) -> Node:
    """The root above a page's elements."""
    return _Parser(text).root


def figures(node: Node) -> dict[str, Node]:
    return {f.one("figcaption").text: f.one("svg") for f in node.all("figure")}


def svg_texts(svg: Node) -> list[str]:
    return [node.text for node in svg.all("text")]


def facts(node: Node) -> dict[str, str]:
    return {d.text: d.parent.one("dd").text for d in node.all("dt")}


def letters(cells: Node) -> str:
    return "".join(li.text for li in cells.all("li"))
