"""The data of the five case studies: one datamodule a dataset, in the layout in which it is published."""


def import_all() -> None:
    """Imports every datamodule, so that ``--data NAME`` finds it by its short name."""
    import datamodules.image_folder
    import datamodules.imagenet  # noqa: F401
