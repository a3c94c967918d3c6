"""The data tests' folders of images, for the benchmark of the pipeline."""

from tests.data.conftest import bad_folder, photo_folder

__all__ = ["bad_folder", "photo_folder"]
