"""The style sheet of all pages: light or dark as the reader has it, narrow windows, print."""

from __future__ import annotations

from gptjax.pages.plots import DARK, DASHES, LIGHT


def _palette(colours: tuple[str, ...]) -> str:
    return " ".join(f"--s{number}: {colour};" for number, colour in enumerate(colours, 1))


_SERIES = "\n".join(f".s{number} {{ --own: var(--s{number}); }}" for number in range(1, len(LIGHT) + 1))
_DASHES = "\n".join(f".d{number} {{ stroke-dasharray: {dash}; }}" for number, dash in enumerate(DASHES) if dash)

STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1d2230; --soft: #5b6274; --line: #d9dce4; --paper: #ffffff; --raised: #f5f6f9;
  --blue: 42, 111, 219; --red: 205, 72, 49; --dot: rgb(42, 111, 219); --s0: #9aa0ac; {_palette(LIGHT)} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e8ee; --soft: #a0a7b8; --line: #363c4a; --paper: #14171e; --raised: #1d212b;
    --blue: 84, 146, 240; --red: 232, 104, 78; --dot: rgb(120, 170, 250); --s0: #6a7182; {_palette(DARK)} }} }}
* {{ box-sizing: border-box; }}
html {{ background: var(--paper); -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }}
body {{ margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }}
h3 {{ font-size: .95rem; margin: 1.1rem 0 .3rem; overflow-wrap: anywhere; }}
p, li {{ max-width: 60rem; overflow-wrap: anywhere; }}
header p {{ margin: .2rem 0 .6rem; color: var(--soft); }}
nav {{ display: flex; flex-wrap: wrap; gap: .2rem 1.1em; }}
a {{ color: var(--dot); text-underline-offset: .15em; }}
:focus-visible {{ outline: 2px solid var(--dot); outline-offset: 2px; }}
.skip {{ position: absolute; left: -999rem; }}
.skip:focus {{ position: static; }}
footer {{ margin-top: 2.5rem; padding-top: .6rem; border-top: 1px solid var(--line); color: var(--soft); font-size: .9em; }}
code, pre {{ font-family: ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", monospace; font-size: .88em; }}
code {{ background: var(--raised); border-radius: 3px; padding: .05em .3em; }}
.answer {{ background: var(--raised); border-left: 4px solid var(--dot); padding: .7rem 1rem; font-size: 1.07rem; }}
.warning {{ background: var(--raised); border-left: 4px solid rgb(var(--red)); padding: .5rem 1rem; }}
.note, figcaption {{ color: var(--soft); max-width: 60rem; }}
small {{ color: var(--soft); font-size: .85em; white-space: nowrap; }}
.faint-text {{ color: var(--soft); }}
.scroll {{ overflow-x: auto; max-width: 100%; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }}
caption {{ text-align: left; white-space: nowrap; color: var(--soft); padding: .2rem .65rem; }}
th, td {{ padding: .3rem .65rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }}
thead th {{ color: var(--soft); font-weight: 600; font-size: .88em; vertical-align: bottom; }}
tbody th {{ font-weight: 600; }}
.number {{ text-align: right; white-space: nowrap; }}
.long {{ max-width: 26rem; min-width: 12rem; overflow-wrap: anywhere; }}
.text {{ max-width: 34rem; min-width: 16rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
.confusion td, .confusion tbody th {{ text-align: right; vertical-align: middle; }}
.confusion td {{ min-width: 2.6rem; border: 1px solid var(--paper); }}
.confusion .right {{ background: rgba(var(--blue), var(--depth)); }}
.confusion .wrong {{ background: rgba(var(--red), var(--depth)); }}
.confusion .total {{ color: var(--soft); }}
.confusion tbody th {{ max-width: 14rem; overflow-wrap: break-word; }}
figure {{ margin: 1rem 0 1.4rem; }}
figcaption {{ margin-top: .3rem; font-size: .93em; }}
.narrow {{ display: none; }}
.legend {{ list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1.3rem; margin: .3rem 0 0;
  padding: 0 0 0 1rem; font-size: .93em; }}
.quote pre {{ margin: 0; padding: .6rem .8rem; background: var(--raised); border-radius: 4px; white-space: pre-wrap;
  overflow-wrap: anywhere; }}
svg {{ display: block; font: 12px system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; fill: var(--soft); }}
svg.bar {{ margin-top: .2rem; }}
svg.plot, svg.chart {{ max-width: 100%; height: auto; }}
svg.swatch {{ display: inline-block; vertical-align: middle; margin-right: .45em; }}
.axis, .grid, .tick {{ stroke: var(--line); stroke-width: 1; }}
.axis, .tick {{ stroke: var(--soft); }}
.overall {{ stroke: var(--soft); stroke-width: 1.5; }}
.diagonal {{ stroke: var(--soft); stroke-dasharray: 5 4; }}
.reach {{ stroke: var(--dot); stroke-width: 2; }}
.dot {{ fill: var(--dot); }}
.count {{ fill: var(--soft); opacity: .28; }}
.label {{ fill: var(--soft); }}
.rowname {{ fill: var(--ink); paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }}
.s0 {{ --own: var(--s0); }} .plain {{ --own: var(--dot); }}
{_SERIES}
path.line {{ fill: none; stroke: var(--own); stroke-width: 1.9; stroke-linejoin: round; }}
path.faint {{ fill: none; stroke: var(--own); stroke-width: .8; opacity: .65; stroke-dasharray: none; }}
path.s0.line {{ stroke-width: 1; }}
path.band {{ fill: var(--own); opacity: .17; stroke: none; }}
{_DASHES}
text.name {{ fill: var(--own); font-weight: 700; }}
.span {{ stroke: var(--own); stroke-width: 2; }}
.point {{ fill: var(--own); stroke: var(--own); stroke-width: 2; }}
.point.hollow {{ fill: var(--paper); }}
.single {{ fill: var(--own); opacity: .6; }}
rect.bar {{ fill: var(--own); }}
.beside {{ display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }}
.beside > * {{ min-width: 0; max-width: 100%; }}
@media (max-width: 50rem) {{
  body {{ padding: 1rem .8rem; }}
  .wide {{ display: none; }} .narrow {{ display: block; }}
  caption {{ white-space: normal; }} th, td {{ padding: .3rem .45rem; }} .long {{ min-width: 14rem; }} }}
@media print {{
  :root {{ color-scheme: light; --ink: #000000; --soft: #444444; --line: #bbbbbb; --paper: #ffffff; --raised: #f2f3f6;
    --blue: 42, 111, 219; --red: 205, 72, 49; --dot: rgb(42, 111, 219); --s0: #9aa0ac; {_palette(LIGHT)} }}
  @page {{ margin: 14mm 12mm; }}
  body {{ max-width: none; padding: 0; font-size: 9.5pt; }}
  nav, .skip {{ display: none; }} .scroll {{ overflow: visible; }} .wide {{ display: block; }} .narrow {{ display: none; }}
  tr, svg, figure, .quote, .answer {{ break-inside: avoid; }} h2, h3, caption {{ break-after: avoid; }}
  table {{ font-size: 8.5pt; }} thead th {{ font-size: .92em; }} th, td {{ padding: .2rem .4rem; }}
  .long {{ min-width: 0; }} .text {{ min-width: 0; max-width: 24rem; }}
  .answer, .warning, code, pre, td, rect, svg * {{ -webkit-print-color-adjust: exact; print-color-adjust: exact; }} }}
"""
