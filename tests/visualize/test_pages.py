"""Reports in the dark, on paper, by keyboard and at twice the size; and they name what they are made of."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from report_fixtures import answer, chromium_dom, slide_report

from cytossl_monai.networks.describe import describe_classifier, describe_network, short_path
from cytossl_monai.networks.mil.abmil import ABMIL
from cytossl_monai.networks.mil.ensemble import MILEnsemble
from cytossl_monai.networks.nets.resnet import resnet10
from cytossl_monai.networks.nets.sr_presets import sr_vit_tiny
from cytossl_monai.visualize.cohort_page import write_cohort_page
from cytossl_monai.visualize.page import asset, json_data
from cytossl_monai.visualize.report_page import write_report


def colours(css: str) -> list[dict[str, str]]:
    """The variables of the light and of the dark scheme."""
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    schemes = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in (light, dark)]
    assert schemes[0].keys() == schemes[1].keys()
    return schemes


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2: 1 for equal colours, 21 for black on white."""

    def luminance(colour: str) -> float:
        channels = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = torch.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ torch.tensor([0.2126, 0.7152, 0.0722]))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_controls_stand_out(scheme: int) -> None:
    named = colours(asset("common.css"))[scheme]
    text = [(ink, ground) for ink in ("ink", "soft", "accent") for ground in ("ground", "card", "notice")]
    text += [("ink", "control"), ("on-accent", "accent")]
    marks = [("edge", "card"), ("focus", "card"), ("focus", "ground"), *((n, "card") for n in ("low", "high", "bar"))]
    for pairs, least in ((text, 4.5), (marks, 3.0)):  # levels AA of text and of graphical objects
        poor = {pair: contrast(named[pair[0]], named[pair[1]]) for pair in pairs}
        assert not {pair: ratio for pair, ratio in poor.items() if ratio < least}


def test_no_colour_of_a_page_but_on_pictures_is_fixed() -> None:
    for name in ("report.css", "index.css", "cells.css"):
        fixed = [line for line in asset(name).splitlines() if re.search(r"#[0-9a-f]{3,6}\b", line)]
        assert all(".gallery" in line for line in fixed), fixed  # those lie on pictures, which do not change


MEASURE = """<script>addEventListener("load", () => setTimeout(() => {
  const wide = [...document.querySelectorAll("body *")].filter((each) => each.scrollWidth > each.clientWidth + 1 &&
    getComputedStyle(each).display !== "inline" && each.closest("svg, canvas, button, .skip") === null);
  document.documentElement.dataset.wide = wide.map((each) => each.className || each.tagName).join(" ");
  document.documentElement.dataset.over = document.documentElement.scrollWidth - innerWidth;
}, 100));</script>"""


@pytest.mark.parametrize("page", ["report", "index"])
def test_at_twice_the_size_nothing_is_cut_off(page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    if page == "report":
        write_report(path, slide_report("a-slide-with-a-rather-long-name-2026"))
    else:
        write_cohort_page(path, [answer("a-slide-with-a-rather-long-name-2026", 0.7), answer("b", 0.2)])
    large = "<style>html{font-size:200%}</style>" + MEASURE
    path.write_text(path.read_text(encoding="utf-8").replace("</head>", large + "</head>"), encoding="utf-8")
    dom, _ = chromium_dom(path, tmp_path / "profile", "1000,900")
    assert 'data-over="' in dom
    assert int(re.search(r'data-over="(-?\d+)"', dom)[1]) <= 0
    assert re.search(r'data-wide="([^"]*)"', dom)[1] == ""


def test_a_report_works_by_keyboard(tmp_path: Path) -> None:
    text = write_report(tmp_path / "report.html", slide_report("s")).read_text(encoding="utf-8")
    assert not re.search(r'tabindex="[1-9]', text)  # the order of focus is that of reading
    assert 'class="skip" href="#decided"' in text
    assert 'id="decided"' in text
    described = re.search(r'<canvas[^>]*aria-describedby="([\w ]+)"', text)
    assert described is not None
    assert all(f'id="{name}"' in text for name in described[1].split())
    for tag in re.findall(r"<(?:button|input|select)[^>]*>[^<]*", text):
        assert "aria-label" in tag or re.search(r">\s*\w", tag) or "strength" in tag, tag
    assert all('aria-pressed="' in tag for tag in re.findall(r'<button class="tile"[^>]*>', text))
    assert ":focus-visible" in text
    press = "addEventListener('load', () => setTimeout(() => document.getElementById('cell-2').click(), 50))"
    path = tmp_path / "pressed.html"
    path.write_text(text.replace("</body>", f"<script>{press}</script></body>"), encoding="utf-8")
    dom, _ = chromium_dom(path, tmp_path / "profile", "800,600")
    assert re.findall(r'id="cell-\d" aria-pressed="(\w+)"', dom) == ["false", "true", "false"]


def test_what_is_printed_is_dark_on_white_without_controls() -> None:
    css = asset("common.css")
    assert "@media screen and (prefers-color-scheme: dark)" in css
    printed = css[css.index("@media print") :]
    but_the_scale = r"\.tools > :not\(\.ramp\)[^{]*\.screen[^{]*\{ display: none !important; \}"
    assert re.search(but_the_scale, printed)
    assert "counter(page)" in printed
    assert "break-inside: avoid" in printed


def test_pictures_of_cells_are_called_cells_with_their_place(tmp_path: Path) -> None:
    report = slide_report("s")
    for instances, kind in (("tiles", "Tile"), ("nuclei", "Cell")):
        made = {**report.answer, "tiles": {**report.answer["tiles"], "instances": instances}}
        path = write_report(tmp_path / "report.html", dataclasses.replace(report, answer=made))
        text = path.read_text(encoding="utf-8")
        assert f"{kind} 2: suspicion" in text
        assert "x 128, y 128" in text
        assert f"The 3 leading {kind.lower()}s" in text


def test_encoder_and_classifier_are_named_by_what_they_are(tmp_path: Path) -> None:
    report = slide_report("s")
    encoder = {"name": "model", "hash": "abc", "file": "/data/pretrain/models/model.pt", "method": "DINO"}
    encoder["architecture"] = describe_network(sr_vit_tiny(num_layers=2, img_size=64))
    members = [{"method": "5 folds of ABMIL", "file": "/data/mil/model.pt"}]
    made = {**report.answer, "encoder": encoder, "classifier": {"hash": "def", "members": members}}
    path = write_report(tmp_path / "report.html", dataclasses.replace(report, answer=made))
    text = path.read_text(encoding="utf-8")
    for words in ("SRTransformer tiny, 2 layers, width 192", "trained by DINO", "models/model.pt", "5 folds of ABMIL"):
        assert words in text
    assert "<dd>model<" not in text


def test_networks_in_few_words() -> None:
    network = resnet10(width=16)
    weights = sum(p.numel() for p in network.parameters()) / 1e6
    assert describe_network(network) == f"ResNet-10, width 16, {weights:.1f} million weights"
    assert describe_network(torch.nn.Identity()) == "Identity"
    assert describe_classifier(ABMIL(8, 2)) == "ABMIL"
    assert describe_classifier(MILEnsemble([ABMIL(8, 2), ABMIL(8, 2)])) == "2 folds of ABMIL"
    assert short_path("/a/b/model.pt") == "b/model.pt"


def test_data_of_a_page_cannot_end_its_element() -> None:
    assert "<" not in json_data({"name": "</script><b>"})
