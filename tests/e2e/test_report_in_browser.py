"""The pages of evaluation and training in a real browser: laid out, self-contained, with pictures and charts drawn."""

import io
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megatron_cocoa.evaluation.mmeb_page import render_page
from megatron_cocoa.evaluation.mmeb_summary import summarize
from megatron_cocoa.evaluation.pictures import encode_png
from megatron_cocoa.evaluation.report import render_report
from tests.unit.evaluation.test_mmeb_run import KnownEmbedder, folder, run
from tests.unit.evaluation.test_report import full_report

__all__ = ["folder"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("kind", ["evaluation", "training"])
def test_the_page_in_chromium(folder, tmp_path, kind, width):
    """Claim: Chromium draws text, the two series' colours of the charts, and the pictures, in either width."""
    page = tmp_path / "report.html"
    page.write_text(_evaluated(folder) if kind == "evaluation" else _trained(), encoding="utf-8")
    shot = tmp_path / "page.png"
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},6000"]
    done = subprocess.run(
        [*command, f"--screenshot={shot}", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert shot.is_file(), done.stderr
    assert "Refused to" not in done.stderr and "ERR_" not in done.stderr, "the page's policy must allow all it needs"
    pixels = np.asarray(Image.open(io.BytesIO(shot.read_bytes())).convert("RGB")).astype(int)
    assert pixels.shape[1] == width

    def drawn(colour: tuple[int, int, int]) -> int:
        return int((np.abs(pixels - colour).sum(axis=2) < 12).sum())

    # The style sheet's ink and series colours on a light ground.
    assert drawn((0x1B, 0x1F, 0x24)) > 500 and drawn((0x00, 0x72, 0xB2)) > 50 and drawn((0xD5, 0x5E, 0x00)) > 50
    # The pictures are noise of every colour, which nothing else on the page has.
    colours = np.unique(pixels.reshape(-1, 3), axis=0)
    assert len(colours) > 2000, len(colours)


def _evaluated(folder) -> str:
    output = run(folder, KnownEmbedder(), with_baselines=True)
    return render_page(summarize(output), output=output, image_root=folder)


def _trained() -> str:
    """The page of a made-up run with every part, whose pictures are noise."""
    noise = np.random.default_rng(0).integers(0, 256, (72, 72, 3), dtype=np.uint8)
    report = full_report()
    strips = tuple(replace(strip, query_png=encode_png(noise)) for strip in report.strips)
    return render_report(replace(report, strips=strips))
