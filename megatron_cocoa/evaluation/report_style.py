"""The report's style sheet: light and dark by the reader's setting, no external font, image or script.

Series colours are Okabe and Ito's blue, vermillion and green (told apart under the common colour deficiencies),
with lighter members of the same set on a dark ground.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1b1f24; --muted: #57606a; --ground: #f6f7f9; --card: #ffffff; --rule: #d4d9df; --link: #0b5cad;
  --s0: #0072b2; --s1: #d55e00; --s2: #00835f; --right: #00835f; --right-ground: #e3f4ee; --picture: #ffffff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8eaed; --muted: #a3abb5; --ground: #14171b; --card: #1d2126; --rule: #3a414a; --link: #79b8f3;
    --s0: #56b4e9; --s1: #f0a03c; --s2: #35c59b; --right: #35c59b; --right-ground: #173a30; --picture: #ffffff;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
main, header.page, nav { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header.page { padding-top: 28px; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 6px; }
section > :last-child { margin-bottom: 0; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 12px; }
h3 { font-size: 1.02rem; margin: 22px 0 10px; }
p { margin: 0 0 12px; max-width: 74ch; }
a { color: var(--link); }
nav ul { list-style: none; margin: 12px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 4px 18px; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 22px 24px;
  margin: 18px 0; }
.note, figcaption { color: var(--muted); font-size: .88rem; }
.missing { color: var(--muted); border-left: 3px solid var(--rule); padding-left: 12px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(205px, 1fr)); gap: 12px; margin: 0 0 18px; }
.tile { border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 1.7rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { display: block; color: var(--muted); font-size: .86rem; line-height: 1.4; }
dl { margin: 0 0 12px; display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr));
  gap: 2px 28px; }
dl div { display: flex; gap: 12px; border-bottom: 1px solid var(--rule); padding: 5px 0; }
dt { color: var(--muted); flex: 0 0 34%; }
dd { margin: 0; overflow-wrap: anywhere; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(500px, 100%), 1fr)); gap: 22px 32px;
  margin: 14px 0 18px; }
.scroll { overflow-x: auto; }
section > .scroll { margin: 26px 0 12px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 6px; }
th, td { padding: 6px 6px; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:first-child { text-align: left; font-weight: 500; white-space: nowrap; padding-left: 0; }
thead th { color: var(--muted); font-weight: 500; vertical-align: bottom; }
td small { display: block; color: var(--muted); font-size: .8rem; white-space: nowrap; }
tr.reference th, tr.reference td { color: var(--muted); font-style: italic; }
tr.last th, tr.last td { font-weight: 600; }
tr.last small { font-weight: 400; }
figure { margin: 0 0 12px; min-width: 0; }
.wide { grid-column: 1 / -1; }
figure h3 { margin-top: 4px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); gap: 12px 28px;
  align-items: start; }
svg { width: 100%; max-width: 540px; height: auto; display: block; }
svg.square { max-width: 300px; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); gap: 18px; }
svg text { fill: var(--ink); font-size: 12px; font-family: inherit; }
svg .chart-title { font-size: 14px; font-weight: 600; }
svg .tick { fill: var(--muted); font-size: 11.5px; }
svg .middle { text-anchor: middle; }
svg .end, svg .row-label { text-anchor: end; }
svg .axis { stroke: var(--muted); fill: none; }
svg .grid { stroke: var(--rule); stroke-width: .8; fill: none; }
svg .reference { stroke: var(--ink); stroke-dasharray: 4 3; fill: none; }
svg .raw { fill: none; stroke-width: .9; opacity: .38; }
svg .smooth { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
svg .whisker { stroke-width: 1.8; fill: none; }
svg path.s0 { stroke: var(--s0); } svg path.s1 { stroke: var(--s1); } svg path.s2 { stroke: var(--s2); }
svg .mark.s0 { fill: var(--s0); } svg .mark.s1 { fill: var(--s1); } svg .mark.s2 { fill: var(--s2); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 20px 26px; }
.trio { display: flex; gap: 8px; }
.trio figure { margin: 0; flex: 1; }
img { display: block; width: 100%; height: auto; background: var(--picture); border: 1px solid var(--rule);
  border-radius: 6px; }
.strip { display: grid; grid-template-columns: minmax(150px, 210px) 1fr; gap: 8px 20px; padding: 14px 0;
  border-bottom: 1px solid var(--rule); align-items: start; }
.strip:last-of-type { border-bottom: 0; }
img.wanted { display: inline-block; width: 56px; vertical-align: middle; }
.query p { margin: 0 0 4px; overflow-wrap: anywhere; }
.query img { max-width: 104px; }
.strip ol + .note { margin: 8px 0 0; }
.strip ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 8px;
  grid-template-columns: repeat(5, minmax(0, 160px)); }
.strip li { border: 2px solid transparent; border-radius: 8px; padding: 6px; font-size: .86rem; line-height: 1.35; }
.strip li.right { border-color: var(--right); background: var(--right-ground); }
.strip li bdi { display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical; overflow: hidden;
  overflow-wrap: anywhere; }
.strip li .badge { color: var(--right); font-weight: 600; display: block; }
.strip li .cosine { color: var(--muted); display: block; font-variant-numeric: tabular-nums; }
pre { overflow: auto; max-height: 480px; font-size: .84rem; background: var(--ground); border: 1px solid var(--rule);
  border-radius: 6px; padding: 12px; }
summary { cursor: pointer; }
@media (max-width: 620px) { .strip { grid-template-columns: 1fr; }
  .strip ol { grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); } section { padding: 16px 14px; } }
@media print { section { break-inside: avoid; } nav { display: none; } }
"""
