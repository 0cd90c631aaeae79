"""What a part of the report found."""

from dataclasses import dataclass, field


@dataclass
class Section:
    """A part of the report. `str()` of it is its text.

    Attributes:
      title: its heading.
      rows: names and what was found of each, one line or several.
      wrong: what is wrong, and what to do about it: a sentence or two for each.
      hints: what one may do, though nothing is wrong.
    """

    title: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def add(self, name: str, *found: str) -> None:
        for i, text in enumerate(found):
            self.rows.append(("" if i else name, text))

    def __str__(self) -> str:
        width = max((len(name) for name, _ in self.rows), default=0)
        lines = [f"  {name:{width}}  {text}".rstrip() for name, text in self.rows]
        return "\n".join([self.title, *lines, ""])
