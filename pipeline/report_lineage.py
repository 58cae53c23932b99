"""The lineage of a report's artifacts as inline SVG: a box each, joined to what it was made from, left to right."""

from markupsafe import Markup

from rae.store.manifest import Artifact

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y = 150, 46, 40, 18


def lineage_picture(artifacts: list[Artifact]) -> Markup:
    """An `svg` element; artifacts come in the order of the data flow, so that inputs stand before what needs them."""
    columns: dict[str, int] = {}
    filled: dict[int, int] = {}
    places: dict[str, tuple[int, int]] = {}
    for artifact in artifacts:
        inputs = [columns[ref] for ref in _inputs(artifact) if ref in columns]
        column = 1 + max(inputs, default=-1)
        columns[artifact.ref], row = column, filled.get(column, 0)
        filled[column] = row + 1
        places[artifact.ref] = column * (_WIDTH + _GAP_X) + 1, row * (_HEIGHT + _GAP_Y) + 1
    parts = [
        _line(places[ref], places[artifact.ref]) for artifact in artifacts for ref in _inputs(artifact) if ref in places
    ]
    parts += [_box(artifact, *places[artifact.ref]) for artifact in artifacts]
    width = max(filled, default=0) * (_WIDTH + _GAP_X) + _WIDTH + 2
    height = max(filled.values(), default=1) * (_HEIGHT + _GAP_Y)
    return Markup(
        '<svg viewBox="0 0 {} {}" width="{}" style="max-width: 100%" role="img" aria-label="What was made from what">'
        '<g fill="none" stroke="currentColor" font-size="12">{}</g></svg>'
    ).format(width, height, width, Markup().join(parts))


def _inputs(artifact: Artifact) -> list[str]:
    return [f"{one['kind']}/{one['id']}" for one in artifact.manifest.inputs.values()]


def _line(start: tuple[int, int], end: tuple[int, int]) -> Markup:
    x0, y0, x1, y1 = start[0] + _WIDTH, start[1] + _HEIGHT // 2, end[0], end[1] + _HEIGHT // 2
    middle = x1 - _GAP_X // 2
    return Markup('<path d="M{} {} H{} V{} H{}" opacity="0.5"/>').format(x0, y0, middle, y1, x1)


def _box(artifact: Artifact, x: int, y: int) -> Markup:
    """A name is untrusted text: `format` of a `Markup` escapes it."""
    name = artifact.manifest.name
    short = name if len(name) <= 20 else name[:19] + "…"
    return Markup(
        '<rect x="{}" y="{}" width="{}" height="{}" rx="6"/>'
        '<text x="{}" y="{}" fill="currentColor" stroke="none">{} {}</text>'
        '<text x="{}" y="{}" fill="currentColor" stroke="none" opacity="0.6">{}</text>'
    ).format(x, y, _WIDTH, _HEIGHT, x + 9, y + 19, artifact.kind, short, x + 9, y + 36, artifact.id)
