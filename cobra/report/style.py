"""How the page looks: one style sheet, system fonts, two themes."""

from __future__ import annotations

from cobra.report.plots import canvas

# figures are drawn in the light theme's colours; the page exchanges them for these variables
VARIABLES = {
    canvas.BLUE: "--blue",
    canvas.VERMILION: "--vermilion",
    canvas.GREEN: "--green",
    canvas.PURPLE: "--purple",
    canvas.INK: "--ink",
    canvas.MUTED: "--muted",
    canvas.LINE: "--line",
    canvas.SURFACE: "--surface",
}
DARK = {
    canvas.BLUE: "#5cb3e8",
    canvas.VERMILION: "#f2905a",
    canvas.GREEN: "#4cc7a8",
    canvas.PURPLE: "#d596c0",
    canvas.INK: "#e6e8eb",
    canvas.MUTED: "#9aa3ad",
    canvas.LINE: "#3a4149",
    canvas.SURFACE: "#1b1f24",
}
GROUNDS = ("#f6f7f8", "#121518")  # of the page, light and dark


def style_sheet() -> str:
    light = "".join(f"{variable}:{colour};" for colour, variable in VARIABLES.items())
    dark = "".join(f"{variable}:{DARK[colour]};" for colour, variable in VARIABLES.items())
    return (
        f":root{{color-scheme:light dark;{light}--ground:{GROUNDS[0]}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}--ground:{GROUNDS[1]}}}}}\n{_RULES}"
    )


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:62rem;margin:0 auto;padding:2rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.75rem 0 .5rem;scroll-margin-top:1rem}
h3{font-size:1rem;margin:0 0 .5rem}
p{margin:.5rem 0;max-width:48rem;overflow-wrap:anywhere}
a{color:var(--blue);text-underline-offset:.15em}
:focus-visible{outline:2px solid var(--blue);outline-offset:2px}
code,pre{font:.875em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
pre{background:var(--surface);border:1px solid var(--line);border-radius:8px;padding:.75rem;white-space:pre-wrap}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1rem;margin:1rem 0;font-size:.9rem}
.lead{font-size:1.05rem}
summary,.caption,.files,.subject{color:var(--muted);font-size:.9rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(14rem,1fr));gap:.75rem;margin:1.25rem 0}
.cards section{background:var(--surface);border:1px solid var(--line);border-radius:8px;padding:.6rem .8rem}
.cards h2{font-size:.9rem;margin:0 0 .25rem}
dl{display:grid;grid-template-columns:1fr auto;gap:.35rem .75rem;margin:0;font-size:.9rem}
dt{color:var(--muted);line-height:1.35}
dd{margin:0;line-height:1.35;text-align:right;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
dt small{display:block;font-size:.8rem;line-height:1.3}
.note{border-left:3px solid var(--vermilion);padding:.1rem 0 .1rem .8rem;margin:.75rem 0}
.absent{border-left:3px solid var(--line);padding:.1rem 0 .1rem .8rem;margin:.75rem 0;color:var(--muted)}
figure{margin:1rem 0;padding:1rem;background:var(--surface);border:1px solid var(--line);border-radius:8px}
.caption,.files{margin:.5rem 0 0;max-width:none}
.wide,.table{overflow:auto;background:linear-gradient(to right,var(--surface) 1rem,transparent 3rem) local,
linear-gradient(to left,var(--surface) 1rem,transparent 3rem) local,
linear-gradient(to right,var(--line),transparent 1rem),linear-gradient(to left,var(--line),transparent 1rem)}
svg{display:block;height:auto;margin:0 auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif!important}
details{margin-top:.5rem}
summary{cursor:pointer;padding:.15rem 0}
.table{margin-top:.5rem}
details .table{max-height:30rem}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
caption{position:absolute;clip-path:inset(50%)}
th,td{padding:.2rem 1rem .2rem 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
thead th{position:sticky;top:0;background:var(--surface);vertical-align:bottom}
tbody th{font-weight:400;overflow-wrap:break-word;max-width:24rem}
.number{text-align:right;white-space:nowrap}
thead .number{white-space:normal;min-width:4.5rem}
@media (max-width:34rem){main{padding:1.25rem .75rem 3rem}figure{padding:.6rem}tbody th{max-width:14rem}}
@media print{body,.wide,.table{background:none}details,nav{display:none}figure,.cards section{break-inside:avoid}
h2,h3,section>p{break-after:avoid}p{break-inside:avoid}svg{min-width:0!important;max-height:21cm}.wide,.table{overflow:visible}}
"""
