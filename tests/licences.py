"""The licences of what a run is locked to, as the installed packages say of themselves.

python tests/licences.py docs/licences.md     writes the table between the page's two marks anew
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- python tests/licences.py docs/licences.md -->\n", "<!-- end -->\n"
SAME = {
    **dict.fromkeys(("Apache License 2.0", "Apache 2.0", "Apache 2.0 License"), "Apache-2.0"),
    **dict.fromkeys(("Apache Software License", "ASL 2"), "Apache-2.0"),
    **dict.fromkeys(("BSD License", "BSD"), "BSD (clauses not said)"),
    **dict.fromkeys(("ISC License", "ISC License (ISCL)"), "ISC"),
    "3-Clause BSD License": "BSD-3-Clause",
    "GNU General Public License (GPL)": "GPL",
    "MIT License": "MIT",
    "Python Software Foundation License": "PSF",
}
"""Names that mean one licence."""


def locked() -> list[str]:
    """Names that the lock of a run has, and torch."""
    lines = (ROOT / "requirements/run.txt").read_text().splitlines()
    return sorted({"torch", *(line.split("==")[0] for line in lines if "==" in line and not line.startswith(" "))})


def licence_of(name: str) -> str | None:
    """An SPDX expression, else the short words of the package's author, else its classifiers; None: not installed."""
    try:
        said = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if expressions := said.get_all("License-Expression"):
        return str(expressions[0])
    (words,) = said.get_all("License") or [""]
    classes = [c.rpartition(" :: ")[2] for c in said.get_all("Classifier") or [] if c.startswith("License ::")]
    found = [words] if words and "\n" not in words and len(words) < 40 and words != "Dual License" else classes
    return ", ".join(dict.fromkeys(SAME.get(word, word) for word in found)) or "not said"


def table() -> str:
    """Licences with the packages that have them."""
    by_licence: dict[str, list[str]] = {}
    for name in locked():
        by_licence.setdefault(licence_of(name) or "not installed on Linux", []).append(name)
    rows = [f"| {licence} | {', '.join(names)} |" for licence, names in sorted(by_licence.items())]
    return "\n".join(["| licence | packages |", "| --- | --- |", *rows]) + "\n"


def with_table(page: str) -> str:
    """The page with the table of this environment."""
    return re.sub(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", lambda _: table(), page, flags=re.DOTALL)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text()))
