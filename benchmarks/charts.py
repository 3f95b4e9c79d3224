"""A report's line chart as a file of its own."""

from collections.abc import Sequence

from posttrain.report_plots import HEIGHT, WIDTH, Series, line_panel

COLOURS = ("#2563ab", "#c2571a", "#0f8a6c", "#8a4fb0", "#b3891a", "#c23b6b", "#4b7f2b")
LINE = 11
"""Height of a line of the legend."""


def chart(lines: Sequence[Series], *, unit: str, along: str) -> str:
    """An SVG of shares `along` an axis, with its colours and a legend inside."""
    panel = line_panel(lines, unit=unit, is_share=True, is_log=False)
    inside = panel[panel.index(">") + 1 : panel.rindex("</svg>")]
    named = [s for i, s in enumerate(lines) if s.label not in [t.label for t in lines[:i]]]
    height = HEIGHT + LINE * (len(named) + 1) + 4
    styles = [
        "text{font:8px sans-serif;fill:#5d6670}",
        ".rule{stroke:#e6e7e4}",
        ".line,.raw{fill:none;stroke-width:1.5}",
        ".raw{opacity:0}",
        ".dot{r:1.5px;stroke:none}",
        *(f".c{i + 1}{{stroke:{c}}}.dot.c{i + 1}{{fill:{c}}}" for i, c in enumerate(COLOURS)),
    ]
    legend = [
        f'<line class="line c{s.colour}" x1="32" x2="44" y1="{y - 3}" y2="{y - 3}"/>'
        f'<text x="48" y="{y}">{s.label}</text>'
        for i, s in enumerate(named)
        for y in [HEIGHT + LINE * (i + 2)]
    ]
    box = f'viewBox="0 0 {WIDTH} {height}" width="{3 * WIDTH}"'
    axis = f'<text x="{WIDTH / 2}" y="{HEIGHT + 3}" text-anchor="middle">{along}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>'
        f'<rect width="100%" height="100%" fill="#fff"/><style>{"".join(styles)}</style>'
        f"{inside}{axis}{''.join(legend)}</svg>\n"
    )
