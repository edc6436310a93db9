"""The page's style sheet. Light only: the figures are drawn on white."""

CSS = """
:root { color-scheme: light; --ink: #1a1a1a; --soft: #5a5a5a; --line: #d5d5d5; --paper: #ffffff; --shade: #f6f6f4; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 84rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .7rem; padding-top: .8rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .6rem; }
p, li, pre, h1, h2, h3, dd, dt { overflow-wrap: anywhere; }
p, ul { max-width: 46rem; margin: .5rem 0; }
ul { padding-left: 1.2rem; }
.question { font-size: 1.1rem; color: var(--soft); margin-bottom: 1.2rem; }
.verdicts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem;
  align-items: start; }
.verdict { border: 1px solid var(--line); border-left-width: 6px; border-radius: 4px; padding: .8rem 1rem; }
.verdict.good { border-left-color: #00694d; } .verdict.bad { border-left-color: #a83e00; }
.verdict.open { border-left-color: #8a6a00; }
.verdict h2 { border: 0; margin: 0 0 .3rem; padding: 0; font-size: 1.15rem; }
.verdict dl { margin: 0; } .verdict dt { font-weight: 600; font-size: .85rem; color: var(--soft); margin-top: .4rem; }
.verdict dd { margin: 0 0 .15rem; }
.verdict tbody th { min-width: 6rem; } .verdict table.wide td { min-width: 0; } .verdict .scroll { margin: .6rem 0; }
.mark { display: inline-block; white-space: nowrap; font-weight: 600; padding: 0 .45em; border: 1px solid; border-radius: 3px; }
.mark.good { color: #005a42; background: #e6f4ef; } .mark.bad { color: #8f3500; background: #fbebe1; }
.mark.open { color: #6b5200; background: #fbf4dc; } .mark.note { color: var(--ink); background: var(--shade); }
.scroll { overflow-x: auto; margin: .6rem 0 1.2rem; border: 1px solid var(--line); border-radius: 4px; }
.scroll:focus-visible { outline: 3px solid #0072b2; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .5rem .6rem; color: var(--soft); }
th, td { padding: .35rem .5rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { background: var(--shade); white-space: nowrap; }
tbody th { font-weight: 600; min-width: 8rem; max-width: 18rem; overflow-wrap: break-word; background: var(--paper); }
td.number { text-align: right; white-space: nowrap; }
thead th.number { text-align: right; }
table.wide td { min-width: 9rem; } table.wide td.long { min-width: 15rem; } table.wide td.short { min-width: 0; white-space: nowrap; }
table:not(.wide) td span.line { white-space: nowrap; padding: 0; text-indent: 0; }
td span.line { display: block; padding-left: .8em; text-indent: -.8em; }
th span.line { display: block; } th span.line + span.line { font-weight: 400; color: var(--soft); }
summary { cursor: pointer; color: var(--soft); } details .line { margin-top: .1rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 33rem), 1fr)); gap: 1.5rem 2rem; align-items: start; }
figure { margin: 0; min-width: 0; max-width: 46rem; }
figure .title { font-weight: 600; margin: 0 0 .3rem; }
figure svg { display: block; width: 100%; max-width: 100%; height: auto; }
figcaption { font-size: .82rem; color: var(--soft); margin-top: .3rem; }
.absent { border: 1px dashed var(--line); padding: 1.2rem; color: var(--soft); }
pre { white-space: pre-wrap; background: var(--shade); padding: .8rem; border-radius: 4px; font-size: .85rem; }
@media screen and (max-width: 40rem) {
  thead { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
  table, caption, tbody, tr, tbody th, td { display: block; }
  tr { border-top: 2px solid var(--line); padding: .3rem 0; }
  tbody th, td, td.number, table.wide td, table.wide td.long, table.wide td.short { border: 0; max-width: none; min-width: 0;
    white-space: normal; overflow-wrap: anywhere; padding: .2rem .6rem; }
  table.wide td::before { content: attr(data-column); display: block; font-size: .78rem; color: var(--soft); }
  table:not(.wide) td { display: flex; justify-content: space-between; flex-wrap: wrap; gap: 0 1rem; text-align: right; }
  table:not(.wide) td::before { content: attr(data-column); color: var(--soft); margin-right: auto; }
}
@media (max-width: 40rem) { body { padding: 1rem .6rem 3rem; } h1 { font-size: 1.4rem; } .question { font-size: 1rem; } }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  :root { --ink: #000; --soft: #000; --shade: #fff; --line: #888; }
  body { max-width: none; padding: 0; font-size: 10pt; background: #fff; }
  h2, h3 { break-after: avoid; } figure, .verdict, tr { break-inside: avoid; }
  .scroll { overflow: visible; border: 0; }
  table { font-size: 7.2pt; } th, td { padding: .15rem .25rem; }
  thead { display: table-header-group; }
  td.number, thead th, table.wide td.short { white-space: normal; }
  tbody th, table.wide td, table.wide td.long { min-width: 0; }
  details::details-content { content-visibility: visible; display: block; } summary { display: none; }
  .gallery { grid-template-columns: 1fr 1fr; gap: 6mm; }
  .mark { background: #fff !important; color: #000 !important; }
}
"""
