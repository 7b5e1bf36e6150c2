"""How the page looks: one style sheet, system fonts, two themes."""

from __future__ import annotations

from cobra.report import plots

# figures are drawn in the light theme's colours; the page exchanges them for these variables
VARIABLES = {
    plots.BLUE: "--blue",
    plots.VERMILION: "--vermilion",
    plots.GREEN: "--green",
    plots.PURPLE: "--purple",
    plots.INK: "--ink",
    plots.MUTED: "--muted",
    plots.LINE: "--line",
    plots.SURFACE: "--surface",
}
_DARK = {
    plots.BLUE: "#5cb3e8",
    plots.VERMILION: "#f2905a",
    plots.GREEN: "#4cc7a8",
    plots.PURPLE: "#d596c0",
    plots.INK: "#e6e8eb",
    plots.MUTED: "#9aa3ad",
    plots.LINE: "#3a4149",
    plots.SURFACE: "#1b1f24",
}


def style_sheet() -> str:
    light = "".join(f"{variable}:{colour};" for colour, variable in VARIABLES.items())
    dark = "".join(f"{variable}:{_DARK[colour]};" for colour, variable in VARIABLES.items())
    return (
        f":root{{color-scheme:light dark;{light}--ground:#f6f7f8}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}--ground:#121518}}}}\n{_RULES}"
    )


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:62rem;margin:0 auto;padding:2rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.75rem 0 .5rem;scroll-margin-top:1rem}
h3{font-size:1rem;margin:0 0 .25rem}
p{margin:.5rem 0;max-width:44rem}
a{color:var(--blue);text-underline-offset:.15em}
code,pre{font:.875em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
pre{background:var(--surface);border:1px solid var(--line);border-radius:8px;padding:.75rem;white-space:pre-wrap}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1rem;margin:1rem 0;font-size:.9rem}
.lead{font-size:1.05rem}
.muted,figcaption,summary{color:var(--muted)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.75rem;margin:1.25rem 0;padding:0}
.tiles div{background:var(--surface);border:1px solid var(--line);border-radius:8px;padding:.6rem .8rem}
.tiles dt{font-size:.8rem;color:var(--muted)}
.tiles dd{margin:0;font-size:1.3rem;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tiles small{display:block;font-size:.8rem;color:var(--muted)}
.note{border-left:3px solid var(--vermilion);padding:.1rem 0 .1rem .8rem;margin:.75rem 0}
.absent{border-left:3px solid var(--line);padding:.1rem 0 .1rem .8rem;margin:.75rem 0;color:var(--muted)}
figure{margin:1rem 0;padding:1rem;background:var(--surface);border:1px solid var(--line);border-radius:8px}
figcaption{font-size:.9rem;margin-top:.5rem}
.wide{overflow-x:auto}
.wide:focus-visible{outline:2px solid var(--blue)}
svg{display:block;height:auto;margin:0 auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif!important}
details{margin-top:.5rem;font-size:.9rem}
summary{cursor:pointer}
.table{max-height:26rem;overflow:auto;margin:.5rem 0}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--muted);padding:.25rem 0}
th,td{padding:.2rem .75rem .2rem 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
thead th{position:sticky;top:0;background:var(--surface)}
tbody th{font-weight:400;overflow-wrap:anywhere;min-width:9rem}
.number{text-align:right;white-space:nowrap}
@media (max-width:34rem){main{padding:1.25rem .75rem 3rem}figure{padding:.6rem}}
@media print{details{display:none}figure{break-inside:avoid}body{background:none}}
"""
