"""The pictures of docs/architecture.md are what docs/draw.py draws now."""

import importlib.util
import re
from pathlib import Path

import numpy as np

from tests.docs.pages import ROOT

NUMBER = re.compile(r"-?\d+\.\d+")


def test_pictures_are_those_that_would_be_drawn(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs/draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    draw.main(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {f"{name}.svg" for name in draw.PICTURES}
    for name in names:
        drawn, kept = ((folder / name).read_text() for folder in (tmp_path, ROOT / "docs/images"))
        again = f"{name}: run python docs/draw.py"
        assert NUMBER.sub("", drawn) == NUMBER.sub("", kept), again
        places = [np.array(NUMBER.findall(text), float) for text in (drawn, kept)]
        assert np.allclose(*places, atol=0.01), again
