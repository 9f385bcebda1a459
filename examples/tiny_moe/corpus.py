"""Builds the training text of the tiny checkpoint from freely licensed documentation.

Reads Debian documentation packages (unpacked under --root) and the running interpreter's standard
library; writes train.txt, focus.txt (the part of it that training sees more often), val.txt and
held_out.txt. The result depends only on those inputs.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import html
import inspect
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_BYTES = 290_000
MIN_CHARACTERS = 80  # shorter paragraphs are mostly list entries, all alike
FOCUS = re.compile(r"python3.11-doc/(tutorial|faq|howto|reference|using|glossary)")


@dataclass(frozen=True)
class Source:
    """A Debian documentation package: its HTML folder below usr/share/doc, and its licence."""

    package: str
    folder: str
    licence: str
    skip: str = r"(genindex|search|contents|py-modindex|_static|_modules|_sources|bookindex)"


SOURCES = (
    Source("python3.11-doc", "python3.11/html", "PSF-2.0"),
    Source("sqlite3-doc", "sqlite3", "public domain"),
    Source("postgresql-doc-15", "postgresql-doc-15/html", "PostgreSQL"),
    Source("python-django-doc", "python-django-doc/html", "BSD-3-Clause"),
    Source("python-sqlalchemy-doc", "python-sqlalchemy-doc/html", "MIT"),
    Source("twisted-doc", "twisted-doc", "MIT"),
    Source("python-dask-doc", "python-dask-doc/html", "BSD-3-Clause"),
    Source("sphinx-doc", "sphinx-doc/html", "BSD-2-Clause"),
    Source("docutils-doc", "docutils-doc", "public domain and BSD-2-Clause"),
    Source("python-pytest-doc", "python-pytest-doc/html", "MIT"),
    Source("python-pil-doc", "python-pil-doc/html", "HPND"),
    Source("python-tornado-doc", "python-tornado-doc/html", "Apache-2.0"),
    Source("python-xarray-doc", "python-xarray-doc/html", "Apache-2.0"),
    Source("python-flask-doc", "python-flask-doc/html", "BSD-3-Clause"),
    Source("python-werkzeug-doc", "python-werkzeug-doc/html", "BSD-3-Clause"),
    Source("python-jinja2-doc", "python-jinja2-doc/html", "BSD-3-Clause"),
    Source("python-click-doc", "python-click-doc/html", "BSD-3-Clause"),
    Source("python-cryptography-doc", "python-cryptography-doc/html", "Apache-2.0 or BSD-3-Clause"),
    Source("python-setuptools-doc", "python-setuptools-doc/html", "MIT"),
    Source("python-attr-doc", "python-attr-doc/html", "MIT"),
    Source("python-requests-doc", "python-requests-doc/html", "Apache-2.0"),
)


@dataclass(frozen=True)
class Document:
    """One page, module or topic: a stable name and its prose paragraphs."""

    name: str
    paragraphs: tuple[str, ...]

    @property
    def num_characters(self) -> int:
        return sum(map(len, self.paragraphs))


class ProseParser(HTMLParser):
    """Collects the running text of a page; code, tables, signatures and headings are dropped."""

    SKIP = re.compile(r"script|style|pre|table|dt|nav|footer|head|h[1-6]|svg|math|button|form")
    INLINE = re.compile(
        r"a|abbr|acronym|b|cite|code|em|i|kbd|q|samp|small|span|strong|su[bp]|tt|u|var"
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self._buffer: list[str] = []
        self._skipping: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = (dict(attrs).get("class") or "").split()
        if self.SKIP.fullmatch(tag) or (tag == "a" and "headerlink" in classes):
            self._skipping.append(tag)
        if tag == "br":
            self._buffer.append(" ")
        elif not self.INLINE.fullmatch(tag):
            self.flush()

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipping:
            while self._skipping.pop() != tag:
                pass
        if not self.INLINE.fullmatch(tag):
            self.flush()

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._buffer.append(data)

    def flush(self) -> None:
        if self._buffer:
            self.blocks.append("".join(self._buffer))
            self._buffer = []


PLAIN = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": " - ",
        "\u2026": "...",
        "\u2192": "->",
        "\u00a0": " ",
        "\u00b6": " ",
        "\u200b": "",
        "\u00ad": "",
        "\u2212": "-",
    }
)
REWRITES = (
    (re.compile(r":[a-z:+-]+:`([^`]*)`"), r"\1"),  # reST roles
    (re.compile(r"``?([^`]*)``?_?"), r"\1"),
    (re.compile(r"(?<!\w)\*{1,2}([^*\s][^*]*?)\*{1,2}(?!\w)"), r"\1"),
    (re.compile(r"^(?:(?:bpo|gh|gh-issue)-\d+(?:, )?)+:? ", re.I), ""),
    (
        re.compile(
            r"\(?(?:Contributed|Patch|Changed|Suggested) by [^()]*?(?: in (?:bpo|gh)\S*)?\)\.?"
        ),
        "",
    ),
    (re.compile(r"\[(?:\d+|source|[A-Z]\w+\d+)\]"), ""),
    (re.compile(r"\(?https?://\S+"), ""),
    (re.compile(r"\s+"), " "),
    (re.compile(r" ([,;)]|[:.](?!\S))"), r"\1"),
)
NOISE = re.compile(
    r"\.\. |^>>>|^\W*Bases: |Copyright \(|^Return self|\{\{|%\}|::$|__\w+\(self|\\\w"
    r"|^(Changed|Deprecated|New|Added) (in|since) (version )?\d|^Raises an auditing event"
    r"|^This docstring was copied|^Inherited from|^See the documentation of"
)
WORD = re.compile(r"[A-Za-z][a-z']+")


def clean(text: str) -> str:
    """Plain ASCII-quoted text on one line, without markup."""
    text = html.unescape(text).translate(PLAIN)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


def is_prose(text: str) -> bool:
    """Whether a cleaned paragraph reads as English sentences rather than code or a fragment."""
    if len(text) < MIN_CHARACTERS or text[-1] not in ".!?:)" or NOISE.search(text):
        return False
    if not (text[0].isupper() or text[0] in "\"'(") or not text.isascii():
        return False
    words = WORD.findall(text)
    letters = sum(len(word) for word in words)
    return len(words) >= 7 and letters >= 0.66 * len(text)


def prose_of(blocks: list[str]) -> tuple[str, ...]:
    cleaned = (clean(block) for block in blocks)
    return tuple(block for block in cleaned if is_prose(block))


def html_documents(root: Path, source: Source) -> Iterator[Document]:
    folder = root / "usr/share/doc" / source.folder
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: unpack the package {source.package} under --root")
    for path in sorted(folder.rglob("*.html")):
        name = f"{source.package}/{path.relative_to(folder).as_posix()}"
        if path.is_symlink() or re.search(source.skip, name):
            continue
        parser = ProseParser()
        parser.feed(path.read_text(encoding="utf-8", errors="replace"))
        parser.close()
        parser.flush()
        yield Document(name, prose_of(parser.blocks))


def docstrings(tree: ast.AST) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text


def comment_blocks(code: str) -> Iterator[str]:
    """Comments of two and more full lines: the shorter ones are rarely sentences."""
    for match in re.finditer(r"(?:^[ ]*# .*\n){2,}", code, re.MULTILINE):
        yield "\n".join(line.strip().removeprefix("# ") for line in match[0].splitlines())


def split_paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", inspect.cleandoc(text))


def stdlib_documents() -> Iterator[Document]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if re.search(r"site-packages|dist-packages|test|lib2to3|pydoc_data|idlelib", name):
            continue
        code = path.read_text(encoding="utf-8", errors="replace")
        texts = [*docstrings(ast.parse(code)), *comment_blocks(code)]
        blocks = [block for text in texts for block in split_paragraphs(text)]
        yield Document(f"stdlib/{name}", prose_of(blocks))


def topic_documents() -> Iterator[Document]:
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        yield Document(f"topics/{name}", prose_of(split_paragraphs(text)))


def is_held_out(document: Document) -> bool:
    """5 % of the pages by a hash of their name; docstrings and topics repeat pages: never."""
    if document.name.startswith(("stdlib/", "topics/")):
        return False
    return hashlib.sha256(document.name.encode()).digest()[0] * 20 < 256


def without_repeats(documents: list[Document]) -> list[Document]:
    """Keeps a paragraph's first occurrence, compared by its letters alone."""
    seen: set[str] = set()

    def is_new(text: str) -> bool:
        num_seen = len(seen)
        seen.add(re.sub(r"[^a-z]", "", text.lower()))
        return len(seen) > num_seen

    unique = [Document(d.name, tuple(filter(is_new, d.paragraphs))) for d in documents]
    return [document for document in unique if document.num_characters >= 200]


def joined(documents: list[Document]) -> str:
    texts = ("\n".join(document.paragraphs) for document in documents)
    return f"\n{END_OF_TEXT}\n".join(texts) + "\n"


def sample_of(documents: list[Document], max_bytes: int) -> list[Document]:
    """Whole pages of the Python documentation, shortest hash first, up to max_bytes in all."""
    pages = [d for d in documents if d.name.startswith("python3.11-doc/")]
    pages.sort(key=lambda d: hashlib.sha256(d.name.encode()).digest())
    chosen: list[Document] = []
    for page in pages:
        if len(joined([*chosen, page])) <= max_bytes:
            chosen.append(page)
    return chosen


def report(documents: list[Document]) -> None:
    groups: dict[str, list[int]] = {}
    for document in documents:
        groups.setdefault(document.name.split("/")[0], []).append(document.num_characters)
    for name, sizes in groups.items():
        print(f"{name:22s} {len(sizes):5d} documents {sum(sizes) / 1e6:6.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("/"), help="where packages are unpacked")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.txt and val.txt")
    args = parser.parse_args()
    documents = [d for source in SOURCES for d in html_documents(args.root, source)]
    documents += [*stdlib_documents(), *topic_documents()]
    # NOTE: held-out pages come first, so that a paragraph they share with others leaves training.
    documents = without_repeats(sorted(documents, key=is_held_out, reverse=True))
    val = [document for document in documents if is_held_out(document)]
    train = [document for document in documents if not is_held_out(document)]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "train.txt").write_text(joined(train))
    (args.out / "focus.txt").write_text(joined([d for d in train if FOCUS.match(d.name)]))
    (args.out / "val.txt").write_text(joined(val))
    (args.out / "held_out.txt").write_text(joined(sample_of(val, HELD_OUT_BYTES)))
    report(documents)
    for name in ("train.txt", "focus.txt", "val.txt", "held_out.txt"):
        print(f"{name}: {(args.out / name).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
