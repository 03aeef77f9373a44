"""docs/performance.md."""

MARKS = "<!-- speed -->"


def page(documents):
    return ""


def readme(documents):
    return ""
