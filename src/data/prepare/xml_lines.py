"""Reads XML and keeps the line of every element, which xml.etree does not."""

from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from src.runtime.errors import UserError


class XmlFile:
    """The tree of an XML file.  Raises UserError, with the line, if it is not well-formed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[Element, int] = {}
        builder, parser = TreeBuilder(), expat.ParserCreate()

        def start(tag: str, attributes: dict[str, str]) -> None:
            self._lines[builder.start(tag, attributes)] = parser.CurrentLineNumber

        parser.StartElementHandler = start
        parser.EndElementHandler = builder.end
        parser.CharacterDataHandler = builder.data
        try:
            with path.open("rb") as file:
                parser.ParseFile(file)
        except expat.ExpatError as error:
            raise UserError(f"{path}:{error.lineno}: not well-formed XML ({expat.ErrorString(error.code)})") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        self.root: Element = builder.close()

    def place(self, element: Element) -> str:
        """File and line of an element."""
        return f"{self.path}:{self._lines[element]}"
