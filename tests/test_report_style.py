"""Colours of both themes, against WCAG's contrast and for readers who see fewer of them."""

import re

import matplotlib
import numpy as np
import pytest

from cobra.report.plots import canvas
from cobra.report.style import DARK, GROUNDS, VARIABLES, style_sheet

THEMES = {"light": {colour: colour for colour in VARIABLES}, "dark": DARK}
TEXT = (canvas.INK, canvas.MUTED, canvas.BLUE)  # on the page itself too
# Machado, Oliveira, Fernandes 2009, severity 1: what is left of linear RGB without one kind of cone
MISSING_CONE = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def contrast(one, other):
    return canvas.contrast(matplotlib.colors.to_rgb(one), matplotlib.colors.to_rgb(other))


def difference(one, other, cone):
    """Euclidean, in cube roots of linear RGB, which are near even steps to the eye."""
    seen = []
    for colour in (one, other):
        rgb = np.array(matplotlib.colors.to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen.append(np.cbrt(np.clip(np.array(MISSING_CONE[cone]) @ linear, 0, 1)))
    return np.linalg.norm(seen[0] - seen[1])


def test_contrast():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("theme", THEMES)
def test_text_can_be_read(theme):
    """AA: 4.5 for every colour that letters have, on figures and, where they stand there, on the page."""
    palette, ground = THEMES[theme], GROUNDS[theme == "dark"]
    for colour in palette.keys() - {canvas.SURFACE, canvas.LINE}:
        assert contrast(palette[colour], palette[canvas.SURFACE]) >= 4.5, colour
    for colour in TEXT:
        assert contrast(palette[colour], ground) >= 4.5, colour


@pytest.mark.parametrize("cone", MISSING_CONE)
@pytest.mark.parametrize("theme", THEMES)
def test_colours_stay_apart(theme, cone):
    """Kept and dropped, contribution and gradient: blue and vermilion, whichever cone is missing."""
    assert difference(THEMES[theme][canvas.BLUE], THEMES[theme][canvas.VERMILION], cone) > 0.4


def test_difference():
    """Red and green of the same lightness are one colour for half of those who see fewer."""
    assert difference("#c00000", "#5c7a00", "deuteranopia") < 0.2


def test_cells_can_be_read():
    """Numbers on every colour of the heat map."""
    for cell in matplotlib.colormaps["viridis"](np.linspace(0, 1, 256)):
        assert contrast(canvas.ink_on(cell), cell[:3]) >= 4.5


def test_both_themes_define_every_variable():
    """And nothing is used that no theme defines."""
    light, dark = re.findall(r":root\{([^}]*)\}", style_sheet())
    defined = [dict(re.findall(r"(--\w+):(#[0-9a-f]{6})", theme)) for theme in (light, dark)]
    assert defined[0].keys() == defined[1].keys() == {*VARIABLES.values(), "--ground"}
    assert set(re.findall(r"var\((--\w+)\)", style_sheet())) <= defined[0].keys()
    assert all(len(set(theme.values())) == len(theme) for theme in defined)
    assert not re.search(r"url\(|@import|https?:", style_sheet())
