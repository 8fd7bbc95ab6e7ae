"""The evaluation's page in a real browser: it is laid out, nothing is loaded from elsewhere, pictures are drawn."""

import io
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from megatron_cocoa.evaluation.mmeb_page import render_page
from megatron_cocoa.evaluation.mmeb_summary import summarize
from tests.unit.evaluation.test_mmeb_run import KnownEmbedder, folder, run

__all__ = ["folder"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_in_chromium(folder, tmp_path, width):
    """Claim: Chromium draws text, the two series' colours of the charts, and the query's picture, in either width."""
    output = run(folder, KnownEmbedder(), with_baselines=True)
    page = output / "report.html"
    page.write_text(render_page(summarize(output), output=output, image_root=folder), encoding="utf-8")
    shot = tmp_path / "page.png"
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},4200"]
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
