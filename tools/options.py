"""Writes the table of options into docs/options.md: python -m tools.options"""

import re
from pathlib import Path

from lib_dinotile.options import Option
from lib_dinotile.settings import Settings, Txt2Img

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
HEAD = "| name | in the UI | default | |\n|---|---|---|---|\n"


def row(option: Option) -> str:
    text = f"{option.help} {option.allowed[0].upper()}{option.allowed[1:]}."
    return f"| `{option.name}` | {option.label} | {option.default} | {text.removesuffix(' Text.')} |\n"


def with_table(text: str) -> str:
    """The page's text with the table as it has to be."""
    rows = {option.name: option for option in (*Txt2Img.table(), *Settings.table())}
    table = HEAD + "".join(map(row, rows.values()))
    return re.sub(re.escape(HEAD) + r"(\|.*\n)*", lambda _: table, text)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
