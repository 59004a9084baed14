"""The page's style sheet."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2230; --soft: #5b6274; --line: #d9dce4; --paper: #ffffff; --raised: #f5f6f9;
  --blue: 42, 111, 219; --red: 205, 72, 49; --dot: rgb(42, 111, 219); }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ee; --soft: #a0a7b8; --line: #363c4a; --paper: #14171e; --raised: #1d212b;
    --blue: 84, 146, 240; --red: 232, 104, 78; --dot: rgb(120, 170, 250); } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
header p { margin: .2rem 0 .6rem; color: var(--soft); }
nav a { margin-right: 1.1em; color: var(--dot); }
.note { color: var(--soft); max-width: 60rem; }
small { color: var(--soft); font-size: .85em; white-space: nowrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .65rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; font-size: .88em; vertical-align: bottom; }
.number { text-align: right; white-space: nowrap; }
.text { max-width: 34rem; min-width: 16rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.confusion td, .confusion tbody th { text-align: right; vertical-align: middle; }
.confusion td { min-width: 2.6rem; border: 1px solid var(--paper); }
.confusion .right { background: rgba(var(--blue), var(--depth)); }
.confusion .wrong { background: rgba(var(--red), var(--depth)); }
.confusion .total { color: var(--soft); }
.confusion tbody th { font-weight: 600; max-width: 14rem; overflow-wrap: anywhere; }
svg { display: block; font: 12px system-ui, sans-serif; fill: var(--soft); }
svg.bar { margin-top: .2rem; }
.axis, .grid { stroke: var(--line); stroke-width: 1; }
.overall { stroke: var(--soft); stroke-width: 1.5; }
.diagonal { stroke: var(--soft); stroke-dasharray: 5 4; }
.reach { stroke: var(--dot); stroke-width: 2; }
.dot { fill: var(--dot); }
.count { fill: var(--soft); opacity: .28; }
.beside { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
@media print {
  :root { --ink: #000000; --soft: #444444; --line: #bbbbbb; --paper: #ffffff; --blue: 42, 111, 219; --red: 205, 72, 49;
    --dot: rgb(42, 111, 219); }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; } .scroll { overflow: visible; } tr, svg { break-inside: avoid; } h2 { break-after: avoid; }
  .text { min-width: 0; max-width: 24rem; }
  td, rect { -webkit-print-color-adjust: exact; print-color-adjust: exact; } }
"""
