"""Small reports made by hand, and a headless browser."""

import shutil
import subprocess

import numpy as np
import pytest

from cytossl_monai.transforms.nuclei.instances import segment_instances
from cytossl_monai.visualize.gallery import GalleryTile
from cytossl_monai.visualize.heatmap import tile_map
from cytossl_monai.visualize.report_page import NOTICE, SlideReport


def cell_picture(side=128):
    """(3, side, side): one cell with a dark nucleus on glass."""
    y, x = np.mgrid[:side, :side] - side / 2
    image = np.full((3, side, side), 240, np.uint8)
    image[:, np.hypot(x, y) < 50] = np.array((150, 190, 200))[:, None]
    image[:, np.hypot(x, y) < 16] = np.array((70, 40, 110))[:, None]
    return image


def gallery_tiles():
    image = cell_picture()
    found = segment_instances(image, 0.25)
    return [
        GalleryTile(image, 0.25, found.labels, found.table, 128 * i, 128, 128, 2.0, 0.9 - 0.1 * i) for i in range(3)
    ]


def answer(name, suspicion):
    return {
        "slide_id": name,
        "patient_id": "patient",
        "notice": NOTICE,
        "status": "predicted",
        "label": "positive" if suspicion > 0.5 else "negative",
        "suspicion": suspicion,
        "suspicion_spread": 0.04,
        "probabilities": {"negative": 1 - suspicion, "positive": suspicion},
        "negative_class": "negative",
        "calibrated": False,
        "slide": {"path": "s.tif", "width": 512, "height": 384, "mpp": 0.25, "mpp_source": "file", "reader": "cucim"},
        "tiles": {"count": 3, "nuclei": 3},
        "encoder": {"name": "tiny", "hash": "abc"},
        "classifier": {"hash": "def", "members": [{"method": "ABMIL"}]},
        "software": {"cytossl_monai": "0"},
        "made": "2026-01-01T00:00:00+00:00",
        "made_from": {"slide": "123"},
    }


def empty_answer():
    return {**answer("blank", 0.0), "label": None, "suspicion": None, "probabilities": None, "reason": "only glass"}


def slide_report(name, suspicion=0.87):
    coords = np.array([[0, 128], [128, 128], [256, 128]])
    heat = tile_map(coords, np.array([0.9, 0.5, 0.1]), 128, 512, 384, 0.25)
    thumbnail = np.tile(cell_picture(), (1, 3, 4))
    scores = np.array([0.9, 0.8, 0.7])
    return SlideReport(answer(name, suspicion), thumbnail, heat, gallery_tiles(), scores, {"tiles": "tiles.parquet"})


def chromium_dom(path, profile, size, anchor=""):
    """DOM after the scripts have run, and what the browser logged. Skips where there is no Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium: the report's script is not run")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=4000 --dump-dom"
    command = [browser, *flags.split(), f"--user-data-dir={profile}", f"--window-size={size}", f"file://{path}{anchor}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr
