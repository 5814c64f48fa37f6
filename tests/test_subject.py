from __future__ import annotations

from pathlib import Path

import pytest

from qexport.detectors.demo.scenes import write_scenes
from qexport.errors import DatasetError
from qexport.settings import Settings
from qexport.subject import Subject


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("subject") / "scenes", train=2, val=1, test=2)


def _renamed(scenes: Path, folder: Path) -> Path:
    """The scenes, with washers called rings."""
    folder.mkdir()
    (folder / "images").symlink_to(scenes / "images")
    for path in scenes.glob("*.coco.json"):
        (folder / path.name).write_text(path.read_text().replace('"washer"', '"ring"'))
    return folder


def test_evaluation_classes_of_other_names_raise_error(scenes: Path, tmp_path: Path) -> None:
    other = _renamed(scenes, tmp_path / "rings")
    with pytest.raises(DatasetError, match=r"label 1 is 'ring' in the dataset and 'washer' in the detector"):
        _ = Subject(Settings(model="demo", data=str(other))).evaluation


def test_evaluation_other_names_confirmed_succeeds(scenes: Path, tmp_path: Path) -> None:
    other = _renamed(scenes, tmp_path / "rings")
    confirmed = Settings(model="demo", data=str(other), classes=("ring", "nut", "bolt"))
    assert Subject(confirmed).evaluation.classes == ("__background__", "ring", "nut", "bolt")


def test_resolved_settings_name_splits_and_frame(scenes: Path) -> None:
    settings = Subject(Settings(model="demo", data=str(scenes))).resolved()
    assert (settings.split, settings.calibration_split, settings.frame_px) == ("test", "train", (240, 320))
