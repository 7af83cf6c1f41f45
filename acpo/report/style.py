"""The page's style sheet. Figures take their colours from its variables, so that they follow light and dark."""

from .figure import DARK, GRID, INK, MUTED, PALETTE

_LIGHT_SERIES = "".join(f"--c{i}:{c};" for i, c in enumerate(PALETTE))
_DARK_SERIES = "".join(f"--c{i}:{c};" for i, c in enumerate(DARK))
STYLE = f"""
:root{{color-scheme:light dark;--ink:{INK};--muted:{MUTED};--grid:{GRID};--ground:#fbfbfa;--card:#fff;{_LIGHT_SERIES}}}
@media(prefers-color-scheme:dark){{:root{{--ink:#e8e9eb;--muted:#9aa1ab;--grid:#33373d;--ground:#16181b;--card:#1e2125;{_DARK_SERIES}}}}}
*{{box-sizing:border-box}}
body{{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--ground)}}
body{{max-width:96rem;margin:0 auto;padding:1.6rem clamp(.8rem,3vw,2.5rem) 4rem}}
h1{{font-size:1.5rem;margin:0 0 .2rem;overflow-wrap:anywhere}}
h2{{font-size:1.05rem;margin:2.4rem 0 .7rem}}
p{{margin:.2rem 0 .8rem}}
.muted,small{{color:var(--muted)}}
.legend{{display:flex;flex-wrap:wrap;gap:.3rem 1.4rem;padding:.6rem 0;margin:.4rem 0;position:sticky;top:0;background:var(--ground);z-index:1}}
.legend i{{display:inline-block;width:1.5rem;height:.28rem;border-radius:2px;margin-right:.5rem;vertical-align:middle}}
.grid{{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:1rem}}
@media(max-width:1180px){{.grid{{grid-template-columns:repeat(2,minmax(0,1fr))}}}}
@media(max-width:640px){{.grid{{grid-template-columns:minmax(0,1fr)}}}}
figure{{margin:0;background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:.8rem .9rem .5rem;min-width:0}}
figcaption{{display:flex;flex-wrap:wrap;gap:0 .6rem;align-items:baseline}}
figcaption b{{font-size:.95rem}}
figcaption small{{font-size:.8rem}}
svg{{display:block;width:100%;height:auto;margin-top:.3rem}}
.empty{{color:var(--muted);display:grid;place-content:center;text-align:center;aspect-ratio:3.9/2.5;font-size:.85rem}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;font-size:.83rem;font-variant-numeric:tabular-nums}}
th,td{{padding:.22rem .7rem;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}}
th{{color:var(--muted);font-weight:500;white-space:normal;vertical-align:bottom}}
td:first-child,th:first-child{{text-align:left;padding-left:0}}
details{{font-size:.85rem;margin-top:.3rem}}
summary{{cursor:pointer;color:var(--muted)}}
details .scroll{{max-height:18rem;overflow:auto}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.8rem}}
summary:focus-visible,.scroll:focus-visible{{outline:2px solid var(--c0);outline-offset:2px}}
@media print{{.legend{{position:static}}details{{display:none}}}}
"""
