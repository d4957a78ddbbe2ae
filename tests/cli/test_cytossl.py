"""The command line is the bundles': the same settings, the same defaults, the same runs."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cytossl_monai.cli.convert import convert_slide
from cytossl_monai.cli.doctor import decodable, examine_disk, examine_machine, examine_slide
from cytossl_monai.cli.main import COMMANDS, bundle_command, main
from cytossl_monai.cli.settings import read_settings
from cytossl_monai.data import open_slide, write_pyramid
from cytossl_monai.data.slides.readers.tifffile import TiffFileBackend
from cytossl_monai.utils import InputError

ROOT = Path(__file__).parents[2]


def config(name: str) -> Path:
    command = COMMANDS[name]
    return ROOT / "bundles" / command.bundle / "configs" / f"{command.config}.json"


def picture(height: int, width: int) -> np.ndarray:
    ys, xs = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(xs / (11 + c)) * np.cos(ys / (17 - c)) for c in range(3)]
    return np.stack(waves, -1).astype(np.uint8)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_setting_with_its_default_and_comment(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    content = json.loads(config(name).read_text())
    words = " ".join(shown.split())
    _, settings = read_settings(config(name))
    assert len(settings) >= 3
    for setting in settings:
        assert f"--{setting.name} " in shown
        assert setting.name in content
        if not setting.nested:
            assert setting.default == content[setting.name]
        assert " ".join(setting.comment.split()) in words
    for required in COMMANDS[name].required:
        assert required in {setting.name for setting in settings}


def test_show_prints_the_bundle_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "--slides", "my slides.csv", "--tile-size=112", "--show"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[0] == "python"
    assert words[3:6] == ["-m", "monai.bundle", "run"][0:3]
    assert words[words.index("--config_file") + 1] == str(config("index"))
    assert words[words.index("--slides") + 1] == "my slides.csv"
    assert words[words.index("--tile_size") + 1] == "112"
    overlay = ROOT / "configs" / "ssl" / "dino.yaml"
    line = bundle_command("pretrain", {"index_dir": "index", "views#local_size": "64"}, [str(overlay)])
    assert line[line.index("--config_file") + 1] == str([str(config("pretrain")), str(overlay)])
    method = str(ROOT / "configs" / "mil" / "discriminant.yaml")  # for the trainings that a cross-validation starts
    line = bundle_command("train-mil", {"slides": "s.csv", "features_dir": "f"}, [method])
    assert line[line.index("--config_file") + 1] == str(config("train-mil"))
    assert line[line.index("--overlays") + 1] == str([method])
    with pytest.raises(InputError, match="--overlay and --overlays mean the same"):
        bundle_command("train-mil", {"slides": "s.csv", "features_dir": "f", "overlays": "[]"}, [method])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["indx"], "no command 'indx'"),
        (["index", "--tilesize", "112", "--slides", "s.csv"], "did you mean --tile_size?"),
        (["index", "--tile_size", "112"], "needs --slides"),
        (["index", "slides.csv"], "is not a setting"),
        (["index", "--slides"], "has no value"),
        (["pretrain", "--index_dir", "i", "--overlay", "none.yaml"], "none.yaml does not exist"),
        (["report", "open", "nowhere"], "does not exist"),
        (["report"], "report open"),
        (["doctor", "--fast"], "no option --fast"),
        (["convert", "a.tif"], "SLIDE OUT.tif"),
        (["convert", "a.tif", "b.png"], "does not end in .tif"),
        (["convert", "a.tif", "b.tif", "--mpp", "x"], "is no number"),
    ],
)
def test_a_wrong_command_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_command_runs_the_bundle_and_gives_its_status(tmp_path: Path) -> None:
    (tmp_path / "broken.tif").write_bytes(b"no slide")
    (tmp_path / "slides.csv").write_text("slide_id,path\nbroken,broken.tif\n")
    words = ["index", "--slides", str(tmp_path / "slides.csv"), "--output_dir", str(tmp_path / "out"), "--shard", "1/1"]
    words += ["--num_workers", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "cytossl_monai.cli.main", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr
    assert "failed broken" in done.stdout
    assert (tmp_path / "out" / "report.csv").is_file()


def test_report_opens_the_list_of_slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    (tmp_path / "index.html").touch()
    assert main(["report", "open", str(tmp_path)]) == 0
    assert opened == [(tmp_path / "index.html").as_uri()]


def test_the_doctor_knows_what_decodes_here(tmp_path: Path) -> None:
    table = decodable(tmp_path)
    assert table["tifffile"]["jpeg"] == "yes"
    assert table["tifffile"]["zstd"] == "yes"
    assert table["openslide"]["none"] == "yes"


def test_the_doctor_says_what_was_tried_not_what_is_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TiffFileBackend.read
    monkeypatch.setattr(TiffFileBackend, "read", lambda *arguments: 255 - real(*arguments))
    assert set(decodable(tmp_path)["tifffile"].values()) == {"decodes other pixels"}


def test_the_doctor_examines_machine_disk_and_slide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subjects = {finding.subject for finding in [*examine_machine(), *examine_disk(tmp_path, megabytes=2)]}
    assert {"Python", "torch, MONAI", "disk speed"} <= subjects
    slide = write_pyramid(tmp_path / "slide.tif", picture(900, 1200), 0.25)
    said = {finding.subject: finding for finding in examine_slide(slide)}
    assert "1,200 x 900 px at 0.25 um/px" in said["resolution"].says
    assert "JPEG, tiles of 256 x 256" in said["compression"].says
    assert "from level 1, as it is" in said["tiles"].says
    (tmp_path / "broken.tif").write_bytes(b"no slide")
    assert [finding.state for finding in examine_slide(tmp_path / "broken.tif")] == ["wrong"]
    assert main(["doctor", str(slide), str(tmp_path / "broken.tif"), "--disk", str(tmp_path)]) == 1
    assert "is not a readable slide" in capsys.readouterr().out


def test_converting_keeps_pixels_and_resolution(tmp_path: Path) -> None:
    from PIL import Image

    image = picture(1300, 1700)
    Image.fromarray(image).save(tmp_path / "frame.png")
    with pytest.raises(InputError, match="states no resolution"):
        convert_slide(tmp_path / "frame.png", tmp_path / "out.tif")
    assert not (tmp_path / "out.tif").exists()
    assert main(["convert", str(tmp_path / "frame.png"), str(tmp_path / "out.tif"), "--mpp", "0.3"]) == 0
    for backend in ("cucim", "openslide", "tifffile"):
        with open_slide(tmp_path / "out.tif", backend) as slide:
            assert slide.mpp == pytest.approx(0.3, rel=1e-3)
            assert (slide.width, slide.height) == (1700, 1300)
            assert slide.level_downsamples == [1.0, 2.0, 4.0][: len(slide.level_downsamples)]
            assert len(slide.level_downsamples) >= 2
            whole = slide.read_region(0, 0, (1700, 1300)).transpose(1, 2, 0)
            assert np.abs(whole.astype(int) - image).mean() < 3
    with pytest.raises(InputError, match="exists"):
        convert_slide(tmp_path / "frame.png", tmp_path / "out.tif", 0.3)
