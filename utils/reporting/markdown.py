"""Texts of users within Markdown: on the Hub, in an editor and in TensorBoard they are shown as they are."""

from utils.reporting.examples import visible

SPECIAL = {ord(character): f"&#{ord(character)};" for character in "\\`*_[]<>&|~#$"}


def as_text(text: str) -> str:
    """A text in one line of Markdown, in which nothing of it is markup. Put it behind a word of your own.

    At the start of a line even a number or a dash is markup. Lines end in `<br>`, other white space is one space.
    """
    lines = (" ".join(line.split()) for line in visible(text).splitlines())
    return "<br>".join(line.translate(SPECIAL) for line in lines if line)
